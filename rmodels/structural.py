"""Find the sites of any decoder by its structure, and put AU gates there: no class names, no modeling files.

A decoder layer mixes tokens (attention, or Mamba, linear attention, a convolution), and then has an MLP. The last
projection of each, a Linear or Conv1D whose output is as wide as the residual stream, is where the sites are:

    attention  input of the mixer's last projection      neuron  input of the MLP's last projection
    ffn        its output, or the sum of the experts     layer   output of the layer

Gates are called from hooks on these modules, so layers stay the objects that upstream made, and quantised and offloaded
layers work. What is found here is a guess until `rmodels/proof.py` has proven it on the model itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from austeer.errors import AUSteerError
from rmodels.experts import TokenShape, gate_experts, is_fused
from rmodels.gate import AUGate

# what families call the two halves of a decoder layer, the most telling names first
MIXERS = (
    "self_attn", "attn", "attention", "self_attention", "multi_head_attention", "linear_attn", "mamba", "mixer", "conv",
    "temporal_block", "operator", "norm_attn_norm", "mlstm_layer", "mamba_decoder",
)  # fmt: skip
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "mlp_block", "shared_mlp")
# projections that are wide and may come late, but never last: of queries, keys, values, gates and inner activations
NEVER_LAST = re.compile(r"gate|^(in|q|k|v|kv|qkv)_|^up_|^w[13]$|^fc1$")
OTHER_TOWERS = re.compile(r"vision|visual|image|img|audio|speech")  # parts of a model whose layers are no decoder's

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")  # where these functions come from


@dataclass(frozen=True)
class LinearMap:
    """Name the weight and the bias of a linear map, and say which axes of the weight are its inputs and outputs.

    The weights of fused experts have three axes, and their biases two.
    """

    weight: str
    bias: str | None
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Block:
    """Hold the modules whose inputs and outputs are sites, one per site; None where there is none.

    A decoder layer is one block. One with two attentions and two MLPs is two blocks with the same `layer`.
    """

    layer: nn.Module  # the decoder layer
    mixer: nn.Module | None  # the last projection of attention
    down: nn.Module | None  # the last projection of a dense MLP
    experts: nn.Module | None  # or a mixture of experts as a whole
    wide: tuple[tuple[str, nn.Module], ...] = ()  # all projections in the mixer that are as wide as the last


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return the text decoder without its language-model head. Its output holds the last hidden states."""
    # some heads are called "decoder", and Llama-4 has its decoder under neither of the first two
    below = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    part = next(part for part in below if part is not model and isinstance(part, PreTrainedModel))
    return part if part.get_output_embeddings() is None else without_head(part)  # Llama-4's decoder has a head, too


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the layers of the text decoder."""
    if hasattr(model, "au_blocks"):
        return list(dict.fromkeys(block.layer for block in model.au_blocks()))
    count = _size(model, "num_hidden_layers")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # some heads are called "decoder"
        decoder = without_head(model)
    lists = [
        module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(_projections(module))
        and not OTHER_TOWERS.search(name)
    ]
    if not lists:
        raise AUSteerError(
            f"{type(model).__name__} has no list of {count} decoder layers: write a family file (docs/porting.md)"
        )
    return max(lists, key=lambda layers: sum(weight.numel() for weight in layers.parameters()))


def stream_width(model: PreTrainedModel) -> int:
    return _size(model, "hidden_size")


def _size(model: PreTrainedModel, field: str) -> int:
    config = model.config.get_text_config(decoder=True)
    if not isinstance(getattr(config, field, None), int):
        raise AUSteerError(
            f"the config of {type(model).__name__} has no {field}: it is not one decoder; take a decoder"
        )
    return getattr(config, field)


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """Return a block per layer, or what a family file, for layers that are built otherwise, names itself (au_blocks)."""
    if hasattr(model, "au_blocks"):
        return model.au_blocks()
    width = stream_width(model)
    return [_block(layer, width) for layer in decoder_layers(model)]


def _block(layer: nn.Module, width: int) -> Block:
    children = dict(layer.named_children())
    mixer = next((children[name] for name in MIXERS if name in children), None)
    mlp = next((children[name] for name in MLPS if name in children), None)
    if mlp is None and "mixer" in children and (hasattr(mixer, "down_proj") or _has_experts(mixer)):
        mixer, mlp = None, mixer  # Nemotron-H's layers are either, under one name
    if mlp is None:  # OPT's layers hold the linear maps of their MLP themselves
        own = {name: child for name, child in children.items() if _is_projection(child)}
        mlp = nn.ModuleDict(own if len(own) > 1 else {})
    is_mixture = _has_experts(mlp)
    return Block(
        layer,
        last_projection(mixer, width),
        None if is_mixture else last_projection(mlp, width),
        mlp if is_mixture else None,
        tuple((name, part) for name, part in _projections(mixer) if projection_widths(part)[1] == width)
        if mixer
        else (),
    )


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _projections(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in module.named_modules() if _is_projection(part))


def projection_widths(projection: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a Linear or Conv1D, whatever its weight looks like when it is quantised."""
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return projection.in_features, projection.out_features


