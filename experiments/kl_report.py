"""Report what methods gain at the same KL on neutral text: the rows of a table, and the points of the curves.

A line of the table is a method at a site and a level. It has several rows where pairs were drawn several times, or where a
control was; draws of pairs are told apart by the pairs themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from eval.statistics import crossed_bootstrap, crossed_p, holm, mcnemar, paired_gain
from experiments.records import unpack
from experiments.report import gain, name_of, vanilla_of

OURS = "fisher"  # the method that all others are compared with
HEADS = ("KL", "method", "predicted", "measured", "fresh", "prompts", "own", "factor", "AUs", "gain", "right / wrong", "p",
         "ours: p", "Holm")  # fmt: skip

Estimate = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Line:
    name: str
    method: str
    site: str | None
    level: float | None  # None: it has no strength, and stands at the KL it has
    rows: tuple[dict, ...]  # those that were brought to the level
    others: tuple[dict, ...]  # those that were not

    def gains(self, vanilla: dict) -> dict[str, float]:
        """Return the gain of each draw of the pairs, by their hash; of a control the mean over its own draws."""
        by_pairs: dict[str, list[float]] = {}
        for row in self.rows:
            by_pairs.setdefault(row["pairs_hash"], []).append(gain(row, vanilla))
        return {pairs: mean(values) for pairs, values in by_pairs.items()}

    def cost(self, name: str) -> float | None:
        """Return the mean of a KL over the rows; None where a row has none."""
        values = [row["kl"].get(name) for row in self.rows]
        return mean(values) if values and None not in values else None


def lines_of(rows: Sequence[dict], labels: dict[str, str]) -> list[Line]:
    """Group the rows that were brought to a KL, those without a level first, then level by level."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "kl" in row:
            level = row["kl"].get("asked")
            groups.setdefault((level or 0.0, name_of(row, labels)), []).append(row)
    lines = []
    for (level, name), same in sorted(groups.items(), key=lambda group: group[0][0]):
        reached, others = (tuple(row for row in same if ("outcomes" in row) == wanted) for wanted in (True, False))
        lines.append(Line(name, same[0]["method"], same[0]["site"], level or None, reached, others))
    return lines


def estimate(line: Line, vanilla: dict) -> Estimate:
    """Return the gain and its interval.

    Several draws of pairs give an interval over draws and items, and a single run one over items. A control drawn several
    times on the same pairs gets the range of its draws instead.
    """
    if len(line.gains(vanilla)) > 1:
        before = unpack(vanilla["outcomes"])
        runs = [
            [100 * (float(after) - was) for was, after in zip(before, unpack(row["outcomes"]), strict=True)]
            for row in line.rows
        ]
        return crossed_bootstrap(runs)
    values = [gain(row, vanilla) for row in line.rows]
    if len(values) > 1:
        return mean(values), min(values), max(values)
    gained, lost, _ = mcnemar(unpack(vanilla["outcomes"]), unpack(line.rows[0]["outcomes"]))
    return tuple(100 * value for value in paired_gain(gained, lost, vanilla["n"]))


def p_against(ours: Line, other: Line, vanilla: dict) -> float:
    """Return the paired p of ours against another line, draw by draw where both have the same draws of pairs."""
    both = ours.gains(vanilla).keys() & other.gains(vanilla).keys()
    if not both:
        return paired_p([ours.rows], [other.rows])
    return paired_p(
        *(
            [[row for row in line.rows if row["pairs_hash"] == pairs] for pairs in sorted(both)]
            for line in (ours, other)
        )
    )


def paired_p(runs: Sequence[Sequence[dict]], others: Sequence[Sequence[dict]]) -> float:
    """Return the p of the difference between paired runs, each the mean of some records.

    One record against one is McNemar's test. Else runs and items are drawn anew together: neither alone holds all of the noise.
    """
    if len(runs) == len(runs[0]) == len(others[0]) == 1:
        return mcnemar(*(unpack(rows[0][0]["outcomes"]) for rows in (others, runs)))[2]
    ahead = [np.subtract(_share_right(run), _share_right(other)) for run, other in zip(runs, others, strict=True)]
    return crossed_p(ahead)


def _share_right(records: Sequence[dict]) -> np.ndarray:
    """Return in what share of the records each item is right."""
    return np.mean([unpack(record["outcomes"]) for record in records], 0)


def compared(lines: Sequence[Line], vanilla: dict) -> dict[int, tuple[float, float]]:
    """Return p and Holm-adjusted p of ours against each other line, by id.

    Ours is that of the same level, or of the nearest KL where a line has no level; at the same site, or else at any.
    """
    pairs = []
    for line in lines:
        if line.method != OURS and line.rows and (ours := _counterpart(lines, line)):
            pairs.append((line, p_against(ours, line, vanilla)))
    adjusted = holm([p for _, p in pairs])
    return {id(line): (p, by_holm) for (line, p), by_holm in zip(pairs, adjusted, strict=True)}


