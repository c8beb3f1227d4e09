"""Identify the model that ranks or a plan belong to: by a fingerprint of its weights, its precision and its name."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from austeer.errors import AUSteerError
from rmodels import gates, site_shape
from rmodels.gguf_conversion import SOURCE

WEIGHTS_AT_ONCE = 1 << 24


def model_header(model: nn.Module) -> dict:
    """Return what the header of ranks and plans records about their model."""
    return {
        "model": public_name(getattr(model, "given_name", model.config.name_or_path)) or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
        "precision": precision(model),
        "family": model.config.model_type,
        "gates": len(list(gates(model))),
        **weights_origin(model),
    }


def site_header(model: nn.Module, site: str) -> dict:
    """Return what plans and ranks must know of a site whose layers are not all alike; nothing for the usual one.

    widths: AUs per layer, where layers differ. experts: the same, where a layer's AUs are the neurons of experts.
    mixers: the projection that site attention is the input of, where some layers have another mixer than attention.
    """
    here = list(gates(model, site))
    widths, experts = [gate.width for gate in here], [getattr(gate, "experts", 0) for gate in here]
    shape = {f"widths.{site}": widths} if len(set(widths)) > 1 else {}
    names = {part: name.rpartition(".")[0] for name, part in model.named_modules()} if site == "attention" else {}
    mixers = [re.sub(r".*?\.\d+\.", "", names[gate]) if gate.width else "" for gate in here] if names else []
    if not all(re.search("(?<!linear_)att", mixer) for mixer in mixers):
        shape[f"mixers.{site}"] = mixers
    return shape | ({f"experts.{site}": experts} if any(experts) else {})


def weights_origin(model: nn.Module, weights: str | None = None) -> dict[str, str]:
    """Return the file that the weights were dequantised from, and the place that --weights named, where there are such."""
    source = getattr(model.config, SOURCE, None)
    origin = {"converted_from": f"{source['quantization']}, sha256 {source['sha256'][:12]}"} if source else {}
    return origin | ({"weights": public_name(weights)} if weights else {})


def public_name(name_or_path: str) -> str:
    """Return a hub id unchanged, and of a local folder its last two parts: ranks are shared, home folders are not."""
    return "/".join(Path(name_or_path).resolve().parts[-2:]) if Path(name_or_path).exists() else name_or_path


def precision(model: nn.Module) -> str:
    name = str(model.dtype).removeprefix("torch.")
    for bits in ("4bit", "8bit"):
        if getattr(model, f"is_loaded_in_{bits}", False):
            name += f"-{bits}"
    return name


def check_made_for(model: nn.Module, shapes: dict[str, tuple[int, int]], header: dict, what: str) -> None:
    """Refuse a model for which ranks or a plan, described by their shapes by site and their header, were not made."""
    for site, (layers, width) in shapes.items():
        here = site_shape(model, site)
        if here != (layers, width):
            raise AUSteerError(
                f"{what} made for {header.get('model', 'another model')}, site {site}: "
                f"{layers} layers of {width} AUs; this model has {here[0]} of {here[1]}"
            )
    if not header:
        return
    if header.get("family") not in (None, model.config.model_type):
        raise AUSteerError(
            f"{what} made for a {header['family']} model ({header.get('model')}); this one is {model.config.model_type}"
        )
    theirs, ours = header.get("fingerprint"), fingerprint(model)
    # weights of another precision have other bits, and then only shapes and family can be compared
    if theirs and ours and precision(model) == header.get("precision") and theirs != ours:
        raise AUSteerError(
            f"{what} made on other weights ({header.get('model')}, fingerprint {theirs[:8]}; this model has {ours[:8]}); "
            "rank this model, or pass check=False to use it anyway"
        )


_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str | None]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str | None:
    """Hash every weight's name, shape and bits by exact integer sums: same weights, same fingerprint.

    Sums of integers do not depend on their order, so CPU and GPU agree; rows and columns are summed apart, so that
    reordering them shows, too. None for a model whose weights are not all in memory. The result is kept per model until
    a weight is written to or replaced, because plans are checked every time they are applied.
    """
    state = tuple((w.data_ptr(), None if w.is_inference() else w._version) for w in model.parameters())
    if model not in _fingerprints or _fingerprints[model][0] != state:
        _fingerprints[model] = (state, _fingerprint(model))
    return _fingerprints[model][1]


def _fingerprint(model: nn.Module) -> str | None:
    weights = model.state_dict()
    return None if any(weight.is_meta for weight in weights.values()) else hash_weights(weights.items())


def hash_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the fingerprint of weights that arrive one by one, in a model's order and dtype."""
    digest = hashlib.sha256()
    for name, weight in weights:
        bits = weight.detach().contiguous()
        bits = bits.cpu() if bits.is_mps else bits  # on the CPU, since integer sums on Apple's GPUs may not be exact
        if bits.dtype.is_floating_point:
            bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        rows = bits.reshape(len(bits), -1) if bits.dim() else bits.reshape(1, 1)
        factors = [torch.arange(1, size + 1, device=bits.device) for size in rows.shape]
        # in blocks, since torch makes an int64 copy of what it sums
        blocks = rows.split(max(1, WEIGHTS_AT_ONCE // max(1, rows.shape[1])))
        sums = (
            torch.cat([block.sum(1, dtype=torch.int64) for block in blocks]),
            sum(block.sum(0, dtype=torch.int64) for block in blocks),
        )
        totals = [int((total * factor).sum()) for total, factor in zip(sums, factors, strict=True)]  # wraps, exactly
        digest.update(f"{name} {tuple(weight.shape)} {totals};".encode())
    return digest.hexdigest()
