"""Run calibration texts through the decoder blocks, one block at a time, and sum over the inputs of its Linears.

A caller may change a block while it has it: the next block's inputs come from the changed one, as Wanda's and
SparseGPT's authors do it. Only hidden states between two blocks are kept, and sums; no input of a Linear is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from austeer.batching import grouped
from austeer.errors import AUSteerError
from austeer.forward import float64_device, input_device
from rmodels import decoder_layers

TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Block:
    """Hold a decoder block, its Linears by name, and the calibration texts as hidden states at its input."""

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    texts: list[_Text]

    def norms(self) -> dict[str, Tensor]:
        """Return ||x|| for each Linear: the L2 norm of every input feature over all tokens."""
        squares = self._sums(lambda x: x.square().sum(0))
        return {name: total.sqrt().float().to(self.linears[name].weight.device) for name, total in squares.items()}

    def grams(self) -> dict[str, Tensor]:
        """Return X^T X for each Linear, float64 (inputs, inputs); X has a row per token."""
        return self._sums(lambda x: x.T @ x)

    def _sums(self, term: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        sums = {}
        with ExitStack() as undo:
            for name, linear in self.linears.items():
                device = float64_device(linear.weight.device)
                sums[name] = term(torch.zeros(1, linear.in_features, dtype=torch.float64, device=device))

                def add(linear, args, total=sums[name]):
                    total += term(args[0].to(total.device).double().flatten(0, -2))

                undo.callback(linear.register_forward_pre_hook(add).remove)
            for text in self.texts:
                text.run(self.module, self.index)
        if not all(torch.isfinite(total).all() for total in sums.values()):
            raise AUSteerError(
                "activations are inf or nan on the calibration texts; load the model in bfloat16 or float32"
            )
        return sums


def linears_of(model: PreTrainedModel) -> list[dict[str, nn.Linear]]:
    """Return the Linears of every decoder block by name, such as layers.3.mlp.up_proj."""
    return [
        {f"layers.{index}.{name}": part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
        for index, block in enumerate(decoder_layers(model))
    ]


@torch.no_grad()
def through_blocks(model: PreTrainedModel, calibration: Sequence[Sequence[int]], what: str) -> Iterator[Block]:
    """Yield the blocks in order. calibration: texts as token ids; what: the title of the progress bar."""
    calibration = [ids for ids in calibration if ids]
    if not calibration:
        raise AUSteerError(f"{what} needs calibration texts that are not empty")
    texts = [_Text.catch(model, [calibration[index] for index in batch]) for batch in same_length_batches(calibration)]
    bar = tqdm(linears_of(model), desc=what, unit="block", leave=False)
    for index, (block, linears) in enumerate(zip(decoder_layers(model), bar, strict=True)):
        yield Block(index, block, linears, texts)
        for text in texts:
            text.hidden = text.run(block, index)


def same_length_batches(texts: Sequence[Sequence[int]], tokens: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Group the indices of texts of equal length. They need no padding, which would count in a sum or a norm."""

    def fits(batch: list[int]) -> bool:
        first, last = len(texts[batch[0]]), len(texts[batch[-1]])
        return first == last and len(batch) * last <= tokens

    return grouped(sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True), fits)


class _Text:
    """Hold a batch of texts between two blocks: its hidden states, and the other arguments of every block."""

    def __init__(self, hidden: Tensor, arguments: list[tuple[tuple, dict]]):
        self.hidden, self.arguments = hidden, arguments

    @classmethod
    def catch(cls, model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> _Text:
        """Run the model once, to see how its own forward calls each block (masks differ between blocks)."""
        hidden: list[Tensor] = []
        arguments: list[tuple[tuple, dict]] = []

        def record(block, args, kwargs):
            hidden.append(args[0]) if not hidden else None
            arguments.append((args[1:], kwargs))

        with ExitStack() as undo:
            for block in decoder_layers(model):
                undo.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
            model.base_model(input_ids=torch.tensor(batch, device=input_device(model)), use_cache=False)
        return cls(hidden[0], arguments)

    def run(self, block: nn.Module, index: int) -> Tensor:
        args, kwargs = self.arguments[index]
        out = block(self.hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out
