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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.export.lora import Lora, max_lora_rank, save_lora
from austeer.plan import Plan
from eval.answering.answer_file import Answer
from eval.answering.answerer import Answerer, Generation
from experiments.engines.vllm_engine import VLLMEngine

SLOTS = 16  # adapters that run at once; more take turns
AT_ONCE = 1024  # prompts per call of the engine: as many as a killed run loses
LEAST_RANK = 16  # so that the engine that unsteered cells start also serves most grids


@contextmanager
def vllm_answerer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plans_of_rows: Sequence[Plan | None]
) -> Iterator[VLLMAnswerer]:
    """Answer prompts with vLLM, the i-th under the i-th plan; the adapters live as long as this context."""
    with TemporaryDirectory(prefix="austeer-") as folder:
        yield VLLMAnswerer(model, tokenizer, plans_of_rows, Path(folder))


def adapters_code() -> tuple:
    """Return the roots of the code that turns plans into adapters and answers with vLLM."""
    return VLLMAnswerer, VLLMEngine, save_lora


class VLLMAnswerer(Answerer):
    """Answer with vLLM; write the adapters and start the engine when the first prompts come."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plans_of_rows: Sequence[Plan | None],
        folder: Path,
    ):
        super().__init__(model, tokenizer)
        self.plans_of_rows, self.folder = plans_of_rows, folder

    def batches(
        self, prompts: Sequence[str], generation: Generation, batch_size: int | None
    ) -> tuple[list[list[int]], Callable[[list[int]], list[Answer]]]:
        order = list(range(len(prompts)))
        rank = max((lora.rank for lora in self._adapters.values() if lora), default=1)

        def run(batch: list[int]) -> list[Answer]:
            loras = [self._adapters[id(self.plans_of_rows[index])] for index in batch]
            folders = [lora and lora.folder for lora in loras]
            return _engine(self.model, rank).answers([prompts[index] for index in batch], generation, folders)

        return [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)], run

    def receipt(self) -> dict[str, int]:
        """Return the largest rank of the adapters, and the number of modules they change."""
        loras = [lora for lora in self._adapters.values() if lora]
        return {"rank": max((one.rank for one in loras), default=0), "modules": sum(len(one.modules) for one in loras)}

    @cached_property
    def _adapters(self) -> dict[int, Lora | None]:
        """Return the adapter of each plan by the plan's id; None for a plan that does nothing."""
        plans = {id(plan): plan for plan in self.plans_of_rows}
        adapters = {
            key: save_lora(self.model, plan, self.folder / str(number)) if plan is not None and _acts(plan) else None
            for number, (key, plan) in enumerate(plans.items())
        }
        for adapter in filter(None, adapters.values()):
            adapter.check_for_vllm()
        return adapters


def _acts(plan: Plan) -> bool:
    return any(bool(values.any()) for values in (*plan.scales.values(), *plan.shifts.values()))


_ENGINES: dict[tuple[str, str], VLLMEngine] = {}


def _engine(model: PreTrainedModel, rank: int) -> VLLMEngine:
    """Return the model's engine. Only one runs at a time, and a higher rank starts it anew."""
    name = model.config.name_or_path, str(model.dtype).removeprefix("torch.")
    if name not in _ENGINES or _ENGINES[name].max_lora_rank < rank:
        stop()
        room = {}
        if torch.cuda.is_available():  # beside the loaded model
            free, total = torch.cuda.mem_get_info()
            room["gpu_memory_utilization"] = 0.9 * free / total
        _ENGINES[name] = VLLMEngine(
            name[0], max_loras=SLOTS, max_lora_rank=max_lora_rank(max(rank, LEAST_RANK)), dtype=name[1], **room
        )
    return _ENGINES[name]


def stop() -> None:
    for engine in _ENGINES.values():
        engine.stop()
    _ENGINES.clear()
