"""Gate the neurons of experts: site "neuron" of a mixture, where an AU is (layer, expert, dim).

Experts see only the tokens that are routed to them, as rows without an order of tokens. A gate of experts knows for each
row which text, which token and which expert it belongs to, so that plans, taps and token scopes mean here what they mean
elsewhere. Flat, an AU's number is expert * inner width + dim, and an AU of an expert that a token is not routed to is 0.

transformers' implementations of fused experts (its ALL_EXPERTS_FUNCTIONS) hand all inner activations to the module's own
`_apply_gate`, or to `act_fn` where there is no gate projection: that is where the gate is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from austeer.errors import AUSteerError
from rmodels.gate import AUGate


class TokenShape:
    """Remember (batch, tokens) of a layer's current input, for what runs all tokens of a batch as one long row."""

    def __init__(self, layer: nn.Module):
        layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]


class ExpertGate(AUGate):
    def __init__(self, layer: int, experts: int, inner: int):
        super().__init__("neuron", layer, experts * inner)
        self.experts, self.inner = experts, inner

    def route(self, shape: tuple[int, int], tokens: Tensor, experts: Tensor) -> None:
        """Say where the next rows come from: their tokens, counted over a batch of this shape, and their experts."""
        self.shape, self.tokens, self.expert = shape, tokens, experts

    def rows(self, x: Tensor) -> int:
        return self.shape[0]

    def align(self, values: Tensor) -> Tensor:
        by_expert = values.reshape(-1, self.experts, self.inner)
        return by_expert[0 if len(by_expert) == 1 else self.tokens // self.shape[1], self.expert]

    def align_positions(self, positions: Tensor) -> Tensor:
        return positions.expand(*self.shape, 1).reshape(-1, 1)[self.tokens]

    def dense(self, x: Tensor) -> Tensor:
        everywhere = x.new_zeros(self.shape[0] * self.shape[1], self.experts, self.inner)
        return everywhere.index_put((self.tokens, self.expert), x).view(*self.shape, -1)


def is_fused(module: nn.Module) -> bool:
    """Say whether a module holds all experts of a layer and follows transformers' interface for that."""
    return hasattr(module, "is_concatenated") and hasattr(module, "down_proj")


def gate_experts(experts: nn.Module, layer: int, tokens: TokenShape) -> None:
    """Put a gate into the fused experts of a layer."""
    inner = experts.down_proj.shape[-2 if experts.is_transposed else -1]
    gate = experts.au_neuron = ExpertGate(layer, experts.num_experts, inner)

    experts.register_forward_pre_hook(partial(_route, gate, tokens), with_kwargs=True)
    if experts.has_gate:
        experts._apply_gate = partial(_apply_both, experts._apply_gate, gate)
    else:
        experts.act_fn.register_forward_hook(partial(_steer_activations, gate))


# Partials and not closures, which deep copies of a model would share with it (structural.py).


def _route(gate: ExpertGate, tokens: TokenShape, module: nn.Module, args: tuple, kwargs: dict) -> None:
    if not gate.idle:
        index = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        gate.route(tokens.shape, *_order_of_rows(index, module.config._experts_implementation))


def _apply_both(apply_gate: Callable[[Tensor], Tensor], gate: ExpertGate, x: Tensor) -> Tensor:
    x = apply_gate(x)
    return x if gate.idle else gate(x)


def _steer_activations(gate: ExpertGate, act: nn.Module, args: tuple, x: Tensor) -> Tensor | None:
    return None if gate.idle else gate(x)


def _order_of_rows(top_k_index: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """Return token and expert of each row, in the order in which an implementation runs them."""
    experts, each = top_k_index.reshape(-1), top_k_index.shape[-1]
    if implementation == "batched_mm":
        return torch.arange(len(experts), device=experts.device) // each, experts
    if implementation == "grouped_mm":
        experts, rows = torch.sort(experts)
        return rows // each, experts
    raise AUSteerError(
        f"neurons of experts cannot be reached in transformers' implementation {implementation!r}: call "
        "model.set_experts_implementation('grouped_mm')"
    )