def last_projection(module: nn.Module | None, width: int) -> nn.Module | None:
    """Return the projection registered last of those that may end a mixer or an MLP; None where there is none."""
    if module is None or (isinstance(module, nn.ModuleList) and not all(map(_is_projection, module))):
        return None  # LongCat-Flash has two mixers and two MLPs under one name
    wide = [
        part
        for name, part in _projections(module)
        if projection_widths(part)[1] == width and not NEVER_LAST.search(name.rpartition(".")[2])
    ]
    return wide[-1] if wide else None


def activation_functions(model: PreTrainedModel) -> list[nn.Module]:
    """Return the activation function of each layer's dense MLP: the one module of that kind beside its last projection."""
    owners = {id(child): module for module in model.modules() for child in module.children()}
    functions = []
    for index, block in enumerate(find_blocks(model)):
        beside = owners[id(block.down)].children() if block.down is not None else ()
        here = [child for child in beside if type(child).__module__ in ACTIVATIONS]
        if len(here) != 1:
            raise AUSteerError(
                f"layer {index} of {type(model).__name__} has {len(here) or 'no'} modules that are the activation "
                "function of a dense MLP, and this method reads one; use another method"
            )
        functions += here
    return functions


def _has_experts(mlp: nn.Module) -> bool:
    """Say whether an MLP has experts: by the name of a part, or by weights of three axes."""
    for name, part in mlp.named_modules():
        if "experts" in name.rpartition(".")[2]:
            return True
        if not isinstance(part, nn.Conv1d) and any(w.dim() > 2 and len(w) > 1 for w in part.parameters(recurse=False)):
            return True
    return False


def linear_maps(model: PreTrainedModel) -> Iterator[tuple[int, str | None, str | None, LinearMap]]:
    """Yield (layer, site of the inputs, site of the outputs, linear map) for every weight that plans can go into."""
    width, names = stream_width(model), {id(module): name for name, module in model.named_modules()}
    for index, block in enumerate(find_blocks(model)):
        if block.mixer is not None:
            yield index, "attention", None, _map(names[id(block.mixer)], block.mixer)
        if block.down is not None:
            yield index, "neuron", "ffn", _map(names[id(block.down)], block.down)
        if block.experts is not None:
            for inside, linear in _expert_maps(names[id(block.experts)], block.experts, width):
                yield index, inside, "ffn", linear


def _map(name: str, projection: nn.Module) -> LinearMap:
    inputs, outputs = (-2, -1) if isinstance(projection, Conv1D) else (-1, -2)
    return LinearMap(f"{name}.weight", None if projection.bias is None else f"{name}.bias", inputs, outputs)


