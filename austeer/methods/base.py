"""What a method is: it takes evidence and makes plans. One file each beside this one; registry.py finds it there.

A method looks at the evidence once (`prepare`: the costly part, timed) and then turns points of its grid into
plans. All methods get the same pairs and as many grid points to choose from on validation. None sees a test item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from austeer.evidence import Evidence
from austeer.plan import Plan

Settings = dict[str, float]  # what the search chooses, such as {"k": 16, "alpha": 2.0}


class Method(ABC):
    name: ClassVar[str]
    label: ClassVar[str]  # in tables
    paper: ClassVar[str]  # where it is from
    edits: ClassVar[str]  # what it touches, in words
    sites: ClassVar[tuple[str, ...]]  # where it can act
    trains: ClassVar[bool] = False  # gradient descent on the pairs
    foldable: ClassVar[bool] = True  # the plan can go into the weights: no `layer` site, all positions
    draws: ClassVar[bool] = False  # a control with chance in it: repeated with other draws, shown as a band
    momenta: ClassVar[tuple[str, ...]] = ()  # of the ranks it asks for; the first is the one it ranks by

    @abstractmethod
    def grid(self, kind: str) -> list[Settings]:
        """Return the grid points to choose from; kind is "small" or "full", and sets how many: `BUDGET`."""

    @abstractmethod
    def prepare(self, evidence: Evidence) -> Any:
        """Learn from the evidence what all grid points share."""

    @abstractmethod
    def plan(self, prepared: Any, settings: Settings, draw: int = 0) -> Plan:
        """Make the plan of one grid point."""

    @property
    def momentum(self) -> str:
        return self.momenta[0]


# grid points a method may try on validation, by kind of grid: the size of AUSteer's own
BUDGET = {"small": 15, "full": 21}
# a method that acts at several sites at once has one name for them
TOGETHER = {"both": ("attention", "ffn")}


def sites_of(site: str) -> tuple[str, ...]:
    """Return the sites of the model behind the site of a cell."""
    return TOGETHER.get(site, (site,))
