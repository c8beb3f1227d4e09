"""Report what gains are made of: on tasks with two options, and where answers are compared by likelihood (eval/decomposition.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from eval.decomposition import LIKELIER, UNBIASED, Part, Readings, changes, likelihood_taken_apart, taken_apart
from eval.statistics import holm, mcnemar
from experiments.records import unpack
from experiments.report import CONTROLS, name_of, vanilla_of

LEVEL = 0.05
# what the unsteered model's own preferences would answer: a method has to beat these, too
UNSTEERED = {"forced choice, nothing steered": LIKELIER, "fitted offset, nothing steered": UNBIASED}
LOG_ODDS = "log-odds"  # the column of tasks that compare answers by likelihood
PARTS = (
    "What the gains are made of, in points: skill, the likelier option is right more often once a constant preference for "
    "one of the two options is taken off; bias, such a preference costs fewer answers; format, the answer is an option, and "
    "the likelier one. They add up to the gain. The constant is fitted on validation (where there is none, on the other folds "
    "of the test items), and taken as given: with few items its error can look like a little skill, which AUC cannot. [95 % "
    "interval over items; of several draws the smallest and the largest]; p: McNemar's, of skill; Holm: adjusted for all "
    "lines of this table"
)
LIKELIHOODS = (
    "How the gains in likelihood split, in nats (mean log sigmoid of the log-odds of the right answer). Skill is the gain when each model "
    "is scored at its best temperature, fitted to these items; calibration is the rest. The gains of an item are averaged over draws; "
    "[95 % interval over items]; p is of skill, over items, by random signs, and not adjusted"
)


@dataclass(frozen=True)
class Line:
    """Hold the parts of a row's gain; of several draws their means, with the smallest and the largest as the interval."""

    name: str
    parts: dict[str, Part]
    rows: tuple[dict, ...]
    p: float | None = None  # of the skill of a single run that is no control
    holm: float | None = None  # that p, adjusted for all lines

    @property
    def total(self) -> float:
        return sum(part.gain for part in self.parts.values())


def has_parts(rows: Sequence[dict]) -> bool:
    """Say whether every tested row has the columns that a gain is taken apart by: exact match, C and K."""
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


def measures(rows: Sequence[dict]) -> list[Sequence[dict]]:
    """Return the rows as they are measured and, on tasks with two options, with skill as their measure."""
    return [rows, as_skill(rows)] if has_parts(rows) else [rows]


def lines_of(rows: Sequence[dict], labels: dict[str, str]) -> list[Line]:
    """Return the lines of what steers nothing, then one per method and site."""
    vanilla = vanilla_of(rows)
    before = readings_of(vanilla)
    lines = [line_of(name, before, [answered_by(vanilla, column)]) for name, column in UNSTEERED.items()]
    for name, draws in _by_name(rows, labels).items():
        lines.append(line_of(name, before, draws, tested=draws[0]["method"] not in CONTROLS))
    tested = [line for line in lines if line.p is not None]
    adjusted = dict(zip([line.name for line in tested], holm([line.p for line in tested]), strict=True))
    return [replace(line, holm=adjusted.get(line.name)) for line in lines]


