"""A bench: a model, its tokenizer and a task, loaded once for all cells that share them."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from austeer.identity import weights_origin
from austeer.pairs import Pair, read_pairs
from embedded import acceptance
from eval.tasks.base import Task
from eval.tasks.embedded import EmbeddedTask
from eval.tasks.own_pairs import PairTask
from eval.tasks.registry import PAPER_TASKS, paper_task
from experiments.cell import ModelSpec, PairsSpec, TaskSpec
from experiments.engines import vllm_batches
from experiments.store import Store

TINY = 50_000_000  # parameters of a model that may stay loaded beside others


@dataclass
class Bench:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    model_spec: ModelSpec
    task_spec: TaskSpec
    store: Store
    learned: dict[tuple, Any] = field(default_factory=dict)  # what methods prepared from the pairs
    kept: dict[Any, Any] = field(default_factory=dict)  # what tells the cost of steering (experiments/costs.py)

    @property
    def grid_kind(self) -> str:
        return "small" if self.model_spec.embedded else "full"

    @property
    def origin(self) -> dict[str, str]:
        """Return what records add on where the weights came from, if the model's name does not say it all."""
        return weights_origin(self.model, self.model_spec.weights)

    def pairs_of(self, task: str) -> list[Pair]:
        """Return the pairs of this or another task, to rank this bench's model on."""
        if task == self.task_spec.name:
            return self.task.pairs
        return _task(self.model_spec, replace(self.task_spec, name=task), self.store).pairs


def is_paper_task(model: ModelSpec, task: TaskSpec) -> bool:
    return not model.embedded and task.name in PAPER_TASKS


def has_instruction(model: ModelSpec, task: TaskSpec) -> bool:
    """Say whether there is a prompt-only control. The authors' code has none, and a user's pairs have no instruction."""
    return model.embedded or (is_paper_task(model, task) and task.protocol == "clean")


def checkpoint(model: ModelSpec, task: TaskSpec) -> str:
    return str(acceptance.WEIGHTS / f"{task.name}{model.variant}") if model.embedded else model.name


def task_class(model: ModelSpec, task: TaskSpec) -> type[Task]:
    return EmbeddedTask if model.embedded else PAPER_TASKS.get(task.name, PairTask)


class Benches:
    """Open benches and keep them loaded: any number of tiny models, but only one large model at a time."""

    def __init__(self):
        self._benches: dict[tuple[ModelSpec, TaskSpec, Store], Bench] = {}
        self._models: dict[tuple, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        self._kept: dict[tuple, dict] = {}  # by everything but the pairs, so that draws of pairs share it

    def open(self, model: ModelSpec, task: TaskSpec, store: Store) -> Bench:
        key = model, task, store
        if key not in self._benches:
            new_task = _task(model, task, store)  # before the model, so that a mistake in the data shows at once
            loaded = self._load(model, checkpoint(model, task))
            kept = self._kept.setdefault((model, replace(task, pairs=PairsSpec()), store), {})
            self._benches[key] = Bench(*loaded, new_task, model, task, store, kept=kept)
        return self._benches[key]

    def forget_learned(self, bench: Bench) -> None:
        """Drop what methods learned on other benches of a large model: for many draws of pairs it would fill the memory."""
        for other in self._benches.values():
            if other is not bench and other.model is bench.model and bench.model.num_parameters() > TINY:
                other.learned.clear()

    def _load(self, spec: ModelSpec, folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        key = folder, spec.weights, spec.dtype, spec.device, spec.quantization, spec.attn
        if key not in self._models:
            if any(model.num_parameters() > TINY for model, _ in self._models.values()):
                self.close()
            model = rmodels.load(
                folder, dtype=spec.dtype, device=spec.device, quantization=spec.quantization,
                attn_implementation=spec.attn, weights=spec.weights, quick_proof=spec.quick_proof,
            )  # fmt: skip
            self._models[key] = model, rmodels.load_tokenizer(folder, weights=spec.weights)
        return self._models[key]

    def close(self) -> None:
        for held in (self._benches, self._models, self._kept):
            held.clear()
        vllm_batches.stop()
        gc.collect()


BENCHES = Benches()  # those of this process, shared by all its cells


def _task(model: ModelSpec, task: TaskSpec, store: Store) -> Task:
    pairs = vars(task.pairs)
    if model.embedded:
        return EmbeddedTask(task.name, task.test_split, limit=task.limit, **pairs)
    if not is_paper_task(model, task):
        return PairTask(task.label, read_pairs(task.name, task.fields), limit=task.limit, **pairs)
    chat = rmodels.load_tokenizer(model.name, weights=model.weights) if task.chat else None
    return paper_task(
        task.name, toxicity=task.toxicity, cache=store.paid_scores, device=model.device, data_dir=task.data_dir,
        protocol=task.protocol, chat=chat, limit=task.limit, batch_size=task.batch_size,
        per_token=task.per_token, **pairs,
    )  # fmt: skip
