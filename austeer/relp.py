"""The backward rules of RelP: a gradient that sees a locally linear model (arXiv 2508.21258, 2601.22594).

Gradients fail where a model divides by a norm, saturates, or moves attention. Inside `relp_rules(model)` forwards stay as
they are, and backward passes treat as constants

    the denominator of every norm     the attention probabilities     act(x) / x of every activation function

and give each half of a product, such as act(gate) * up in a gated MLP, half of the gradient. Gradient times activation
is then a relevance, which is passed on instead of being lost.

Nothing is copied from modeling code. Norms are probed: what a norm does with a few inputs gives its weight, its bias and
whether it subtracts the mean. Attention is caught at PyTorch's softmax and scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from rmodels.gate import AUGate
from rmodels.structural import Block, activation_functions, find_blocks, projection_widths, without_head

PROBE = 1e3  # inputs of this size make the epsilon of a norm vanish
CLOSE = 1e-2  # how far a norm may be from its linear form, relative to its output: half precision rounds


@contextmanager
def relp_rules(model: PreTrainedModel) -> Iterator[None]:
    """Let backward passes follow RelP's rules for the length of a `with`."""
    blocks = find_blocks(model)
    if any(block.experts is not None for block in blocks):
        raise AUSteerError(f"{type(model).__name__} has experts, for which RelP has no rules here; use a dense model")
    activations = activation_functions(model)
    attention = _FrozenAttention()
    with ExitStack() as undo:
        base = without_head(model)
        for module in base.modules():
            if "norm" in type(module).__name__.lower() and not list(module.children()):
                undo.callback(module.register_forward_hook(_FrozenNorm(module)).remove)
        for activation in dict.fromkeys(activations):
            undo.callback(activation.register_forward_hook(_frozen_ratio).remove)
        for block in blocks:
            for hook in _halved_products(block):
                undo.callback(hook.remove)
        check = partial(attention.check, type(model).__name__, sum(block.mixer is not None for block in blocks))
        undo.callback(base.register_forward_pre_hook(lambda *_: attention.restart()).remove)
        undo.callback(base.register_forward_hook(lambda *_: check()).remove)
        undo.enter_context(attention)
        yield


class _FrozenAttention(TorchFunctionMode):
    """Detach attention probabilities. They depend on queries and keys alone, so a fused kernel gets those detached."""

    SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)

    def __init__(self):
        super().__init__()
        self.frozen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self.frozen += 1
            kwargs = {name: value.detach() if name in ("query", "key") else value for name, value in kwargs.items()}
            args = (*(value.detach() for value in args[:2]), *args[2:])
        result = function(*args, **kwargs)
        if function in self.SOFTMAX:
            self.frozen += 1
            result = result.detach()
        return result

    def restart(self) -> None:
        self.frozen = 0

    def check(self, model: str, mixers: int) -> None:
        if self.frozen < mixers:
            raise AUSteerError(
                f"RelP freezes attention probabilities, but {mixers - self.frozen} of the {mixers} layers of {model} hide "
                "theirs or have none: load the model with attn_implementation='eager', or take one with attention alone"
            )


class _FrozenNorm:
    """Replace the gradient of a norm y = r (x - m mean(x)) w + b, m being 0 or 1, by that for a constant r."""

    def __init__(self, norm: nn.Module):
        self.norm = norm
        self.weight: Tensor | None = None

    def __call__(self, norm: nn.Module, args: tuple, out: Tensor) -> Tensor:
        x = args[0]
        if self.weight is None:
            self._probe(x)
        centred = x.float() - (x.float().mean(-1, keepdim=True) if self.subtracts_mean else 0)
        linear = centred * self.weight
        known = linear.detach()
        target = out.detach().float() - self.bias
        r = (target * known).sum(-1, keepdim=True) / known.square().sum(-1, keepdim=True).clamp(min=1e-30)
        if (target - r * known).norm() > CLOSE * target.norm():
            raise AUSteerError(
                f"RelP freezes norms, and {type(norm).__name__} is none that divides by one number per token"
            )
        return _with_gradient_of(r * linear, out)

    @torch.no_grad()
    def _probe(self, x: Tensor) -> None:
        """Learn w, b and m from three inputs: zeros, one whose mean is zero, and a constant one."""
        width = x.shape[-1]
        signs = torch.ones(width, device=x.device)
        signs[1::2] = -1
        forward = type(self.norm).forward  # without hooks, this one among them
        zero, alternating, constant = (
            forward(self.norm, (PROBE * row).to(x.dtype).expand(1, 1, width)).float()[0, 0]
            for row in (torch.zeros_like(signs), signs, torch.ones_like(signs))
        )
        self.bias, self.weight = zero, (alternating - zero) * signs
        self.subtracts_mean = bool((constant - zero).norm() < 0.5 * self.weight.norm())


def _frozen_ratio(activation: nn.Module, args: tuple, out: Tensor) -> Tensor:
    """Give act(x) the gradient of x times the constant act(x) / x."""
    x = args[0]
    ratio = torch.where(x == 0, 0.0, out / torch.where(x == 0, 1.0, x)).detach()
    return _with_gradient_of(x * ratio, out)


def _halved_products(block: Block) -> Iterator:
    """Halve the gradient that goes on from the inner activations of a gated MLP, but not the one of its own AUs."""
    if block.down is None or not _is_gated(block):
        return
    inside = next((part for part in block.down.children() if isinstance(part, AUGate) and part.site == "neuron"), None)
    if inside is not None:  # the gate is called by a hook on the projection: halve before it
        yield block.down.register_forward_pre_hook(lambda module, args: (_halved(args[0]), *args[1:]), prepend=True)
        return
    gate = next(part for part in block.layer.modules() if isinstance(part, AUGate) and part.site == "neuron")
    yield gate.register_forward_pre_hook(lambda module, args: (_halved(args[0]),))
    yield block.down.register_forward_pre_hook(lambda module, args: (_halved(args[0]),) if gate.idle else None)


def _is_gated(block: Block) -> bool:
    """Say whether the inner activations of an MLP are products of two: it then makes two numbers for each of them."""
    inner = projection_widths(block.down)[0]
    mlp = next(module for module in block.layer.modules() if block.down in module.children())
    others = [part for part in mlp.children() if part is not block.down and hasattr(part, "weight")]
    makes = [projection_widths(part)[1] for part in others if isinstance(part, nn.Linear) or hasattr(part, "nf")]
    return sum(made for made in makes if made in (inner, 2 * inner)) == 2 * inner


def _halved(x: Tensor) -> Tensor:
    return _with_gradient_of(x / 2, x)


def _with_gradient_of(other: Tensor, value: Tensor) -> Tensor:
    """Return `value` exactly, with the gradient of `other`."""
    return _Replaced.apply(other, value.detach())


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, other: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = other.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None