def _expert_maps(name: str, mixture: nn.Module, width: int) -> Iterator[tuple[str | None, LinearMap]]:
    """Yield the last map of every expert, shared ones included: what the output of a mixture is a weighted sum of.

    Beside it stands the site of its inputs, which only fused experts have.
    """
    for path, part in mixture.named_modules():
        here = f"{name}.{path}" if path else name
        own = {child: module for child, module in part.named_children() if _is_projection(module)}
        wide = [child for child, module in own.items() if projection_widths(module)[1] == width]
        wide = [child for child in wide if not NEVER_LAST.search(child)]
        if wide:
            yield None, _map(f"{here}.{wide[-1]}", own[wide[-1]])
        for key, weight in part.named_parameters(recurse=False):
            if weight.dim() == 3 and _is_output(f"{path}.{key}"):
                # square weights: transformers says which way round they are
                outputs = -1 if getattr(part, "is_transposed", weight.shape[-2] != width) else -2
                bias = f"{here}.{key}_bias" if hasattr(part, f"{key}_bias") else None
                yield "neuron" if is_fused(part) else None, LinearMap(f"{here}.{key}", bias, -3 - outputs, outputs)


def _is_output(name: str) -> bool:
    return bool(re.search(r"down|output|w2|c_proj", name))


def add_gates(model: PreTrainedModel) -> None:
    """Put a gate at every site of every block; where a block lacks a site, a gate of width 0 stands for it."""
    width, blocks = stream_width(model), find_blocks(model)
    ends = {id(block.layer): index for index, block in enumerate(blocks)}  # a layer of two blocks ends with the second
    for index, block in enumerate(blocks):
        tokens = TokenShape(block.layer)
        _gate_input(block.mixer, "attention", index, block.layer, tokens)
        fused = [] if block.experts is None else [part for part in block.experts.modules() if is_fused(part)]
        if fused:
            gate_experts(fused[0], index, tokens)
        else:
            _gate_input(block.down, "neuron", index, block.layer, tokens)
        _gate_output(block.down if block.experts is None else block.experts, "ffn", index, width, block.layer, tokens)
        end = block.layer if ends[id(block.layer)] == index else None
        _gate_output(end, "layer", index, width, block.layer, tokens)


def _gate_input(projection: nn.Module | None, site: str, index: int, layer: nn.Module, tokens: TokenShape) -> None:
    if projection is None:
        layer.add_module(f"au_no_{site}_{index}", AUGate(site, index, 0))
        return
    gate = AUGate(site, index, projection_widths(projection)[0])
    projection.add_module(f"au_{site}", gate)
    projection.register_forward_pre_hook(partial(_steer_input, gate, tokens))


def _gate_output(
    module: nn.Module | None, site: str, index: int, width: int, layer: nn.Module, tokens: TokenShape
) -> None:
    if module is None:
        layer.add_module(f"au_no_{site}_{index}", AUGate(site, index, 0))
        return
    gate = AUGate(site, index, width)
    module.add_module(f"au_{site}", gate)

    module.register_forward_hook(partial(_steer_output, gate, tokens))


# hooks are partial functions and no closures: a deep copy of a model then has hooks that call its own gates
def _steer_input(gate: AUGate, tokens: TokenShape, module: nn.Module, args: tuple) -> tuple | None:
    return None if gate.idle else (_steer(gate, tokens, args[0]), *args[1:])


def _steer_output(
    gate: AUGate, tokens: TokenShape, module: nn.Module, args: tuple, output: Tensor | tuple | list
) -> Tensor | tuple | list | None:
    return None if gate.idle else with_hidden_states(output, partial(_steer, gate, tokens))


def _steer(gate: AUGate, tokens: TokenShape, x: Tensor) -> Tensor:
    """Call a gate with (batch, tokens, width), also where an MLP runs all tokens of a batch as one long row."""
    return gate(x) if x.dim() != 2 else gate(x.view(*tokens.shape, -1)).view_as(x)


def with_hidden_states(output: Tensor | tuple | list, change: Callable[[Tensor], Tensor]) -> Tensor | tuple | list:
    """Change the hidden states in what a module returns: they are all of it, or the first of several."""
    if isinstance(output, Tensor):
        return change(output)
    changed = [change(output[0]), *output[1:]]
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
