"""Put AU gates into upstream's own decoder layers. Every family file builds on the classes here.

A family file subclasses upstream's attention, MLP and decoder layer and lists the three pairs in `GATED`.
`GatedCausalLM.__init__` turns upstream's modules into those subclasses, in place, after upstream has built and
initialised them: nothing is built twice, and no weight is renamed.

The attention site is the input of `o_proj`, which upstream's forward does not expose. It is reached through
transformers' `AttentionInterface`: for every kernel K a kernel "au_K" is registered that runs K and passes its output,
still before `o_proj`, through the module's gate. The neuron site, the input of `down_proj`, is also inside a forward:
`GatedMLP` restates that one line, and uses it only while a neuron gate is set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from austeer.errors import AUSteerError
from rmodels.experts import TokenShape, gate_experts
from rmodels.gate import SITES, AUGate

PREFIX = "au_"
KERNELS = {  # each kernel with the function that builds its mask
    "eager": eager_mask,
    "sdpa": sdpa_mask,
    "flash_attention_2": flash_attention_mask,
    "flash_attention_3": flash_attention_mask,
}


class _Unprefixed:
    """Show an attention module to a flash kernel, which needs a config that names the kernel without "au_"."""

    def __init__(self, module: nn.Module, kernel: str):
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation_internal = kernel

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def _gated_attention(kernel: str) -> Callable:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
        if kernel == "eager":
            heads, weights = module.eager_attention(module, query, key, value, mask, **kwargs)
        else:
            view = _Unprefixed(module, kernel) if "flash" in kernel else module
            heads, weights = ALL_ATTENTION_FUNCTIONS[kernel](view, query, key, value, mask, **kwargs)
        if module.au.idle:
            return heads, weights
        return module.au(heads.flatten(-2)).view(heads.shape), weights  # (batch, tokens, heads * head_dim)

    return attend


for _kernel, _mask in KERNELS.items():
    AttentionInterface.register(PREFIX + _kernel, _gated_attention(_kernel))
    AttentionMaskInterface.register(PREFIX + _kernel, _mask)


class GatedMLP:
    """Gate the sites "neuron" and "ffn"; a mixin that stands before upstream's dense MLP class."""

    au: AUGate
    au_neuron: AUGate

    def forward(self, x: Tensor) -> Tensor:
        if self.au_neuron.idle:
            return self.au(super().forward(x))  # upstream's own code, bit for bit
        return self.au(self.down_proj(self.au_neuron(self.act_fn(self.gate_proj(x)) * self.up_proj(x))))


class GatedCausalLM:
    """Gate a whole model; a mixin that stands before upstream's ForCausalLM class.

    GATED maps upstream's classes to the family's. The attention subclass must offer `eager_attention`, the MLP subclass
    is a `GatedMLP`, and the layer subclass passes its output through `self.au`, as does the MLP block of a mixture of
    experts, whose neurons have a gate of their own (experts.py).
    """

    GATED: dict[type, type]
    DEFAULT_KERNEL: str | None = None  # None: upstream's choice

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            for site, module in (("attention", layer.self_attn), ("ffn", layer.mlp), ("layer", layer)):
                gated = self.GATED.get(type(module))
                if gated is None:
                    known = ", ".join(cls.__name__ for cls in self.GATED)
                    raise AUSteerError(
                        f"layer {index} has a {type(module).__name__} at site {site}, for which "
                        f"{type(self).__module__} has no gated class (it has {known}); see docs/porting.md"
                    )
                module.__class__ = gated
                # head_dim, not hidden_size / heads: they differ in Gemma-2-9B and Qwen3-30B-A3B
                width = config.num_attention_heads * module.head_dim if site == "attention" else config.hidden_size
                module.au = AUGate(site, index, width)
            if isinstance(layer.mlp, GatedMLP):
                layer.mlp.au_neuron = AUGate("neuron", index, config.intermediate_size)
            elif hasattr(layer.mlp, "experts"):
                gate_experts(layer.mlp.experts, index, TokenShape(layer))
            else:  # no forward would use a gate: it would silently do nothing
                raise AUSteerError(
                    f"{type(layer.mlp).__name__} of {type(self).__module__} is not a GatedMLP: make it one; see "
                    "docs/porting.md"
                )
        self._route_attention_through_gates()

    def _route_attention_through_gates(self) -> None:
        kernel = self.config._attn_implementation
        if kernel.startswith(PREFIX):
            return
        if kernel not in KERNELS:
            raise AUSteerError(f"attention kernel {kernel!r} has no gated form; use one of {', '.join(KERNELS)}")
        self.config._attn_implementation = PREFIX + kernel

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the source of the class's own module; ours is another module
        upstream = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return upstream._can_set_experts_implementation()

    def set_attn_implementation(self, attn_implementation: str, *args, **kwargs) -> None:
        super().set_attn_implementation(attn_implementation.removeprefix(PREFIX), *args, **kwargs)
        self._route_attention_through_gates()


def sites(model: nn.Module) -> tuple[str, ...]:
    """Return the sites where the model has AUs: all of SITES, or those that its family has and its proof confirmed."""
    return getattr(model, "SITES", SITES)


def gates(model: nn.Module, site: str | None = None) -> Iterator[AUGate]:
    """Yield a model's gates in order of layer, for one site or for all."""
    here = sites(model)
    if site is not None and site not in here:
        reason = getattr(model, "au_refused", {}).get(site)
        raise AUSteerError(
            f"{type(model).__name__} has no site {site!r}"
            + (f": {reason}. Write a family file to mend that (docs/porting.md)" if reason else "")
            + f"; its sites are {', '.join(here)}"
        )
    for module in model.modules():
        if isinstance(module, AUGate) and module.site in here and site in (None, module.site):
            yield module


def check_gates(model: nn.Module) -> None:
    """Check that every layer has exactly one gate per site: without one, steering would silently do nothing."""
    actual = sorted((gate.site, gate.layer) for gate in gates(model))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    expected = sorted((site, layer) for site in sites(model) for layer in range(layers))
    if actual != expected:
        raise AUSteerError(
            f"{type(model).__name__} has {len(actual)} AU gates instead of {len(expected)} "
            f"(one per layer at each of {', '.join(sites(model))}); load it with rmodels.load, see docs/porting.md"
        )
