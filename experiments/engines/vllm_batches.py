"""Words by vLLM in place of the model, for a comparison: every plan is an adapter, and a whole grid of them one batch.

Only answers come from there. Ranks, likelihoods and perplexities are the loaded model's, steered live.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from austeer import processes as shared_work
from austeer.errors import AUSteerError
from austeer.export.lora import Lora, max_lora_rank, save_lora
from austeer.plan import Plan
from eval.answering.answer_file import Answer
from eval.answering.answers import Engine, Question
from experiments.engines.vllm_engine import VLLMEngine, installed

LIVE = "live"
ENGINES = (LIVE, "vllm")
SLOTS = 16  # adapters that run at once; more take turns
LEAST_RANK = 16  # so that the unsteered cells' engine takes most grids, too
ADAPTER_FILES = (
    "experiments/engines/vllm_batches.py", "experiments/engines/vllm_engine.py", "austeer/export/adapter.py", "austeer/export/checkpoint.py", "austeer/export/lora.py"
)  # fmt: skip


def engine_name(engine: str) -> str:
    """As a record says it: another version, or other adapters, are another question."""
    if engine == LIVE:
        return LIVE
    code = b"".join((Path(__file__).parents[2] / name).read_bytes() for name in ADAPTER_FILES)
    return f"{installed()}, adapters {hashlib.sha256(code).hexdigest()[:8]}"


def check(engine: str, device: str | None, **asked: object) -> None:
    """asked: by its option, what an engine cannot do beside."""
    if engine == LIVE:
        return
    engine_name(engine)  # is it installed?
    unfit = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value]
    unfit += [] if shared_work.alone() else ["accelerate launch"]
    unfit += [f"--device {device} (but CUDA_VISIBLE_DEVICES)"] if ":" in (device or "") else []
    if unfit:
        raise AUSteerError(
            f"leave out {', '.join(unfit)}: --engine {engine} answers in words only, in batches of its own and in one process"
        )


@contextmanager
def served(model: PreTrainedModel, plans: Sequence[Plan | None], items: int) -> Iterator[Served]:
    """For answers to `items` items under the first plan, then under the second, ...: what to ask in the model's place."""
    with TemporaryDirectory(prefix="austeer-") as folder:
        yield Served(model, plans, items, Path(folder))


class Served(Engine):
    """A model that vLLM speaks for. Adapters are written, and vLLM is started, when there is something to say."""

    def __init__(self, model: PreTrainedModel, plans: Sequence[Plan | None], items: int, folder: Path):
        self.model, self.plans, self.items, self.folder = model, plans, items, folder

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, *args, **settings):
        return self.model(*args, **settings)

    def speak(self, prompts: Sequence[str], which: Sequence[int], question: Question) -> list[Answer]:
        rank = max((made.rank for made in self._adapters if made), default=1)
        named = [one and one.folder for one in (self._adapters[index // self.items] for index in which)]
        return _engine(self.model, rank).answers([prompts[index] for index in which], question, named)

    def receipt(self) -> dict[str, int]:
        """Of the adapters, once they were used: the largest rank, and how many modules they change."""
        made = [one for one in self._adapters if one]
        return {"rank": max((one.rank for one in made), default=0), "modules": sum(len(one.modules) for one in made)}

    @cached_property
    def _adapters(self) -> list[Lora | None]:
        """One for each plan, None where nothing is done."""
        return [
            save_lora(self.model, plan, self.folder / str(number)) if plan is not None and _acts(plan) else None
            for number, plan in enumerate(self.plans)
        ]


def _acts(plan: Plan) -> bool:
    return any(bool(values.any()) for values in (*plan.scales.values(), *plan.shifts.values()))


_RUNNING: dict[tuple[str, str], VLLMEngine] = {}


def _engine(model: PreTrainedModel, rank: int) -> VLLMEngine:
    """One runs at a time; it is started anew for a higher rank."""
    of = model.config.name_or_path, str(model.dtype).removeprefix("torch.")
    if of not in _RUNNING or _RUNNING[of].max_lora_rank < rank:
        stop()
        room = {}
        if torch.cuda.is_available():  # beside the loaded model
            free, total = torch.cuda.mem_get_info()
            room["gpu_memory_utilization"] = 0.9 * free / total
        _RUNNING[of] = VLLMEngine(
            of[0], max_loras=SLOTS, max_lora_rank=max_lora_rank(max(rank, LEAST_RANK)), dtype=of[1], **room
        )
    return _RUNNING[of]


def stop() -> None:
    for engine in _RUNNING.values():
        engine.stop()
    _RUNNING.clear()
