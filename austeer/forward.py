"""Run the texts of pairs on a model, and read or change activations at the gates meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from austeer.errors import AUSteerError
from austeer.tokens import EncodedPair
from rmodels import AUGate, continues_on_caches, gates, without_head

Tap = Callable[[Tensor], Tensor]


@contextmanager
def tapped(model: PreTrainedModel, sites: Sequence[str], make_tap: Callable[[AUGate], Tap | None]) -> Iterator[None]:
    """Pass the activations at every gate of these sites through `make_tap(gate)` for the length of a `with`."""
    with ExitStack() as undo:
        for site in sites:
            for gate in gates(model, site):
                gate.tap = make_tap(gate)
                undo.callback(setattr, gate, "tap", None)
        yield


@contextmanager
def read_at(
    model: PreTrainedModel, sites: Sequence[str], read: Callable[[Tensor], Tensor]
) -> Iterator[dict[tuple[str, int], list[Tensor]]]:
    """Collect `read(activations)` of every forward inside the `with`, by (site, layer)."""
    collected: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def look(gate: AUGate) -> Tap:
        def tap(x: Tensor) -> Tensor:
            collected[gate.site, gate.layer].append(read(gate.dense(x)))
            return x

        return tap

    with tapped(model, sites, look):
        yield collected


def stack_layers(by_layer: Mapping[int, Tensor], layers: int, dim: int = 0) -> Tensor:
    """Stack what layers hold, (..., width), along `dim`; zeros fill up narrower layers and those that hold nothing."""
    widest = max(by_layer.values(), key=lambda rows: rows.shape[-1])
    rows = [by_layer.get(layer, widest[..., :0]) for layer in range(layers)]
    return torch.stack([functional.pad(row, (0, widest.shape[-1] - row.shape[-1])) for row in rows], dim)


@contextmanager
def probed(
    model: PreTrainedModel, sites: Sequence[str], n: int, change: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Give each of n texts (or pairs of texts) parameters of its own at every AU, zero now, to take derivatives by.

    They come by (site, layer), each (n, 1, width), once a forward has passed the gates. change(x, p) applies p to the
    activations: x + x * p is a gate, x + p a shift.
    """
    probes: dict[tuple[str, int], Tensor] = {}

    def probe(gate: AUGate) -> Tap:
        def tap(x: Tensor) -> Tensor:
            place = gate.site, gate.layer
            if place not in probes:
                probes[place] = x.new_zeros(n, 1, gate.width, requires_grad=True)
            rows = gate.rows(x) // n  # 1 for the prompts of pairs, 2 for right and wrong answers after them
            return change(x, gate.align(probes[place].repeat_interleave(rows, 0)))

        return tap

    with torch.enable_grad(), tapped(model, sites, probe):
        yield probes