def _by_name(rows: Sequence[dict], labels: dict[str, str]) -> dict[str, list[dict]]:
    """Group the tested rows but vanilla by what they are called, the KL that was asked for included."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row["method"] != "vanilla" and "columns" in row:
            asked = row.get("kl", {}).get("asked")
            groups.setdefault(name_of(row, labels) + (f" at {asked:g}" if asked else ""), []).append(row)
    return {f"{name}, {len(draws)} draws" if len(draws) > 1 else name: draws for name, draws in groups.items()}


def answered_by(vanilla: dict, column: str) -> dict:
    """Return the record of the unsteered model whose answers are those of another column."""
    columns = vanilla["columns"] | {vanilla["measure"]: vanilla["columns"][column]}
    if column == UNBIASED:
        columns[LIKELIER] = vanilla["columns"][UNBIASED]
    return vanilla | {"columns": columns, "right": sum(unpack(columns[vanilla["measure"]]))}


def line_of(name: str, before: Readings, draws: Sequence[dict], tested: bool = False) -> Line:
    if len(draws) == 1:
        parts = taken_apart(before, readings_of(draws[0]))
        return Line(name, {part.name: part for part in parts}, tuple(draws), parts[0].p if tested else None)
    by_draw = [changes(before, readings_of(row)) for row in draws]
    gains = {part: [100 * float(of[part].mean()) for of in by_draw] for part in by_draw[0]}
    parts = {part: Part(part, mean(values), min(values), max(values), None) for part, values in gains.items()}
    return Line(name, parts, tuple(draws))


def table(lines: Sequence[Line]) -> str:
    out = [PARTS, "", "| method | gain | skill | p | Holm | bias | format |", "|---|--:|--:|--:|--:|--:|--:|"]
    for line in lines:
        skill, *others = (f"{part.gain:+.1f} [{part.low:+.1f}, {part.high:+.1f}]" for part in line.parts.values())
        ps = ["" if p is None else f"{p:.1g}" for p in (line.p, line.holm)]
        out.append("| " + " | ".join([line.name, f"{line.total:+.1f}", skill, *ps, *others]) + " |")
    return "\n".join(out)


def verdict(lines: Sequence[Line], vanilla: dict) -> list[str]:
    """Say in words what the gain of each method is made of; only skill is called better."""
    return [
        f"{line.name}: {line.total:+.1f} points; {_judged(line)}{_unbeaten(line, vanilla)}"
        for line in lines
        if line.p is not None and line.total > 0
    ]


def _judged(line: Line) -> str:
    skill = line.parts["skill"].gain
    points, p = f"{skill:+.1f} points of skill, Holm-adjusted p = {line.holm:.1g}", line.holm
    if p < LEVEL and skill > 0:
        return f"the answers are better: {points}"
    rest = [f"{part.gain:+.1f} of {name}" for name, part in line.parts.items() if name != "skill" and part.gain > 0]
    known = "skill is lost" if p < LEVEL else "no skill is shown"
    return f"{known} ({points}){'; ' + ', '.join(rest) if rest else ''}"


def _unbeaten(line: Line, vanilla: dict) -> str:
    """Name what the unsteered model's own preferences answer as well, if a row is not significantly above it."""
    right = unpack(line.rows[0]["columns"][line.rows[0]["measure"]])
    names = []
    for name, column in UNSTEERED.items():
        gained, lost, p = mcnemar(unpack(vanilla["columns"][column]), right)
        if gained <= lost or p >= LEVEL:
            names.append(name.partition(",")[0])
    return f"; it does not beat {' or '.join(names)}" if names else ""


def likelihood_parts(rows: Sequence[dict], labels: dict[str, str]) -> list[tuple[str, str, Part, Part]]:
    """Return (name, method, skill, calibration) for each method's gain in likelihood; an empty list if the task compares none."""
    vanilla = vanilla_of(rows)
    if "likelihood" not in vanilla.get("measured", {}):
        return []
    before = vanilla["columns"][LOG_ODDS]
    return [
        (name, draws[0]["method"], *likelihood_taken_apart(before, [row["columns"][LOG_ODDS] for row in draws]))
        for name, draws in _by_name(rows, labels).items()
    ]


def likelihood_table(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Return a table of the gains of likelihoods, for tasks that compare whole answers by them; "" for others."""
    parts = likelihood_parts(rows, labels)
    if not parts:
        return ""
    out = [LIKELIHOODS, "", "| method | gain | skill | p | calibration |", "|---|--:|--:|--:|--:|"]
    for name, _, skill, rest in parts:
        spans = [f"{part.gain:+.4f} [{part.low:+.4f}, {part.high:+.4f}]" for part in (skill, rest)]
        out.append(f"| {name} | {skill.gain + rest.gain:+.4f} | {spans[0]} | {skill.p:.1g} | {spans[1]} |")
    return "\n".join(out)
