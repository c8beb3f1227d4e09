"""The two momenta of an atomic unit over contrastive pairs, as running sums on the device.

activation (paper, section 4.1): m = x(positive) - x(negative) at the last token. Its signs are counted
    over the pairs; the score is the larger share, signed.
causal (ours, docs/sign.md): c = d log sigmoid(M) / d g, where M is the log-odds of the right answer
    over the wrong one and the AU is scaled by (1 + g) at every position. One backward pass to the gates.
    The score is the t statistic of c over the pairs, the direction its sign.

Sums add up, so any batching, any order and any number of processes give the same ranks.
"""

from __future__ import annotations

from collections import defaultdict
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
        for (site, layer), last in self._last_activations(batch).items():
            positive, negative = last[0::2], last[1::2]
            momentum = positive - negative
            self._note_not_finite(momentum)
            self._accumulate(site, "positive", layer, (momentum > 0).sum(0))
            self._accumulate(site, "negative", layer, (momentum < 0).sum(0))
            self._accumulate(site, "sum_momentum", layer, momentum.sum(0, dtype=torch.float64))
            self._accumulate(site, "sum_activation", layer, positive.sum(0, dtype=torch.float64))

    def _last_activations(self, batch: Sequence[EncodedPair]) -> dict[tuple[str, int], Tensor]:
        """(2 * pairs, width) by site and layer, at the last token of each text."""
        texts = PairTexts(self.model, batch, logits=False)
        seen: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

        def keep(gate):
            def tap(x: Tensor) -> Tensor:
                last = texts.last.to(x.device)
                values = x[torch.arange(len(last), device=x.device), last]  # a copy: x itself is freed
                seen[gate.site, gate.layer].append(values.half() if self.protocol.round_to_half else values)
                return x

            return tap

        with tapped(self.model, self.sites, keep):
            texts.run_tails([tail for pair in batch for tail in (pair.positive, pair.negative)])
        return {place: torch.cat(rows) for place, rows in seen.items()}


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
                each = len(x) // len(batch)  # 1 for the prompts, 2 for right and wrong answers behind them
                return x + x * probes[key].repeat_interleave(each, 0)

            return tap

        with tapped(self.model, self.sites, probe):
            log_odds = PairTexts(self.model, batch, logits=True).log_odds()
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


class PairTexts:
    """The texts of a batch of pairs: what each pair shares is run once, at once; then the tails on its cache.

    Rows of tails are right, wrong, right, wrong, ... Pairs that share nothing are run text by text.
    """

    def __init__(self, model: PreTrainedModel, batch: Sequence[EncodedPair], logits: bool):
        self.model, self.device, self.batch = model, _device(model), batch
        self.lengths = torch.tensor([len(pair.prefix) for pair in batch])
        width = int(self.lengths.max())
        self.cache: DynamicCache | None = None
        if not width:
            return
        # a cache without a config keeps every position, also those that left a sliding window: its mask
        # still applies, and padding makes the rows' windows differ
        self.cache = DynamicCache()
        padded = [(0,) * (width - len(pair.prefix)) + pair.prefix for pair in batch]
        columns = torch.arange(width) - (width - self.lengths)[:, None]  # negative on padding
        self.mask = (columns >= 0).long() if (columns < 0).any() else None
        out = self._forward(padded, columns.clamp(min=0), self.mask, keep=1 if logits else None)
        self.prompt_logits = out.logits if logits else None  # (batch, 1, vocabulary)
        self.cache.batch_repeat_interleave(2)

    def run_tails(self, tails: list[tuple[int, ...]], keep: int | None = None):
        """Run the tails behind their prompts, right-padded."""
        if self.cache is None:
            for tail in tails:
                self.last = torch.tensor([len(tail) - 1])
                self._forward([tail], torch.arange(len(tail))[None], None, keep)
            return None
        self.last = torch.tensor([len(tail) - 1 for tail in tails])
        width = max(map(len, tails))
        padded = [tail + (0,) * (width - len(tail)) for tail in tails]
        positions = self.lengths.repeat_interleave(2)[:, None] + torch.arange(width)
        mask = None
        if self.mask is not None:
            mask = torch.cat([self.mask.repeat_interleave(2, 0), self.mask.new_ones(len(tails), width)], dim=1)
        return self._forward(padded, positions, mask, keep)

    def log_odds(self) -> Tensor:
        """log p(right | prompt) - log p(wrong | prompt), (pairs,).

        The last token of a tail is never run: for one-token answers the prompt is all there is.
        """
        tails = [tail for pair in self.batch for tail in (pair.positive, pair.negative)]
        logits = self.prompt_logits.repeat_interleave(2, 0)
        if any(len(tail) > 1 for tail in tails):
            behind = self.run_tails([tail[:-1] or (0,) for tail in tails], keep=0)
            logits = torch.cat([logits, behind.logits], dim=1)
        width = max(map(len, tails))
        wanted = torch.tensor([list(tail) + [-1] * (width - len(tail)) for tail in tails], device=logits.device)
        chosen = logits[:, :width].float().log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])
        log_probability = (chosen[..., 0] * (wanted >= 0)).sum(1)
        return log_probability[0::2] - log_probability[1::2]

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