def log_odds_and_gradients(
    model: PreTrainedModel,
    sites: Sequence[str],
    batch: Sequence[EncodedPair],
    change: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Return every pair's log-odds M, and by (site, layer) dM / dp of every AU, (pairs, width), at p = 0."""
    with probed(model, sites, len(batch), change) as probes:
        log_odds = PairTexts(model, batch, logits=True).log_odds()
    # rows are independent, so one backward pass of the sum gives every pair its own gradient
    gradients = torch.autograd.grad(log_odds.sum(), list(probes.values()))
    return log_odds.detach(), {place: gradient[:, 0] for place, gradient in zip(probes, gradients, strict=True)}


class PairTexts:
    """Run the shared prefixes of a batch of pairs once and together, then both tails of every pair on their cache.

    Rows of tails are right, wrong, right, wrong, ... Pairs that share nothing are run text by text, and where a model
    cannot continue on repeated caches, whole texts are run together, padded on the right, where no token sees it.
    """

    def __init__(self, model: PreTrainedModel, batch: Sequence[EncodedPair], logits: bool, whole: bool = False):
        """Run the prompts. logits: whether likelihoods will be asked for. whole: run whole texts, without a cache."""
        self.model, self.device, self.batch = model, input_device(model), batch
        self.lengths = torch.tensor([len(pair.prefix) for pair in batch])
        width = int(self.lengths.max())
        self.cache: DynamicCache | None = None
        self.whole = bool(width) and (whole or not continues_on_caches(model))
        if not width or self.whole:
            return
        # without a config no layer drops what left its sliding window (the mask still hides it): rows can be repeated
        self.cache = DynamicCache()
        padded = [(0,) * (width - len(pair.prefix)) + pair.prefix for pair in batch]
        columns = torch.arange(width) - (width - self.lengths)[:, None]  # negative on padding
        self.mask = (columns >= 0).long() if (columns < 0).any() else None
        out = self._forward(padded, columns.clamp(min=0), self.mask, keep=1 if logits else None)
        self.prompt_logits = out.logits if logits else None  # (batch, 1, vocabulary)
        self.cache.batch_repeat_interleave(2)

    def run_tails(self, tails: list[tuple[int, ...]], keep: int | None = None):
        """Run the tails after their prompts, right-padded. `first` and `last` say in which columns they begin and end."""
        prompts = [pair.prefix if self.whole else () for pair in self.batch for _ in range(2)]
        if self.cache is None and not self.whole:
            self.first = torch.tensor([0])
            for tail in tails:
                self.last = torch.tensor([len(tail) - 1])
                self._forward([tail], torch.arange(len(tail))[None], None, keep)
            return None
        self.first = torch.tensor([len(prompt) for prompt in prompts])
        self.last = self.first + torch.tensor([len(tail) - 1 for tail in tails])
        rows = [prompt + tail for prompt, tail in zip(prompts, tails, strict=True)]
        width = max(map(len, rows))
        padded = [row + (0,) * (width - len(row)) for row in rows]
        if self.whole:
            return self._forward(padded, None, None, keep)
        positions = self.lengths.repeat_interleave(2)[:, None] + torch.arange(width)
        mask = None
        if self.mask is not None:
            mask = torch.cat([self.mask.repeat_interleave(2, 0), self.mask.new_ones(len(tails), width)], dim=1)
        return self._forward(padded, positions, mask, keep)

    def log_odds(self) -> Tensor:
        """Return log p(right | prompt) - log p(wrong | prompt), (pairs,)."""
        log_probability = self.log_probabilities()
        return log_probability[0::2] - log_probability[1::2]

    def log_probabilities(self) -> Tensor:
        """Return the log-probability of each tail after its prompt: right, wrong, right, wrong, ...

        The last token of a tail is never run: for one-token answers the prompt alone is enough.
        """
        if not self.lengths.all():
            raise AUSteerError("the log-odds of a pair need a prompt, but the two texts of some pair share no token")
        tails = [tail for pair in self.batch for tail in (pair.positive, pair.negative)]
        logits = self._logits_of_tails(tails)
        width = max(map(len, tails))
        targets = torch.tensor([list(tail) + [-1] * (width - len(tail)) for tail in tails], device=logits.device)
        by_token = logits[:, :width].float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])
        return (by_token[..., 0] * (targets >= 0)).sum(1)

    def _logits_of_tails(self, tails: list[tuple[int, ...]]) -> Tensor:
        """Return what predicts each token of each tail, (tails, longest tail, vocabulary)."""
        if self.whole:
            width = max(pair.length for pair in self.batch) - 1
            logits = self.run_tails([tail[:-1] for tail in tails], keep=width - int(self.lengths.min()) + 1).logits
            columns = self.first[:, None] - 1 - (width - logits.shape[1]) + torch.arange(max(map(len, tails)))
            columns = columns.clamp(max=logits.shape[1] - 1).to(logits.device)
            return logits[torch.arange(len(tails), device=logits.device)[:, None], columns]
        logits = self.prompt_logits.repeat_interleave(2, 0)
        if any(len(tail) > 1 for tail in tails):
            out = self.run_tails([tail[:-1] or (0,) for tail in tails], keep=0)
            logits = torch.cat([logits, out.logits], dim=1)
        return logits

    def _forward(self, ids: list[tuple[int, ...]], positions: Tensor | None, mask: Tensor | None, keep: int | None):
        """Run the model; keep: how many of the last positions get logits, 0 for all; None skips the LM head."""
        run, extra = (without_head(self.model), {}) if keep is None else (self.model, {"logits_to_keep": keep})
        if self.cache is not None:
            extra |= {"past_key_values": self.cache, "attention_mask": None if mask is None else mask.to(self.device)}
        if positions is not None and not self.whole:
            extra["position_ids"] = positions.to(self.device)
        ids = torch.tensor(ids, device=self.device)
        return run(input_ids=ids, use_cache=self.cache is not None, **extra)


def input_device(model: PreTrainedModel) -> torch.device:
    return model.get_input_embeddings().weight.device


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 sums are kept: here, but on the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
