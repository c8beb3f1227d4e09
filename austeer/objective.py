"""The objective of causal momentum as a function of the gates: its value, gradient and curvature at any dose.

    O(g) = mean over pairs of log sigmoid((M(g) - offset) / tau),    x -> x (1 + g) at every position

Screening differentiates at g = 0. What a plan really does shows further out: `integrated.py` averages gradients along
the way, and the curvature here says how the gradient changes with the first step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.batching import pair_batches
from austeer.errors import AUSteerError
from austeer.forward import PairTexts, input_device, stack_layers, tapped
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.temperature import Temperature
from austeer.tokens import CLEAN, encode
from rmodels import context_length, gates, site_shape

Gates = dict[str, Tensor]  # by site, (layers, width)
Leaves = dict[tuple[str, int], Tensor]  # by site and layer, (width,)
STEP = 0.05  # of finite differences: the largest gate of the direction moves by this much


class Objective:
    """Hold a model, pairs that differ in tokens, and the temperature at which they are judged."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        temperature: Temperature | None,
        progress: bool = False,
    ):
        """Encode the pairs. temperature: None for the mean of M itself."""
        encoded, _ = encode(pairs, tokenizer, CLEAN, context_length(model))
        if not encoded:
            raise AUSteerError("both answers of every pair are the same tokens: there is nothing to measure")
        self.model, self.temperature, self.given = model, temperature, pairs
        self.encoded, self.progress = encoded, progress
        self.batches = pair_batches(encoded, model.device)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def pairs(self) -> list[Pair]:
        return [self.given[pair.index] for pair in self.encoded]

    def of_log_odds(self, log_odds: Tensor) -> Tensor:
        """Return every pair's objective from log-odds, (..., pairs) in the order of `pairs`."""
        return self._of(log_odds, self.pairs)

    def _of(self, log_odds: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return log_odds if self.temperature is None else self.temperature.objective(log_odds, pairs)

    @torch.inference_mode()
    def log_odds(self, scales: Gates) -> Tensor:
        """Return M of every pair with these gates, (pairs,) float64, in the order of `pairs`."""
        place = {pair.index: row for row, pair in enumerate(self.encoded)}
        found = torch.zeros(len(self), dtype=torch.float64)
        with scaled(self.model, _leaves(self.model, scales)):
            for batch in self.batches:
                values = PairTexts(self.model, batch, logits=True).log_odds()
                found[[place[pair.index] for pair in batch]] = values.double().cpu()
        return found

    def value(self, scales: Gates) -> float:
        return float(self.of_log_odds(self.log_odds(scales)).mean())

    def gradient(self, scales: Gates) -> Gates:
        """Return dO / dg at these gates, for all AUs of their sites."""
        return self._summed(scales, lambda value, leaves: torch.autograd.grad(value, list(leaves.values())))

    def curvature(self, scales: Gates, direction: Gates) -> tuple[Gates, str]:
        """Return the Hessian at these gates times a direction, and how: by a double backward pass, or by differences."""
        along = {place: leaf.detach() for place, leaf in _leaves(self.model, direction).items()}

        def product(value: Tensor, leaves: Leaves) -> Sequence[Tensor]:
            first = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            slope = sum((gradient * along[place]).sum() for place, gradient in zip(leaves, first, strict=True))
            return torch.autograd.grad(slope, list(leaves.values()))

        try:
            with sdpa_kernel(SDPBackend.MATH):  # the one kernel of sdpa whose backward pass can be differentiated
                return self._summed(scales, product), "a double backward pass"
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented" not in str(error) and "does not require grad" not in str(error):
                raise
        step = STEP / max(float(values.abs().max()) for values in direction.values())
        ahead, behind = (
            self.gradient({site: scales[site] + sign * step * values for site, values in direction.items()})
            for sign in (1, -1)
        )
        return {site: (ahead[site] - behind[site]) / (2 * step) for site in ahead}, "differences of two gradients"

    @torch.enable_grad()
    def _summed(self, scales: Gates, differentiate: Callable[[Tensor, Leaves], Sequence[Tensor]]) -> Gates:
        """Add up over batches what `differentiate(objective, leaves)` returns for each leaf, as means over pairs."""
        totals: dict[tuple[str, int], Tensor] = defaultdict(float)
        for batch in tqdm(self.batches, "gradients", disable=not self.progress, leave=False):
            leaves = _leaves(self.model, scales)
            with scaled(self.model, leaves):
                log_odds = PairTexts(self.model, batch, logits=True).log_odds()
            pairs = [self.given[pair.index] for pair in batch]
            value = self._of(log_odds, pairs).sum()
            for place, found in zip(leaves, differentiate(value, leaves), strict=True):
                totals[place] += found.double().cpu() / len(self)
        if not all(torch.isfinite(total).all() for total in totals.values()):
            raise AUSteerError(f"gradients are inf or nan in {self.model.dtype}; load the model in bfloat16 or float32")
        return {
            site: stack_layers(
                {layer: total for (where, layer), total in totals.items() if where == site},
                site_shape(self.model, site)[0],
            )
            for site in scales
        }


@contextmanager
def scaled(model: PreTrainedModel, leaves: Mapping[tuple[str, int], Tensor]) -> Iterator[None]:
    """Scale activations by 1 + leaf for the length of a `with`, so that the leaves can be differentiated."""

    def multiply(gate):
        leaf = leaves.get((gate.site, gate.layer))
        return None if leaf is None else lambda x: x + x * gate.align(leaf.to(x))

    with tapped(model, sorted({site for site, _ in leaves}), multiply):
        yield


def no_gates(model: PreTrainedModel, sites: Sequence[str]) -> Gates:
    return {site: torch.zeros(site_shape(model, site)) for site in sites}


def gates_of(plan: Plan) -> Gates:
    """Return the scales of a plan that does nothing else."""
    if plan.tokens != "all" or any(values.any() for values in plan.shifts.values()):
        raise AUSteerError("this follows a plan's gates: take one that scales AUs at all tokens and shifts none")
    if not any(values.any() for values in plan.scales.values()):
        raise AUSteerError("the plan steers no AU: take another")
    return plan.scales


def _leaves(model: PreTrainedModel, scales: Gates) -> Leaves:
    device = input_device(model)
    return {
        (site, gate.layer): values[gate.layer, : gate.width].float().to(device).requires_grad_()
        for site, values in scales.items()
        for gate in gates(model, site)
        if gate.width
    }
