"""Expand NeuroSteer's option --sweep into points: alpha=64,128 k=4,16 makes four."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from austeer.errors import AUSteerError, one_of

Value = int | float
KINDS = {"alpha": (float, -math.inf), "k": (int, 1), "n-texts": (int, 1), "layer": (int, 0)}  # with the least value
LAYER = "{layer}"  # in the name of an SAE


@dataclass(frozen=True)
class Point:
    """Hold what a sweep may vary."""

    alpha: float
    k: int
    n_texts: int
    sae: str | None


def parse(options: Sequence[str]) -> dict[str, list[Value]]:
    """Read options like alpha=64,128 into the values of each name."""
    sweep: dict[str, list[Value]] = {}
    for option in options:
        name, _, values = option.partition("=")
        kind, least = one_of(KINDS, name, "a sweep over")
        try:
            numbers = [kind(value) for value in values.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(math.isfinite(number) and number >= least for number in numbers):
            wanted = "numbers" if kind is float else f"whole numbers from {least} on"
            raise AUSteerError(f"--sweep {option}: {name} takes {wanted}, with commas between them: {name}=4,16")
        sweep[name] = list(dict.fromkeys(sweep.get(name, []) + numbers))
    return sweep


def points(sweep: dict[str, list[Value]], point: Point) -> list[tuple[dict[str, Value], Point]]:
    """Return all combinations of the swept values, each with its point; without a sweep, this point alone."""
    if "layer" in sweep and LAYER not in (point.sae or ""):
        raise AUSteerError(
            "a sweep over layers needs an SAE of each layer: give --sae with {layer} in its name, such as "
            "gemma-scope-2b-pt-res-canonical/layer_{layer}/width_16k/canonical"
        )
    if "layer" not in sweep and LAYER in (point.sae or ""):
        raise AUSteerError("{layer} in --sae stands for the layers of --sweep layer=...: give them, or name one SAE")
    combinations = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    return [(values, _at(point, **values)) for values in combinations]


def _at(point: Point, layer: int | None = None, **values: Value) -> Point:
    fields = {name.replace("-", "_"): value for name, value in values.items()}
    return replace(point, **fields, sae=point.sae if layer is None else point.sae.replace(LAYER, str(layer)))
