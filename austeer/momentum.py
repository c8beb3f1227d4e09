"""The two momenta of an atomic unit over contrastive pairs, as running sums on the device.

activation (paper, section 4.1): m = x(positive) - x(negative) at the last token. Its signs are counted
    over the pairs; the score is the larger share, signed.
causal (ours, docs/sign.md): c = d log sigmoid(M) / d g, where M is the log-odds of the right answer
    over the wrong one and the AU is scaled by (1 + g) at every position. One backward pass to the gates.
    The score is the t statistic of c over the pairs, the direction its sign.

Sums add up, so any batching, any order and any number of processes give the same ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.forward import PairTexts, input_device
from austeer.tokens import EncodedPair, Protocol
from rmodels import gates


class Momentum(ABC):
    """What both momenta share: named sums of shape (layers, width) per site."""

    SUMS: dict[str, torch.dtype]

    def __init__(self, model: PreTrainedModel, sites: Sequence[str], protocol: Protocol):
        self.model, self.sites, self.protocol = model, sites, protocol
        self.sums = {
            site: {
                name: [torch.zeros(gate.width, dtype=dtype, device=input_device(model)) for gate in gates(model, site)]
                for name, dtype in self.SUMS.items()
            }
            for site in sites
        }
        self.not_finite = torch.zeros((), dtype=torch.int64, device=input_device(model))  # read once, at the end

    @abstractmethod
    def add(self, batch: Sequence[EncodedPair]) -> None:
        """Run one batch of pairs. Sums change only once everything has been computed."""

    def _note_not_finite(self, values: Tensor) -> None:
        self.not_finite += (~torch.isfinite(values)).sum().to(self.not_finite.device)

    def _accumulate(self, site: str, name: str, layer: int, values: Tensor) -> None:
        total = self.sums[site][name][layer]
        total += values.to(total)

    def stats(self, site: str) -> dict[str, Tensor]:
        return {name: torch.stack(rows) for name, rows in self.sums[site].items()}


class ActivationMomentum(Momentum):
    # the last two serve the ablations: activation difference, fixed vector, sign-aware strength
    SUMS = {
        "positive": torch.int32,
        "negative": torch.int32,
        "sum_momentum": torch.float64,
        "sum_activation": torch.float64,
    }

    @torch.inference_mode()
    def add(self, batch: Sequence[EncodedPair]) -> None:
        for (site, layer), last in self._last_activations(batch).items():
            self._note_not_finite(last)
            momentum = last[0::2] - last[1::2]
            # in the authors' float16, overflow counts by its sign and inf - inf as zero
            signs = last[0::2].half() - last[1::2].half() if self.protocol.round_to_half else momentum
            self._accumulate(site, "positive", layer, (signs > 0).sum(0))
            self._accumulate(site, "negative", layer, (signs < 0).sum(0))
            self._accumulate(site, "sum_momentum", layer, momentum.sum(0, dtype=torch.float64))
            self._accumulate(site, "sum_activation", layer, last[0::2].sum(0, dtype=torch.float64))

    def _last_activations(self, batch: Sequence[EncodedPair]) -> dict[tuple[str, int], Tensor]:
        """(2 * pairs, width) by site and layer, at the last token of each text."""
        texts = PairTexts(self.model, batch, logits=False)
        seen: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

        def keep(gate):
            def tap(x: Tensor) -> Tensor:
                last = texts.last.to(x.device)
                seen[gate.site, gate.layer].append(x[torch.arange(len(last), device=x.device), last])  # a copy
                return x

            return tap

        with tapped(self.model, self.sites, keep):
            texts.run_tails([tail for pair in batch for tail in (pair.positive, pair.negative)])
        return {place: torch.cat(rows) for place, rows in seen.items()}


class CausalMomentum(Momentum):
    SUMS = {"sum": torch.float64, "sum_squares": torch.float64}

    def add(self, batch: Sequence[EncodedPair]) -> None:
        for (site, layer), values in self.effects(batch).items():
            self._note_not_finite(values)
            self._accumulate(site, "sum", layer, values.sum(0))
            self._accumulate(site, "sum_squares", layer, values.square().sum(0))

    @torch.enable_grad()
    def effects(self, batch: Sequence[EncodedPair]) -> dict[tuple[str, int], Tensor]:
        """c of every pair and AU, (pairs, width) by site and layer."""
        probes: dict[tuple[str, int], Tensor] = {}

        def probe(gate):
            def tap(x: Tensor) -> Tensor:
                key = (gate.site, gate.layer)
                if key not in probes:
                    probes[key] = x.new_zeros(len(batch), 1, gate.width, requires_grad=True)
                each = len(x) // len(batch)  # 1 for the prompts, 2 for right and wrong answers behind them
                return x + x * probes[key].repeat_interleave(each, 0)

            return tap

        with tapped(self.model, self.sites, probe):
            log_odds = PairTexts(self.model, batch, logits=True).log_odds()
        # rows are independent, so one backward pass of the sum gives every pair its own gradient
        gradients = torch.autograd.grad(log_odds.sum(), list(probes.values()))
        weight = torch.sigmoid(-log_odds.detach().double())  # d log sigmoid(M) / d M: it would underflow in float16
        return {
            place: gradient[:, 0].double() * weight[:, None].to(gradient.device)
            for place, gradient in zip(probes, gradients, strict=True)
        }


MOMENTA: dict[str, type[Momentum]] = {"activation": ActivationMomentum, "causal": CausalMomentum}


@contextmanager
def tapped(model: PreTrainedModel, sites: Sequence[str], make_tap):
    """Look at (or through) every gate of the given sites for the length of a `with`."""
    with ExitStack() as undo:
        for site in sites:
            for gate in gates(model, site):
                gate.tap = make_tap(gate)
                undo.callback(setattr, gate, "tap", None)
        yield
