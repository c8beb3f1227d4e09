"""What a table is made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Value:
    text: str = "–"
    detail: str = ""  # interval, band, what was chosen
    printed: float | str | None = None  # the paper's
    number: float | None = None
    why: str = ""  # of a dash
    best: bool = False  # better than every other row of its column, by the adjusted test
    sure: bool = False  # different from vanilla, by the adjusted test
    fair: bool = True  # nothing of it was chosen on the test split: it may be tested
    hits: list[list[bool]] = field(default_factory=list)  # per item, of every draw
    gain: tuple[float, float, float] | None = None  # over vanilla, in points, with its 95 % interval
    p: float | None = None  # of that gain, adjusted
    p_best: float | None = None  # of being no better than some other row, adjusted; of a column's best

    @property
    def difference(self) -> float | None:
        comparable = self.number is not None and isinstance(self.printed, int | float)
        return self.number - self.printed if comparable else None


@dataclass
class Block:
    name: str
    columns: list[str]
    heads: list[str]  # of the columns, with n
    rows: list[tuple[str, bool, list[Value]]]  # label, is it ours and not the paper's, a value a column
    notes: list[str] = field(default_factory=list)  # what its numbers say together
