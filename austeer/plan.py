"""Plan: what is done to which atomic unit. Every method ends in one; it steers, adds up and saves.

At the planned AUs, x -> x * (1 + scale) + shift, at the token positions named by `tokens`:
    all        every position, as the authors do       prompt     the prompt only
    generated  new tokens only                         last       the prompt's last token and new tokens
    before-last  the prompt without its last token      prompt-end  the prompt's last token only
    before-last-2  the prompt without its last two tokens
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.files import read_tensors, write_tensors

FORMAT = "austeer-plan-1"
TOKENS = ("all", "prompt", "before-last", "before-last-2", "prompt-end", "generated", "last")


@dataclass
class Plan:
    """scales and shifts: by site, (layers, width) float32, zero where nothing is done."""

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
        """gamma of every AU of one layer, (width,)."""
        return self._row(self.scales, site, layer)

    def shift(self, site: str, layer: int) -> Tensor:
        return self._row(self.shifts, site, layer)

    def _row(self, values: dict[str, Tensor], site: str, layer: int) -> Tensor:
        if site not in self.sites:
            raise AUSteerError(f"the plan does nothing at site {site!r}; its sites: {', '.join(self.sites) or 'none'}")
        if not 0 <= layer < self.shape(site)[0]:
            raise AUSteerError(f"no layer {layer}: site {site} has {self.shape(site)[0]}")
        return values[site][layer] if site in values else torch.zeros(self.shape(site)[1])

    def units(self) -> list[tuple[str, int, int, float, float]]:
        """Every AU that is touched: (site, layer, dim, scale, shift)."""
        found = []
        for site in self.sites:
            zero = torch.zeros(self.shape(site))
            scale, shift = self.scales.get(site, zero), self.shifts.get(site, zero)
            for layer, dim in ((scale != 0) | (shift != 0)).nonzero().tolist():
                found.append((site, layer, dim, float(scale[layer, dim]), float(shift[layer, dim])))
        return found

    def __len__(self) -> int:
        return len(self.units())

    def __bool__(self) -> bool:
        return True  # also a plan that does nothing is a plan

    def __str__(self) -> str:
        lines = [f"{len(self)} atomic units, tokens: {self.tokens}"]
        lines += [f"{key}: {value}" for key, value in self.header.items() if key not in ("fingerprint",)]
        lines += ["", "site       layer    dim     x becomes"]
        for site, layer, dim, scale, shift in sorted(self.units(), key=lambda u: -max(abs(u[3]), abs(u[4]))):
            lines.append(f"{site:<10} {layer:>5} {dim:>6}     {1 + scale:+.3f} x" + (f" {shift:+.4g}" if shift else ""))
        return "\n".join(lines)

    def conflicts(self, other: Plan) -> list[tuple[str, int, int, tuple[float, float], tuple[float, float]]]:
        """AUs both plans touch: (site, layer, dim, (scale, shift) here, (scale, shift) there)."""
        there = {unit[:3]: unit[3:] for unit in other.units()}
        return [(*unit[:3], unit[3:], there[unit[:3]]) for unit in self.units() if unit[:3] in there]

    def __add__(self, other: Plan) -> Plan:
        """Both at once: scales and shifts add. Look at `conflicts` for AUs that both touch."""
        if self.tokens != other.tokens:
            raise AUSteerError(f"a plan for tokens {self.tokens!r} and one for {other.tokens!r} do not add up")
        for site in set(self.sites) & set(other.sites):
            if self.shape(site) != other.shape(site):
                raise AUSteerError(
                    f"the plans are for different models: {self.shape(site)} and {other.shape(site)} AUs at {site}"
                )
        made_for = {
            key: self.header.get(key) or other.header.get(key)
            for key in ("model", "family", "fingerprint", "precision")
        }
        for header in (self.header, other.header):
            if header.get("fingerprint") not in (None, made_for["fingerprint"]):
                raise AUSteerError(
                    f"the plans are for different models: {self.header.get('model')} and {other.header.get('model')}"
                )
        parts = [part for plan in (self, other) for part in plan.header.get("sum_of") or [plan.header]]
        own = [{key: value for key, value in part.items() if key not in made_for} for part in parts]
        header = made_for | {"sum_of": own}
        return Plan(_sum(self.scales, other.scales), _sum(self.shifts, other.shifts), self.tokens, header)

    def save(self, path: str | Path) -> None:
        """Sparse: a few kilobytes for a hundred AUs of any model."""
        tensors, shapes = {}, {}
        for kind, by_site in (("scale", self.scales), ("shift", self.shifts)):
            for site, values in by_site.items():
                shapes[f"{kind}.{site}"] = list(values.shape)
                tensors[f"{kind}.{site}.units"] = values.flatten().nonzero().squeeze(1).to(torch.int32)
                tensors[f"{kind}.{site}.values"] = values.flatten()[values.flatten() != 0].contiguous()
        metadata = {
            "format": FORMAT,
            "tokens": self.tokens,
            "shapes": json.dumps(shapes),
            "header": json.dumps(self.header),
        }
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
