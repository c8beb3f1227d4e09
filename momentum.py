"""The two momenta of an atomic unit over contrastive pairs, as running sums on the device.

activation (paper, section 4.1): m = x(positive) - x(negative) at the last token. Its signs are counted
    over the pairs; the score is the larger share, signed.
causal (ours, docs/sign.md): c = d log sigmoid(M) / d g, where M is the log-odds of the right answer
    over the wrong one and the AU is scaled by (1 + g) at every position. One backward pass to the gates.
    The score is the t statistic of c over the pairs, the direction its sign.

Sums add up, so any batching, any order and any number of processes give the same ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from encoding import EncodedPair, Protocol
from rmodels import gates


class Momentum:
    """What both momenta share: named sums of shape (layers, width) per site."""

    SUMS: dict[str, torch.dtype]

    def __init__(self, model: PreTrainedModel, sites: Sequence[str], protocol: Protocol):
        self.model, self.sites, self.protocol = model, sites, protocol
        self.sums = {
            site: {
                name: [torch.zeros(gate.width, dtype=dtype, device=_device(model)) for gate in gates(model, site)]
                for name, dtype in self.SUMS.items()
            }
            for site in sites
        }
        self.not_finite = torch.zeros((), dtype=torch.int64, device=_device(model))  # read once, at the end

    def add(self, batch: Sequence[EncodedPair]) -> None:
        """Run one batch of pairs. Sums change only once everything has been computed."""
        raise NotImplementedError

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
        prompt = _Prompt(self.model, [pair.prefix for pair in batch], logits=False)
        right = self._last_activations(prompt, [pair.positive for pair in batch])
        wrong = self._last_activations(prompt, [pair.negative for pair in batch])
        for (site, layer), positive in right.items():
            negative = wrong[site, layer]
            momentum = positive - negative
            self._note_not_finite(momentum)
            self._accumulate(site, "positive", layer, (momentum > 0).sum(0))
            self._accumulate(site, "negative", layer, (momentum < 0).sum(0))
            self._accumulate(site, "sum_momentum", layer, momentum.sum(0, dtype=torch.float64))
            self._accumulate(site, "sum_activation", layer, positive.sum(0, dtype=torch.float64))

    def _last_activations(self, prompt: _Prompt, tails: list[tuple[int, ...]]) -> dict[tuple[str, int], Tensor]:
        last = torch.tensor([len(tail) - 1 for tail in tails])
        rows = torch.arange(len(tails))
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(gate):
            def tap(x: Tensor) -> Tensor:
                values = x[rows.to(x.device), last.to(x.device)]  # (batch, width): a copy, x itself is freed
                seen[gate.site, gate.layer] = values.half() if self.protocol.round_to_half else values
                return x

            return tap

        with tapped(self.model, self.sites, keep):
            prompt.run(tails)
        return seen


class CausalMomentum(Momentum):
    SUMS = {"sum": torch.float64, "sum_squares": torch.float64}

    @torch.enable_grad()
    def add(self, batch: Sequence[EncodedPair]) -> None:
        probes: dict[tuple[str, int], Tensor] = {}

        def probe(gate):
            def tap(x: Tensor) -> Tensor:
                key = (gate.site, gate.layer)
                if key not in probes:
                    probes[key] = x.new_zeros(len(batch), 1, gate.width, requires_grad=True)
                return x + x * probes[key]

            return tap

        with tapped(self.model, self.sites, probe):
            prompt = _Prompt(self.model, [pair.prefix for pair in batch], logits=True)
            log_odds = prompt.log_probability([pair.positive for pair in batch])
            log_odds = log_odds - prompt.log_probability([pair.negative for pair in batch])
        # rows are independent, so one backward pass of the sum gives every pair its own gradient
        gradients = torch.autograd.grad(nn.functional.logsigmoid(log_odds).sum(), list(probes.values()))
        for (site, layer), gradient in zip(probes, gradients, strict=True):
            values = gradient[:, 0].double()
            self._note_not_finite(values)
            self._accumulate(site, "sum", layer, values.sum(0))
            self._accumulate(site, "sum_squares", layer, values.square().sum(0))


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


class _Prompt:
    """What the pairs of a batch share, run once; then any number of tails on its cache."""

    def __init__(self, model: PreTrainedModel, prefixes: list[tuple[int, ...]], logits: bool):
        self.model, self.device = model, _device(model)
        self.lengths = torch.tensor([len(prefix) for prefix in prefixes])
        self.width = int(self.lengths.max())
        self.cache = None
        if not self.width:
            return  # nothing is shared: every tail is a whole text
        # a cache without a config keeps every position, also of sliding-window layers (whose mask still
        # applies): only so can a tail be taken back
        self.cache = DynamicCache()
        padded = [(0,) * (self.width - len(prefix)) + prefix for prefix in prefixes]
        columns = torch.arange(self.width) - (self.width - self.lengths)[:, None]  # negative on padding
        self.mask = (columns >= 0).long() if (columns < 0).any() else None
        out = self._forward(padded, columns.clamp(min=0), self.mask, keep=1 if logits else None)
        self.last_logits = out.logits if logits else None  # (batch, 1, vocabulary)

    def run(self, tails: list[tuple[int, ...]], keep: int | None = None):
        """Run the tails behind the prompt, right-padded, and leave the cache as it was."""
        width = max(map(len, tails))
        padded = [tail + (0,) * (width - len(tail)) for tail in tails]
        mask = None
        if self.cache is not None and self.mask is not None:
            mask = torch.cat([self.mask, self.mask.new_ones(len(tails), width)], dim=1)
        out = self._forward(padded, self.lengths[:, None] + torch.arange(width), mask, keep)
        if self.cache is not None:
            self.cache.crop(-width)
        return out

    def log_probability(self, tails: list[tuple[int, ...]]) -> Tensor:
        """log p(tail | prompt), (batch,). A tail's last token is never run: one-token answers cost nothing."""
        logits = self.last_logits
        if any(len(tail) > 1 for tail in tails):
            behind = self.run([tail[:-1] or (0,) for tail in tails], keep=0)
            logits = torch.cat([logits, behind.logits], dim=1)
        width = max(map(len, tails))
        wanted = torch.tensor([list(tail) + [-1] * (width - len(tail)) for tail in tails], device=logits.device)
        chosen = logits[:, :width].float().log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])
        return (chosen[..., 0] * (wanted >= 0)).sum(1)

    def _forward(self, ids: list[tuple[int, ...]], positions: Tensor, mask: Tensor | None, keep: int | None):
        """keep: how many of the last positions get logits, 0 for all; None leaves the LM head out."""
        run, extra = (self.model.base_model, {}) if keep is None else (self.model, {"logits_to_keep": keep})
        return run(
            input_ids=torch.tensor(ids, device=self.device),
            position_ids=positions.to(self.device),
            attention_mask=None if mask is None else mask.to(self.device),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            **extra,
        )


def _device(model: PreTrainedModel) -> torch.device:
    return model.get_input_embeddings().weight.device
