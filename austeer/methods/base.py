"""The interface of a method, which turns evidence into plans. A method is a file in this folder; registry.py finds it.

A method looks at the evidence once (`prepare`: the costly part, timed) and then turns the points of its grid into
plans. Rivals that are no plans make an adapter instead (austeer/change.py), or nothing but other prompts. All methods get the same pairs and the same budget of validation items to search with. None sees a test item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from austeer.change import Change
from austeer.errors import AUSteerError
from austeer.evidence import Evidence

GridPoint = dict[str, float]  # what a search tries, such as {"k": 16, "alpha": 2.0}


class Method(ABC):
    """Turn evidence into plans."""

    name: ClassVar[str]
    label: ClassVar[str]  # in tables
    paper: ClassVar[str]  # its source
    edits: ClassVar[str]  # what it changes, in words
    sites: ClassVar[tuple[str, ...]]  # where it can act
    trains: ClassVar[bool] = False  # whether by gradient descent on the pairs
    foldable: ClassVar[bool] = True  # its plans can go into the weights: no `layer` site, all positions
    draws: ClassVar[bool] = False  # a random control: repeated with other draws, and shown as a band
    learns_as: ClassVar[str | None] = None  # the method whose `prepare` this one shares
    budgeted: ClassVar[bool] = False  # it plans for a stated KL on neutral text, and needs the evidence's costs
    scalable: ClassVar[bool] = True  # what it makes can be made stronger and weaker; other prompts cannot
    momenta: ClassVar[tuple[str, ...]] = ()  # the ranks it needs; it ranks by the first
    axes: ClassVar[dict[str, dict[str, Sequence[float]]]] = {}  # of its grid: key -> kind -> values

    def grid(self, kind: str) -> list[GridPoint]:
        """Return the candidate grid points. kind is "small" or "full"; `MOST_POINTS` says how many there may be."""
        return [dict(zip(self.axes, point, strict=True)) for point in product(*(at[kind] for at in self.axes.values()))]

    @abstractmethod
    def prepare(self, evidence: Evidence) -> Any:
        """Learn from the evidence what all grid points share."""

    @abstractmethod
    def plan(self, prepared: Any, point: GridPoint, draw: int = 0) -> Change | None:
        """Make the plan of one grid point; None if the model is left as it is."""

    def asked(self, prepared: Any, point: GridPoint, items: Sequence, draw: int = 0) -> tuple[list, dict[str, int]]:
        """Return the items with the prompts that are asked at a grid point, and counts of how they were changed."""
        return list(items), {}

    def files(self, model: PreTrainedModel) -> dict[str, Path]:
        """Return the files beside the weights that decide its plans, by what they hold."""
        return {}

    @property
    def momentum(self) -> str:
        return self.momenta[0]


# the most grid points that a method may have, by kind of grid: as many as AUSteer's own
MOST_POINTS = {"small": 15, "full": 120}
# how many of them a search starts with; this sets its cost, which is the same for every method (experiments/search.py)
BUDGET = {"small": 15, "full": 21}
# the value of the option `preset` that gives a baseline the settings and the sweep of its authors' code
ORIGINAL = "original"
# the name of several sites that a method steers at once
TOGETHER = {"both": ("attention", "ffn"), "attention+neuron": ("attention", "neuron")}
# the site of methods that change prompts and leave the model as it is
PROMPT = "prompt"


def is_original(preset: str | None) -> bool:
    """Return whether the preset is the original's; refuse unknown presets."""
    if preset not in (None, ORIGINAL):
        raise AUSteerError(f"preset {preset!r} is unknown; use {ORIGINAL}, or leave it out")
    return preset == ORIGINAL


def every_kind(**axes: Sequence[float]) -> dict[str, dict[str, Sequence[float]]]:
    """Return axes that are the same for every kind of grid."""
    return {key: dict.fromkeys(BUDGET, values) for key, values in axes.items()}


def sites_of(site: str) -> tuple[str, ...]:
    """Return the sites of the model that the site of a cell stands for."""
    return () if site == PROMPT else TOGETHER.get(site, (site,))


def header_of(evidence: Evidence) -> dict:
    """Return the origin of what is learned at all sites that the evidence's site stands for."""
    parts = [replace(evidence, site=site).header() for site in sites_of(evidence.site)]
    return {key: value for part in parts for key, value in part.items()} | {"site": evidence.site}
