"""Plan: what is done to which atomic unit (AU). Every method ends in a plan, which can steer, be added and be saved.

At the planned AUs, x -> x * (1 + scale) + shift, at the token positions that `tokens` names:
    all        every position, as the authors do       prompt     the prompt only
    generated  new tokens only                         last       the prompt's last token and new tokens
    before-last  the prompt without its last token      prompt-end  the prompt's last token only
    before-last-2  the prompt without its last two tokens
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.files import read_tensors, write_tensors

FORMAT = "austeer-plan-1"
TOKENS = ("all", "prompt", "before-last", "before-last-2", "prompt-end", "generated", "last")

# of a header, followed by a site: per layer, the AUs, the experts they belong to, and the projection that they enter
SHAPE_KEYS = ("widths.", "experts.", "mixers.")


def au_name(header: dict, site: str, width: int, layer: int, dim: int) -> str:
    """Return how an AU's number is shown: of a neuron in a mixture, its expert and its number in there."""
    experts = header.get(f"experts.{site}", {layer: 0})[layer]
    if not experts:
        return str(dim)
    inner = header.get(f"widths.{site}", {layer: width})[layer] // experts
    return f"{dim % inner} of expert {dim // inner}"


@dataclass
class Plan:
    """Hold scales and shifts by site, each (layers, width) float32 and zero where nothing is done."""

    scales: dict[str, Tensor]
    shifts: dict[str, Tensor] = field(default_factory=dict)
    tokens: str = "all"
    header: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.tokens not in TOKENS:
            raise AUSteerError(f"token scope {self.tokens!r} is unknown; use one of {', '.join(TOKENS)}")
        for site, values in [*self.scales.items(), *self.shifts.items()]:
            if not torch.isfinite(values).all():
                raise AUSteerError(f"the plan has inf or nan at site {site}; lower alpha")

    @property
    def sites(self) -> list[str]:
        return sorted({*self.scales, *self.shifts})

    def shape(self, site: str) -> tuple[int, int]:
        return tuple((self.scales if site in self.scales else self.shifts)[site].shape)

    def scale(self, site: str, layer: int) -> Tensor:
        """Return gamma of every AU of one layer, (width,)."""
        return self._row(self.scales, site, layer)

    def shift(self, site: str, layer: int) -> Tensor:
        return self._row(self.shifts, site, layer)

    def _row(self, values: dict[str, Tensor], site: str, layer: int) -> Tensor:
        if site not in self.sites:
            raise AUSteerError(f"the plan does nothing at site {site!r}; its sites: {', '.join(self.sites) or 'none'}")
        if not 0 <= layer < self.shape(site)[0]:
            raise AUSteerError(f"no layer {layer}: site {site} has {self.shape(site)[0]}")
        return values[site][layer] if site in values else torch.zeros(self.shape(site)[1])

    def aus(self) -> list[tuple[str, int, int, float, float]]:
        """List the AUs that are steered as (site, layer, dim, scale, shift)."""
        aus = []
        for site in self.sites:
            zero = torch.zeros(self.shape(site))
            scale, shift = self.scales.get(site, zero), self.shifts.get(site, zero)
            for layer, dim in ((scale != 0) | (shift != 0)).nonzero().tolist():
                aus.append((site, layer, dim, float(scale[layer, dim]), float(shift[layer, dim])))
        return aus

    @property
    def inverted(self) -> int:
        """Count the AUs whose sign the plan inverts because gamma is below -1. (The paper says that signs are preserved.)"""
        return sum(int((1 + scales < 0).sum()) for scales in self.scales.values())

    def summary(self) -> str:
        inverted = f", {self.inverted} of them with the sign turned over (gamma below -1)" if self.inverted else ""
        return f"{len(self)} atomic units{inverted}, tokens: {self.tokens}"

    def __len__(self) -> int:
        return len(self.aus())

    def __bool__(self) -> bool:
        return True  # a plan that does nothing is still a plan

    def __str__(self) -> str:
        lines = [self.summary()]
        lines += [f"{key}: {value}" for key, value in self.header.items() if key not in ("fingerprint",)]
        lines += ["", "site       layer    dim     x becomes"]
        for site, layer, dim, scale, shift in sorted(self.aus(), key=lambda au: -max(abs(au[3]), abs(au[4]))):
            name = au_name(self.header, site, self.shape(site)[1], layer, dim)
            lines.append(
                f"{site:<10} {layer:>5} {name:>6}     {1 + scale:+.3f} x" + (f" {shift:+.4g}" if shift else "")
            )
        return "\n".join(lines)

    def times(self, factor: float) -> Plan:
        """Return the plan with its scales and shifts times a factor."""
        scales, shifts = (
            {site: factor * values for site, values in part.items()} for part in (self.scales, self.shifts)
        )
        return replace(self, scales=scales, shifts=shifts)

    def conflicts(self, other: Plan) -> list[tuple[str, int, int, tuple[float, float], tuple[float, float]]]:
        """List AUs that both plans steer: (site, layer, dim, (scale, shift) here, (scale, shift) in the other)."""
        theirs = {au[:3]: au[3:] for au in other.aus()}
        return [(*au[:3], au[3:], theirs[au[:3]]) for au in self.aus() if au[:3] in theirs]

    def __add__(self, other: Plan) -> Plan:
        """Add two plans: scales and shifts add up. `conflicts` lists the AUs that both steer."""
        if self.tokens != other.tokens:
            raise AUSteerError(
                f"plans for tokens {self.tokens!r} and {other.tokens!r} cannot be added: make both for the same tokens"
            )
        for site in set(self.sites) & set(other.sites):
            if self.shape(site) != other.shape(site):
                raise AUSteerError(
                    f"the plans are for different models: {self.shape(site)} and {other.shape(site)} AUs"
                )
        keys = ("model", "family", "fingerprint", "precision")
        shapes = [key for key in {**self.header, **other.header} if key.startswith(SHAPE_KEYS)]
        origin = {key: self.header.get(key) or other.header.get(key) for key in (*keys, *shapes)}
        for header in (self.header, other.header):
            if header.get("fingerprint") not in (None, origin["fingerprint"]):
                models = f"{self.header.get('model')} and {other.header.get('model')}"
                raise AUSteerError(f"the plans are for different models: {models}")
        parts = [part for plan in (self, other) for part in plan.header.get("sum_of") or [plan.header]]
        rest = [{key: value for key, value in part.items() if key not in origin} for part in parts]
        header = origin | {"sum_of": rest}
        return Plan(_sum(self.scales, other.scales), _sum(self.shifts, other.shifts), self.tokens, header)

    def save(self, path: str | Path) -> None:
        """Save sparsely: a few kilobytes for a hundred AUs of any model."""
        tensors, shapes = {}, {}
        for kind, by_site in (("scale", self.scales), ("shift", self.shifts)):
            for site, values in by_site.items():
                shapes[f"{kind}.{site}"] = list(values.shape)
                tensors[f"{kind}.{site}.units"] = values.flatten().nonzero().squeeze(1).to(torch.int32)
                tensors[f"{kind}.{site}.values"] = values.flatten()[values.flatten() != 0].contiguous()
        metadata = {"format": FORMAT, "tokens": self.tokens}
        metadata |= {"shapes": json.dumps(shapes), "header": json.dumps(self.header)}
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        tensors, metadata = read_tensors(Path(path), FORMAT, "plan")
        dense: dict[str, dict[str, Tensor]] = {"scale": {}, "shift": {}}
        for name, shape in json.loads(metadata["shapes"]).items():
            kind, site = name.split(".")
            values = torch.zeros(shape)
            values.view(-1)[tensors[f"{name}.units"].long()] = tensors[f"{name}.values"]
            dense[kind][site] = values
        return cls(dense["scale"], dense["shift"], metadata["tokens"], json.loads(metadata["header"]))


def _sum(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    total = dict(ours)
    for site, values in theirs.items():
        total[site] = total[site] + values if site in total else values
    return total
