"""Report what gains are made of, on tasks whose answers are one of two options (eval/decomposition.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from eval.decomposition import LIKELIER, UNBIASED, Part, Readings, likelihood_taken_apart, taken_apart
from eval.statistics import holm, mcnemar
from experiments.records import unpack
from experiments.report import CONTROLS, gain, name_of, row_name

LEVEL = 0.05
LOG_ODDS = "log-odds"  # the column of tasks that compare answers by likelihood
# what the unsteered model's own preferences would answer: a method has to beat these, too
UNSTEERED = {"forced choice, nothing steered": LIKELIER, "fitted offset, nothing steered": UNBIASED}


@dataclass(frozen=True)
class Line:
    """Hold the parts of a row's gain; of several draws their means, with the smallest and the largest as the interval."""

    name: str
    parts: dict[str, Part]
    p: float | None  # of the skill of a single run that is no control
    rows: tuple[dict, ...]

    @property
    def total(self) -> float:
        return sum(part.gain for part in self.parts.values())


def has_parts(rows: Sequence[dict]) -> bool:
    """Say whether all rows that were tested tell E, C and K: those of tasks with two options do."""
    return all(UNBIASED in row["columns"] for row in rows if "columns" in row)


def readings_of(row: dict) -> Readings:
    return Readings(*(unpack(row["columns"][name]) for name in (row["measure"], LIKELIER, UNBIASED)))


def as_skill(rows: Sequence[dict]) -> list[dict]:
    """Return the rows with K as their measure, so that their gain is skill; rows that were not tested stay as they are."""
    return [
        row | {"measure": UNBIASED, "outcomes": packed, "right": sum(unpack(packed))}
        if (packed := row.get("columns", {}).get(UNBIASED))
        else row
        for row in rows
    ]


def lines_of(rows: Sequence[dict], labels: dict[str, str]) -> list[Line]:
    """Return the lines of what steers nothing, then one per method and site."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    before = readings_of(vanilla)
    lines = [line_of(name, before, [answered_by(vanilla, column)]) for name, column in UNSTEERED.items()]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row is not vanilla:
            groups.setdefault((row["method"], row["site"], name_of(row, labels)), []).append(row)
    for (method, _, name), draws in groups.items():
        shown = f"{name}, {len(draws)} draws" if len(draws) > 1 else name
        lines.append(line_of(shown, before, draws, tested=method not in CONTROLS))
    return lines


def answered_by(vanilla: dict, column: str) -> dict:
    """Return the record of the unsteered model whose answers are those of another column."""
    columns = vanilla["columns"] | {vanilla["measure"]: vanilla["columns"][column]}
    if column == UNBIASED:
        columns[LIKELIER] = vanilla["columns"][UNBIASED]
    return vanilla | {"columns": columns, "right": sum(unpack(columns[vanilla["measure"]]))}


def line_of(name: str, before: Readings, draws: Sequence[dict], tested: bool = False) -> Line:
    by_draw = [taken_apart(before, readings_of(row)) for row in draws]
    if len(draws) == 1:
        (parts,) = by_draw
        return Line(name, {part.name: part for part in parts}, parts[0].p if tested else None, tuple(draws))
    gathered = {}
    for same in zip(*by_draw, strict=True):
        gains = [part.gain for part in same]
        gathered[same[0].name] = Part(same[0].name, mean(gains), min(gains), max(gains), None)
    return Line(name, gathered, None, tuple(draws))


def table(rows: Sequence[dict], labels: dict[str, str]) -> str:
    lines = lines_of(rows, labels)
    adjusted = _adjusted(lines)
    out = [
        "What the gains are made of, in points: skill, the likelier option is right more often once a constant preference for "
        "one of the two options is taken off, which is fitted on validation; bias, less is lost by such a preference; format, "
        "the answer is an option, and the likelier one. They add up to the gain. [95 % interval over items; of several draws "
        "the smallest and the largest]; p: McNemar's, of skill; Holm: adjusted for all lines of this table",
        "",
        "| method | gain | skill | p | Holm | bias | format |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        parts = [f"{part.gain:+.1f} [{part.low:+.1f}, {part.high:+.1f}]" for part in line.parts.values()]
        p = ["", ""] if line.p is None else [f"{line.p:.1g}", f"{adjusted[id(line)]:.1g}"]
        out.append("| " + " | ".join([line.name, f"{line.total:+.1f}", parts[0], *p, *parts[1:]]) + " |")
    return "\n".join(out)


def _adjusted(lines: Sequence[Line]) -> dict[int, float]:
    tested = [line for line in lines if line.p is not None]
    return dict(zip(map(id, tested), holm([line.p for line in tested]), strict=True))


def likelihood_table(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Return a table of the gains of likelihoods, for tasks that compare answers by them; "" for others."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    if LOG_ODDS not in vanilla["columns"]:
        return ""
    out = [
        "What the gains in likelihood are made of, mean log sigmoid of the log-odds of the right answer, in nats: skill, the gain at "
        "the best temperatures before and after; calibration, the rest. Gains of an item are averaged over draws; [95 % interval over "
        "items]; p: of skill, by random signs",
        "",
        "| method | gain | skill | p | calibration |",
        "|---|--:|--:|--:|--:|",
    ]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row is not vanilla and "columns" in row:
            level = f" at {row['kl']['asked']:g}" if "asked" in row.get("kl", {}) else ""
            groups.setdefault(name_of(row, labels) + level, []).append(row)
    for name, draws in groups.items():
        skill, rest = likelihood_taken_apart(vanilla["columns"][LOG_ODDS], [row["columns"][LOG_ODDS] for row in draws])
        spans = [f"{part.gain:+.4f} [{part.low:+.4f}, {part.high:+.4f}]" for part in (skill, rest)]
        shown = f"{name}, {len(draws)} draws" if len(draws) > 1 else name
        out.append(f"| {shown} | {skill.gain + rest.gain:+.4f} | {spans[0]} | {skill.p:.1g} | {spans[1]} |")
    return "\n".join(out)


def verdict(rows: Sequence[dict], labels: dict[str, str]) -> list[str]:
    """Say of each method that gains in words what the gain is: "better" is said of skill alone."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    lines = lines_of(rows, labels)
    adjusted, sentences = _adjusted(lines), []
    for line in lines:
        if line.p is None or line.total <= 0:
            continue
        skill = line.parts["skill"]
        if skill.gain > 0 and adjusted[id(line)] < LEVEL:
            judged = (
                f"the model is better: {skill.gain:+.1f} points are skill (Holm-adjusted p = {adjusted[id(line)]:.1g})"
            )
        else:
            rest = {name: part.gain for name, part in line.parts.items() if name != "skill"}
            most = max(rest, key=rest.get)
            judged = f"no skill is shown ({skill.gain:+.1f}, p = {line.p:.1g}); {rest[most]:+.1f} points are {most}"
        (row,) = line.rows
        beaten = [name for name, column in UNSTEERED.items() if _beats(row, vanilla, column)]
        missed = [name for name in UNSTEERED if name not in beaten]
        more = f"; it does not beat {' or '.join(name.partition(',')[0] for name in missed)}" if missed else ""
        name = row_name(row["method"], row["site"], labels)
        sentences.append(f"{name}: {gain(row, vanilla):+.1f} points; {judged}{more}")
    return sentences


def _beats(row: dict, vanilla: dict, column: str) -> bool:
    """Say whether a row has significantly more right answers than the unsteered model's own preferences."""
    gained, lost, p = mcnemar(unpack(vanilla["columns"][column]), unpack(row["columns"][row["measure"]]))
    return gained > lost and p < LEVEL
