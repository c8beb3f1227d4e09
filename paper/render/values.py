"""The parts of a table: values, rows and blocks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Value:
    text: str = "–"
    small: str = ""  # beneath the number: its interval, or the range of a control's draws
    facts: list[str] = field(default_factory=list)  # what was chosen, perplexity and the like, shown on demand
    printed: float | str | None = None  # the paper's number
    dagger: bool = False  # whether the paper took it from another paper
    number: float | None = None
    why: str = ""  # why there is a dash
    by: str = ""  # the scorer or judge that measured it
    # how the paper's number was measured differently (paper/comparable.py)
    unlike: list[str] = field(default_factory=list)
    best: bool = False  # better than every other row of its column, by the adjusted test
    significant: bool = False  # different from vanilla, by the adjusted test
    fair: bool = True  # False if it was chosen on the test split, so that it may not be tested
    hits: list[list[bool]] = field(default_factory=list)  # per draw, whether each item was right
    band: tuple[float, float] | None = None  # lowest and highest draw of a control
    ids: list[str] = field(default_factory=list)  # ids of the records behind the number
    gain: tuple[float, float, float] | None = None  # gain over vanilla in points, and its 95 % interval
    p: float | None = None  # adjusted p-value of that gain
    p_best: float | None = None  # adjusted p-value of a column's best run against its closest rival
    place: tuple[float, float, float] | None = (
        None  # low, median and high of a control, from 0 to 1 within its column's range
    )

    @property
    def marks(self) -> str:
        return ("*" if self.significant else "") + ("" if self.fair else "‡")

    @property
    def paper(self) -> str:
        """Return the paper's number, and ours less the paper's where both measure the same."""
        if self.printed is None:
            return ""
        printed = f"paper {self.printed}" if isinstance(self.printed, str) else f"paper {self.printed:g}"
        printed += "†" if self.dagger else ""
        return printed if self.difference is None else f"{printed} ({self.difference:+.1f})"

    @property
    def alone(self) -> list[str]:
        """Return the record behind a number, if there is exactly one."""
        return [f"record `{self.ids[0]}`"] if len(self.ids) == 1 else []

    @property
    def background(self) -> list[str]:
        """Return everything that is shown on demand, the test results included."""
        lines = [*self.facts, *([self.why] if self.why else [])]
        if self.unlike and self.is_beside_a_number:
            lines.append(f"no difference from the paper's number: {', '.join(self.unlike)}")
        if self.gain is not None and self.p is not None:
            gain, low, high = self.gain
            lines.append(f"gain over vanilla {gain:+.1f} [{low:+.1f}, {high:+.1f}], p {self.p:.2g}")
        if self.best:
            lines.append(f"better than every other row of its column, p {self.p_best:.2g}")
        return lines

    @property
    def difference(self) -> float | None:
        return self.number - self.printed if self.is_beside_a_number and not self.unlike else None

    @property
    def is_beside_a_number(self) -> bool:
        return self.number is not None and isinstance(self.printed, int | float)


@dataclass
class Row:
    key: str  # the row's name in the spec, or what tells the rows of a derived table apart
    label: str
    ours: bool  # True if the paper does not have this row
    values: list[Value]  # one per column

    @property
    def is_control(self) -> bool:
        return any(value.band for value in self.values)


@dataclass
class Block:
    name: str
    columns: list[str]
    heads: list[str]  # headings of the columns, with n
    rows: list[Row]
    notes: list[str] = field(default_factory=list)  # remarks on all its numbers
