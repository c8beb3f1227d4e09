"""What a cell is asked under, and what it loads: the model, its tokenizer and the task, once for all that share them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from austeer.pairs import read_pairs
from embedded import acceptance
from eval.tasks.base import Task
from eval.tasks.embedded import EmbeddedTask
from eval.tasks.own_pairs import PairTask
from eval.tasks.registry import PAPER_TASKS, paper_task
from experiments.engines import vllm_batches as engine_batches
from experiments.engines.vllm_batches import LIVE

EMBEDDED = "embedded"  # also embedded-NAME: another model of the same task, such as embedded-seed1
TINY = 50_000_000  # parameters
UNSTEERED = ("vanilla", "prompt-only")


@dataclass(frozen=True)
class Setting:
    """What every cell of one comparison shares. `model` is "embedded" or one of its kin, a hub id or a folder."""

    model: str
    task: str  # a task of the embedded models, one of the paper, or the file of a user's pairs
    fields: tuple[str, str, str] = ("prompt", "positive", "negative")
    device: str | None = None
    dtype: str = "auto"
    quantization: str | None = None  # 4bit, 8bit
    engine: str = LIVE  # whose words the answers are: of engine_batches.ENGINES
    ranks: str = "AU_ranks"
    records: str = "results/records"
    test_split: str = "test"
    limit: int | None = None
    ks: tuple[int, ...] = ()  # to try, instead of the method's own; one of each: no search
    alphas: tuple[float, ...] = ()
    search: str = "grid"  # how settings are chosen: of SEARCHES
    n_pairs: int | None = None  # rank on the first so many
    general_pairs: bool = False  # wrong answers by the paper's general recipe
    options: tuple[tuple[str, str], ...] = ()  # of methods: ("caa.readout", "answer")
    # of the paper's tasks
    data_dir: str | None = None
    protocol: str = "clean"
    toxicity: str = "local"
    encoder: str | None = None
    chat: bool = False
    batch_size: int | None = None

    @property
    def embedded(self) -> bool:
        return self.model.partition("-")[0] == EMBEDDED

    @property
    def of_the_paper(self) -> bool:
        return not self.embedded and self.task in PAPER_TASKS

    @property
    def has_instruction(self) -> bool:
        """Is there a prompt-only control? The authors' code has none, and own pairs say not what they are for."""
        return self.embedded or (self.of_the_paper and self.protocol == "clean")

    @property
    def checkpoint(self) -> str:
        if not self.embedded:
            return self.model
        variant = self.model.removeprefix(EMBEDDED)
        return str(acceptance.WEIGHTS / f"{self.task}{variant}")

    @property
    def task_name(self) -> str:
        return self.task if self.embedded else Path(self.task).stem

    def ranks_folder(self, momentum: str) -> Path:
        by = momentum if self.protocol == "clean" else f"{momentum}-{self.protocol}"
        by += f"-{self.n_pairs}-pairs" if self.n_pairs else ""
        by += "-general" if self.general_pairs else ""
        return Path(self.ranks) / Path(self.model).name / self.task_name / by


@dataclass(frozen=True)
class Cell:
    setting: Setting
    method: str
    site: str | None = None
    draw: int = 0

    def __str__(self) -> str:
        return " ".join(filter(None, (self.setting.task_name, self.site, self.method)))


def unsteered(setting: Setting) -> Setting:
    """What only says how to steer left out, but for the pairs."""
    return replace(setting, ks=(), alphas=(), search="grid", options=())


def asked_once(setting: Setting, method: str) -> Cell:
    """An unsteered cell, the same however others are steered."""
    return Cell(replace(unsteered(setting), n_pairs=None, general_pairs=False), method)


def load(setting: Setting) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    # the model last: a mistake in the data should not wait for it
    task = _task(unsteered(setting))
    return *_model(setting.checkpoint, setting.dtype, setting.device, setting.quantization), task


@lru_cache(maxsize=32)
def _task(setting: Setting) -> Task:
    ranking = {"n_pairs": setting.n_pairs, "general_pairs": setting.general_pairs, "encoder": setting.encoder}
    if setting.embedded:
        return EmbeddedTask(setting.task, setting.test_split, limit=setting.limit, **ranking)
    if setting.of_the_paper:
        return paper_task(
            setting.task, toxicity=setting.toxicity, cache=Path(setting.records).parent / "perspective.jsonl",
            device=setting.device, data_dir=setting.data_dir, protocol=setting.protocol,
            chat=rmodels.load_tokenizer(setting.checkpoint) if setting.chat else None,
            limit=setting.limit, batch_size=setting.batch_size, **ranking,
        )  # fmt: skip
    return PairTask(setting.task_name, read_pairs(setting.task, setting.fields), limit=setting.limit, **ranking)


def _model(*how) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """One large model at a time stays loaded; of tiny ones, all."""
    if how not in _LOADED:
        if any(model.num_parameters() > TINY for model, _ in _LOADED.values()):
            release_models()
            gc.collect()
        checkpoint, dtype, device, quantization = how
        model = rmodels.load(checkpoint, dtype=dtype, device=device, quantization=quantization)
        _LOADED[how] = model, rmodels.load_tokenizer(checkpoint)
    return _LOADED[how]


def release_models() -> None:
    _LOADED.clear()
    engine_batches.stop()
    for clear in MADE_OF_MODELS:
        clear()


def forget() -> None:
    """Everything that was loaded."""
    release_models()
    _task.cache_clear()


_LOADED: dict[tuple, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
MADE_OF_MODELS: list[Callable[[], None]] = []  # clear caches of what may hold a model
