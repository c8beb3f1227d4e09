"""What a table is made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Value:
    text: str = "–"
    small: str = ""  # beneath the number: its interval, or the range of a control's draws
    facts: list[str] = field(default_factory=list)  # what was chosen, perplexity, ...: shown on demand
    printed: float | str | None = None  # the paper's
    number: float | None = None
    why: str = ""  # of a dash
    best: bool = False  # better than every other row of its column, by the adjusted test
    sure: bool = False  # different from vanilla, by the adjusted test
    fair: bool = True  # nothing of it was chosen on the test split: it may be tested
    hits: list[list[bool]] = field(default_factory=list)  # per item, of every draw
    band: tuple[float, float] | None = None  # the lowest and the highest draw of a control
    ids: list[str] = field(default_factory=list)  # of the records it is computed from
    gain: tuple[float, float, float] | None = None  # over vanilla, in points, with its 95 % interval
    p: float | None = None  # of that gain, adjusted
    p_best: float | None = None  # of being no better than some other row, adjusted; of a column's best
    place: tuple[float, float, float] | None = None  # of a control: low, median, high in 0 to 1 of its column's range

    @property
    def marks(self) -> str:
        return ("*" if self.sure else "") + ("" if self.fair else "†")

    @property
    def paper(self) -> str:
        """Return the paper's number, and ours less the paper's where both are numbers."""
        if self.printed is None:
            return ""
        printed = f"paper {self.printed}" if isinstance(self.printed, str) else f"paper {self.printed:g}"
        return printed if self.difference is None else f"{printed} ({self.difference:+.1f})"

    @property
    def alone(self) -> list[str]:
        """Return the record behind a number that has one alone."""
        return [f"record `{self.ids[0]}`"] if len(self.ids) == 1 else []

    @property
    def background(self) -> list[str]:
        """Return everything that is shown on demand, the test results included."""
        lines = [*self.facts, *([self.why] if self.why else [])]
        if self.gain is not None and self.p is not None:
            gain, low, high = self.gain
            lines.append(f"gain over vanilla {gain:+.1f} [{low:+.1f}, {high:+.1f}], p {self.p:.2g}")
        if self.best:
            lines.append(f"better than every other row of its column, p {self.p_best:.2g}")
        return lines

    @property
    def difference(self) -> float | None:
        comparable = self.number is not None and isinstance(self.printed, int | float)
        return self.number - self.printed if comparable else None


@dataclass
class Row:
    key: str  # in the spec; of a table that is derived from another, what tells its rows apart
    label: str
    ours: bool  # and not the paper's
    values: list[Value]  # one per column

    @property
    def is_control(self) -> bool:
        return any(value.band for value in self.values)


@dataclass
class Block:
    name: str
    columns: list[str]
    heads: list[str]  # of the columns, with n
    rows: list[Row]
    notes: list[str] = field(default_factory=list)  # what its numbers say together
