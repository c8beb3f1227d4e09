"""Answer with vLLM instead of the loaded model: each plan becomes a LoRA adapter, so a whole grid runs as one batch.

Only answers come from vLLM. Ranks, likelihoods and perplexities are the loaded model's, steered live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from austeer.export.lora import Lora, max_lora_rank, save_lora
from austeer.plan import Plan
from eval.answering.answer_file import Answer
from eval.answering.answerer import Answerer, Generation
from experiments.bench import BENCHES, Bench
from experiments.engines.vllm_engine import VLLMEngine

PROMPTS_AT_ONCE = 1024  # what a killed run loses
SLOTS = 16  # adapters that run at once; more take turns
LEAST_RANK = 16  # so that the unsteered cells' engine takes most grids, too


@contextmanager
def vllm_answerer(bench: Bench, plans: Sequence[Plan | None], n_items: int) -> Iterator[VLLMAnswerer]:
    with TemporaryDirectory(prefix="austeer-") as folder:
        yield VLLMAnswerer(bench, plans, n_items, Path(folder))


def adapters_code() -> tuple:
    """Return the roots of the code that turns plans into adapters and speaks for the model."""
    return VLLMAnswerer, VLLMEngine, save_lora


class VLLMAnswerer(Answerer):
    """Answer `n_items` prompts under the first plan, then as many under the second, ...

    Adapters are written, and vLLM is started, when there is something to answer.
    """

    def __init__(self, bench: Bench, plans: Sequence[Plan | None], n_items: int, folder: Path):
        super().__init__(bench.model, bench.tokenizer)
        self.plans, self.n_items, self.folder = plans, n_items, folder

    def batches(
        self, prompts: Sequence[str], generation: Generation, batch_size: int | None
    ) -> tuple[list[list[int]], Callable[[list[int]], list[Answer]]]:
        order = list(range(len(prompts)))
        batches = [order[start : start + PROMPTS_AT_ONCE] for start in range(0, len(order), PROMPTS_AT_ONCE)]
        return batches, lambda batch: self._answers(prompts, batch, generation)

    def _answers(self, prompts: Sequence[str], batch: list[int], generation: Generation) -> list[Answer]:
        rank = max((adapter.rank for adapter in self._adapters if adapter), default=1)
        adapters = [self._adapters[index // self.n_items] for index in batch]
        folders = [adapter and adapter.folder for adapter in adapters]
        return _engine(self.model, rank).answers([prompts[index] for index in batch], generation, folders)

    def receipt(self) -> dict[str, int]:
        """Say, of the adapters that were used, the largest rank and how many modules they change."""
        adapters = [adapter for adapter in self._adapters if adapter]
        if self.plans == [None]:
            return {}
        return {
            "rank": max((adapter.rank for adapter in adapters), default=0),
            "modules": sum(len(adapter.modules) for adapter in adapters),
        }

    @cached_property
    def _adapters(self) -> list[Lora | None]:
        """Write an adapter for each plan, none where nothing is done."""
        return [
            save_lora(self.model, plan, self.folder / str(number)) if plan is not None and _acts(plan) else None
            for number, plan in enumerate(self.plans)
        ]


def _acts(plan: Plan) -> bool:
    return any(bool(values.any()) for values in (*plan.scales.values(), *plan.shifts.values()))


_RUNNING: dict[tuple[str, str], VLLMEngine] = {}


def _engine(model: PreTrainedModel, rank: int) -> VLLMEngine:
    """Return the engine of the model. One runs at a time; it is started anew for a higher rank."""
    name = model.config.name_or_path, str(model.dtype).removeprefix("torch.")
    if name not in _RUNNING or _RUNNING[name].max_lora_rank < rank:
        stop()
        room = {}
        if torch.cuda.is_available():  # beside the loaded model
            free, total = torch.cuda.mem_get_info()
            room["gpu_memory_utilization"] = 0.9 * free / total
        _RUNNING[name] = VLLMEngine(
            name[0], max_loras=SLOTS, max_lora_rank=max_lora_rank(max(rank, LEAST_RANK)), dtype=name[1], **room
        )
    return _RUNNING[name]


def stop() -> None:
    for engine in _RUNNING.values():
        engine.stop()
    _RUNNING.clear()


BENCHES.on_close.append(stop)
