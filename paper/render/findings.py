"""The three findings on top of the report: sentences computed from records and tests.

Every verdict is a test's, adjusted (Holm) for all comparisons that its sentence counts. A sentence whose records are
missing is left out, and the next one takes its place. A place is one task at one site of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from eval.statistics import holm, mcnemar
from paper.render.places import SITES, by_method, main_table, places
from paper.render.searches import span
from paper.render.sections import Section
from paper.render.seeds import GAIN
from paper.render.significance_marks import LEVEL, p_better
from paper.render.values import Value

METHODS = {"causal": "causal momentum", "published": "the published rule"}
BUDGETED = {"fisher": "causal momentum with a KL budget"}
CONTROLS = {"random": "random AUs", "flipped": "sign-flipped AUs"}
N_FINDINGS = 3
PRIMARY = "0.03"  # nats: the level of the primary endpoint (docs/real/plan.md)


@dataclass(frozen=True)
class Finding:
    verdict: str
    numbers: str  # the numbers that support the verdict
    section: Section  # the section that shows these numbers


def findings(sections: Sequence[Section]) -> list[Finding]:
    """Return the first three findings that the records allow, the most important first."""
    main = main_table(sections)
    candidates = [_at_equal_kl(sections), _over_seeds(sections) or _over_vanilla(main), _skill(sections), _over_controls(main), _without_search(main),
            _over_prompt(main), _cheaper_search(sections)]  # fmt: skip
    return [finding for finding in candidates if finding][:N_FINDINGS]


def _at_equal_kl(sections: Sequence[Section]) -> Finding | None:
    """Say which methods gain significantly at the primary KL, by model and task; where options are words, in skill."""
    section = next((s for s in sections if s.blocks and s.spec.kind == "equal-kl"), None)
    if section is None:
        return None
    last = {
        block.name.partition(": ")[0]: block for block in section.blocks if "gain" in block.columns
    }  # that of skill
    found = []
    for name, block in last.items():
        level, place = block.columns.index("KL"), block.columns.index("gain")
        gains = {row.label: row.values[place] for row in block.rows if row.values[level].text == PRIMARY}
        shown = [f"{label} {value.text}" for label, value in gains.items() if value.significant and value.gain[0] > 0]
        found.append(f"{name}: {', '.join(shown) or 'none'}")
    return Finding(
        f"Significantly better than vanilla at {PRIMARY} nats of KL: " + "; ".join(found) + ".",
        "Points; of skill where options are words. 95 % intervals over items and draws of pairs; tests Holm-adjusted for the methods "
        "of a table.",
        section,
    )


def _over_seeds(sections: Sequence[Section]) -> Finding | None:
    """Say what methods gain on average over training seeds, with a t interval."""
    section = next((s for s in sections if s.blocks and s.spec.show.get("over") == "seeds"), None)
    if section is None:
        return None
    gains: dict[str, dict[str, Value]] = {}
    for block in section.blocks:
        rows = {method: row for (method, _), row in by_method(section, block.rows).items()}
        for method, name in {**METHODS, **BUDGETED, "random": CONTROLS["random"]}.items():
            value = rows[method].values[block.columns.index(GAIN)] if method in rows else Value()
            if value.gain:
                gains.setdefault(name, {})[block.name] = value
    if not gains:
        return None
    seeds = len(next(iter(section.spec.averages.values())))
    where = ", ".join(f"{name} {_significant_sites(site_gains)}" for name, site_gains in gains.items())
    numbers = "; ".join(
        f"{name} {', '.join(f'{site} {value.text} {value.small}' for site, value in site_gains.items())}"
        for name, site_gains in gains.items()
    )
    return Finding(
        f"Significant gain over vanilla over {seeds} training seeds: {where}.",
        f"Mean gain in points, 95 % t interval: {numbers}.",
        section,
    )


def _significant_sites(values: dict[str, Value]) -> str:
    significant = [site for site, value in values.items() if value.significant and value.gain[0] > 0]
    return f"at {' and '.join(significant)}" if significant else "nowhere"


def _skill(sections: Sequence[Section]) -> Finding | None:
    """Say in how many places a gain is skill, and on which tasks none is."""
    section = next((s for s in sections if s.blocks and s.spec.kind == "parts"), None)
    if section is None:
        return None
    counts: dict[str, list[bool]] = {}
    without = []
    for block in section.blocks:
        rows = by_method(section, block.rows)
        for place, column in enumerate(block.columns):
            shown = {key: row.values[place] for key, row in rows.items()}
            skilled = {
                key: value.significant and value.number > 0
                for key, value in shown.items()
                if key[0] not in ("vanilla", *section.spec.show["unsteered"]) and value.number is not None
            }
            for method, name in METHODS.items():
                counts.setdefault(name, []).extend(skilled[method, site] for site in SITES if (method, site) in skilled)
            if skilled and not any(skilled.values()):
                suffix = f" of {block.name}" if len(section.blocks) > 1 else ""
                without.append(f"{column}{suffix} ({shown['vanilla', None].text})")
    if not any(counts.values()):
        return None
    numbers = (
        "Where no row of the table shows skill, how often the unsteered model itself is right once a constant preference for one option "
        f"is taken off: {', '.join(without)}."
        if without
        else ""
    )
    return Finding(f"Significantly more skill than vanilla: {_counts_text(counts)} places.", numbers, section)


def _over_vanilla(main: Section | None) -> Finding | None:
    """Say in how many places a method is significantly better than vanilla, by the stars of the table."""
    counts: dict[str, list[bool]] = {}
    for _, site, cells in places(main):
        for method, name in METHODS.items():
            if (value := cells.get((method, site))) and value.gain:
                counts.setdefault(name, []).append(value.significant and value.gain[0] > 0)
    if not counts:
        return None
    return Finding(f"Significantly better than vanilla: {_counts_text(counts)} places.", "", main)


def _over_controls(main: Section | None) -> Finding | None:
    """Say in how many places a method beats every draw of its controls, and on which tasks none does anywhere."""
    comparisons: list[tuple[str, str]] = []  # task, method
    ps, gains, draws = [], {}, set()
    for task, site, cells in places(main):
        control_hits = [hits for control in CONTROLS if (value := cells.get((control, site))) for hits in value.hits]
        for method in METHODS:
            value = cells.get((method, site))
            if control_hits and value and value.fair and len(value.hits) == 1:
                comparisons.append((task, method))
                ps.append(max(p_better(value.hits[0], hits) for hits in control_hits))
                draws.add(len(control_hits))
                gains.setdefault(task, []).append(_recovered(value, cells, site))
    if not comparisons:
        return None
    counts: dict[str, list[bool]] = {}
    separated = set()
    for (task, method), p in zip(comparisons, holm(ps), strict=True):
        counts.setdefault(METHODS[method], []).append(p < LEVEL)
        separated |= {task} if p < LEVEL else set()
    verdict = f"Significantly better than every draw of its controls: {_counts_text(counts)} places."
    numbers = f"Controls: {' and '.join(CONTROLS.values())} with the same search, {' or '.join(map(str, sorted(draws)))} draws per site."
    inseparable = {task: max(parts) for task, parts in gains.items() if task not in separated}
    if inseparable:
        which = ", ".join(inseparable) if len(inseparable) <= 2 else f"{len(inseparable)} of {len(gains)} tasks"
        shares = [share for gain, share in inseparable.values() if gain > 0]
        recovered = f"where random AUs recover {span(shares)} of the largest gain, " if shares else ""
        numbers += f" On {which}, {recovered}no method beats them all at any site: a gain there does not show that a method works."
    return Finding(verdict, numbers, main)


def _without_search(main: Section | None) -> Finding | None:
    """Say how predicted k and alpha compare with searched ones."""
    pairs = [
        (cells[("causal-predicted", site)], cells[("causal", site)])
        for _, site, cells in places(main)
        if ("causal-predicted", site) in cells and ("causal", site) in cells
    ]
    pairs = [(one, other) for one, other in pairs if len(one.hits) == len(other.hits) == 1]
    if not pairs:
        return None
    predicted, searched = (sum(value.number for value in values) / len(pairs) for values in zip(*pairs, strict=True))
    return Finding(
        f"Causal momentum with k and alpha predicted, not searched, is {_comparison_text(pairs)}.",
        f"Mean accuracy {predicted:.1f} % predicted, {searched:.1f} % searched.",
        main,
    )


def _over_prompt(main: Section | None) -> Finding | None:
    """Say how steering compares with an instruction in the prompt."""
    pairs = [
        (cells[("causal", site)], prompt)
        for _, site, cells in places(main)
        if (prompt := cells.get(("prompt-only", None))) and ("causal", site) in cells
    ]
    pairs = [(one, other) for one, other in pairs if len(one.hits) == len(other.hits) == 1]
    return (
        Finding(f"Causal momentum against the prompt alone is {_comparison_text(pairs)}.", "", main) if pairs else None
    )


def _cheaper_search(sections: Sequence[Section]) -> Finding | None:
    section = next((s for s in sections if s.spec.show.get("searches") and s.blocks), None)
    notes = [note for block in section.blocks for note in block.notes if note.startswith("Search")] if section else []
    return Finding(" ".join(notes), "", section) if notes else None


# ---- counts and comparisons ---------------------------------------------------------------------------------------


def _counts_text(counts: dict[str, list[bool]]) -> str:
    return ", ".join(f"{name} in {sum(beaten)} of {len(beaten)}" for name, beaten in counts.items())


def _comparison_text(pairs: Sequence[tuple[Value, Value]]) -> str:
    """Say in how many places the first of each pair is significantly better, and in how many worse."""
    significant = [p < LEVEL for p in holm([mcnemar(other.hits[0], one.hits[0])[2] for one, other in pairs])]
    if not any(significant):
        return f"significantly different in none of {len(pairs)} places"
    better = sum(s and one.number > other.number for s, (one, other) in zip(significant, pairs, strict=True))
    return f"significantly better in {better} and worse in {sum(significant) - better} of {len(pairs)} places"


def _recovered(value: Value, cells: dict[tuple[str, str | None], Value], site: str) -> tuple[float, float]:
    """Return a method's gain over vanilla, and the share of it that the median draw of random AUs has too."""
    vanilla, random = cells.get(("vanilla", None)), cells.get(("random", site))
    if not vanilla or not random or value.number <= vanilla.number:
        return 0.0, 0.0
    gain = value.number - vanilla.number
    return gain, (median(100 * sum(hits) / len(hits) for hits in random.hits) - vanilla.number) / gain
