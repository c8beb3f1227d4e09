"""Train on pairs by gradient descent: the loop that all trained methods share, and the tempered objective."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.batching import pair_batches
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import PairTexts, Tap, tapped
from austeer.pairs import Pair
from austeer.temperature import fit
from austeer.tokens import EncodedPair
from rmodels import AUGate


@torch.enable_grad()
def descend(
    evidence: Evidence,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Sequence[EncodedPair]], Tensor],
    *,
    epochs: int,
    pairs_per_step: int,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Take a step for every `pairs_per_step` pairs, in an order that the evidence's seed shuffles anew for each epoch.

    loss: the sum over a batch of pairs; a step descends its mean. penalty: what is added to that mean.
    """
    pairs, shuffle = evidence.encoded(), random.Random(evidence.seed)
    for _ in range(epochs):
        shuffle.shuffle(pairs)
        for start in range(0, len(pairs), pairs_per_step):
            step = pairs[start : start + pairs_per_step]
            optimizer.zero_grad()
            for batch in pair_batches(step, evidence.model.device):  # as many as fit in memory; gradients add up
                loss(batch).div(len(step)).backward()
            if penalty is not None:
                penalty().backward()
            optimizer.step()


def scaled(
    model: PreTrainedModel, sites: Sequence[str], scale: Mapping[tuple[str, int], Tensor]
) -> AbstractContextManager[None]:
    """Scale activations, x -> x + x g, inside a `with`: `scale` holds g by (site, layer), and gradients reach it."""

    def multiply(gate: AUGate) -> Tap:
        return lambda x: x + x * gate.align(scale[gate.site, gate.layer].to(x))

    return tapped(model, sites, multiply)


def check_finite(evidence: Evidence, trained: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(values).all() for values in trained):
        raise AUSteerError(f"training overflowed in {evidence.model.dtype}; load the model in bfloat16 or float32")


class TemperedLoss:
    """Return the sum over pairs of -log sigmoid((M - offset) / tau), tau and the offsets fitted to the unsteered model."""

    def __init__(self, evidence: Evidence):
        self.model, self.pairs = evidence.model, evidence.pairs
        with torch.inference_mode():
            log_odds = evidence.per_pair(lambda batch: self._log_odds(batch).cpu(), "log-odds")
        self.temperature = fit(log_odds, self._texts(evidence.encoded()))

    def __call__(self, batch: Sequence[EncodedPair]) -> Tensor:
        return -self.temperature.objective(self._log_odds(batch), self._texts(batch)).sum()

    def _texts(self, batch: Sequence[EncodedPair]) -> list[Pair]:
        return [self.pairs[pair.index] for pair in batch]

    def _log_odds(self, batch: Sequence[EncodedPair]) -> Tensor:
        return PairTexts(self.model, batch, logits=True).log_odds()