def _counterpart(lines: Sequence[Line], line: Line) -> Line | None:
    """Return our line that another is compared with."""
    ours = [one for one in lines if one.method == OURS and one.rows]
    if line.level is not None:
        ours = [one for one in ours if one.level == line.level]
    elif kl := line.cost("measured"):
        nearest = min((one.level for one in ours), key=lambda level: abs(math.log(level / kl)), default=None)
        ours = [one for one in ours if one.level == nearest]
    else:
        return None
    return min(ours, key=lambda one: one.site != line.site, default=None)


def heading(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Explain the columns of the tables at equal KL."""
    texts = {row["kl"]["text"] for row in rows if "kl" in row}
    return (
        "Gains in points, [95 % interval] over items, or over items and draws of pairs; for a control drawn several times on "
        "the same pairs: mean and range of the draws. KL: of the unsteered to the steered model, nats per token of the second halves of passages of "
        f"{', '.join(sorted(texts))}; predicted: before the plan is run; measured: on the passages by which strengths are "
        "corrected; fresh: on passages that corrected nothing; prompts, own: on the task's prompts, and on what the model itself "
        "writes. Choices beside the strength, such as CAA's layer, are made on validation at that KL. p: against vanilla, by an "
        "exact McNemar test, of several draws by the bootstrap over items and draws; "
        f"ours: of {labels.get(OURS, OURS)} against this line at the same KL, or at the nearest where a row has no "
        "strength, by the same tests, Holm-adjusted for all of these"
    )


def measure(rows: Sequence[dict]) -> str:
    """Say what the rows are measured by, on which items, and what vanilla has."""
    vanilla = vanilla_of(rows)
    share = 100 * vanilla["right"] / vanilla["n"]
    return f"{vanilla['measure']} on {vanilla['n']} items of {vanilla['test_split']}, vanilla {share:.1f} %"


def table(rows: Sequence[dict], labels: dict[str, str]) -> str:
    out = [f"| {' | '.join(HEADS)} |", "|--:|---|" + "--:|" * (len(HEADS) - 2)]
    lines = cells_of(rows, labels)
    out += [f"| {' | '.join(cells)} |" for _, cells in lines]
    out += ["", *(f"- {reason}" for reason in reasons([line for line, _ in lines]))]
    return "\n".join(out).rstrip()


def cells_of(rows: Sequence[dict], labels: dict[str, str]) -> list[tuple[Line, list[str]]]:
    """Return each line with its cells under HEADS."""
    vanilla, lines = vanilla_of(rows), lines_of(rows, labels)
    against = compared(lines, vanilla)
    return [(line, _cells(line, vanilla, against.get(id(line)))) for line in lines]


def _cells(line: Line, vanilla: dict, against: tuple[float, float] | None) -> list[str]:
    total = len(line.rows) + len(line.others)
    draws = "" if total == 1 else f", {total} draws" if not line.others else f", {len(line.rows)} of {total} draws"
    cells = [f"{line.level:g}" if line.level else "", f"{line.name}{draws}"]
    cells += [_number(line.cost(name)) for name in ("predicted", "measured", "fresh", "on_prompts", "on_own", "factor")]
    if not line.rows:
        return [*cells, *"–" * 6]
    cells.append(f"{mean(row['touched'] for row in line.rows):.0f}" if line.site else "")
    value, low, high = estimate(line, vanilla)
    cells.append(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]")
    gained, lost, _ = mcnemar(unpack(vanilla["outcomes"]), unpack(line.rows[0]["outcomes"]))
    cells.append(f"{gained} / {lost}" if len(line.rows) == 1 else "")
    cells.append(f"{p_of(line, vanilla):.1g}")
    return cells + ([f"{p:.1g}" for p in against] if against else ["", ""])


def p_of(line: Line, vanilla: dict) -> float:
    """Return the p of a line's gain over vanilla."""
    by_pairs = [[row for row in line.rows if row["pairs_hash"] == pairs] for pairs in line.gains(vanilla)]
    return paired_p(by_pairs, [[vanilla]] * len(by_pairs))


def reasons(lines: Sequence[Line]) -> list[str]:
    """Say why a level was not reached, and why a cost was not predicted."""
    found = {}
    for line in lines:
        for row in (*line.rows, *line.others):
            for key, what in (("unreached", f"is not brought to {line.level}"), ("unpriced", "is not priced")):
                if row["kl"].get(key):
                    found[f"{line.name} {what}: {row['kl'][key]}"] = None
            if line.rows and row["kl"].get("refused"):
                lost = "; ".join(f"{point}: {why}" for point, why in row["kl"]["refused"].items())
                found[f"{line.name} at {line.level}: not all candidates were brought to it: {lost}"] = None
    return list(found)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def curves(rows: Sequence[dict], labels: dict[str, str]) -> dict[str, list[tuple[float, Estimate]]]:
    """Return for each method and site its points (measured KL, gain with interval)."""
    vanilla = vanilla_of(rows)
    points: dict[str, list[tuple[float, Estimate]]] = {}
    for line in lines_of(rows, labels):
        if line.cost("measured"):
            points.setdefault(line.name, []).append((line.cost("measured"), estimate(line, vanilla)))
    return points
