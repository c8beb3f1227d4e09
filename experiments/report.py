"""Records -> the table a person reads, and what it says in words. Built from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from eval.statistics import holm, mcnemar, sign_flip, wilson
from experiments.records import unpack

SITES = {"attention": "Head", "ffn": "FFN", "layer": "Layer", "neuron": "Neuron", "both": "Head+FFN"}
CONTROLS = ("random", "flipped")  # repeated with other draws, shown as bands


def table(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Markdown: one line a method and site; repeated draws of a control become one line with their band."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    lines = [
        f"{vanilla['measure']} on {vanilla['n']} items of {vanilla['test_split']}; gains in points against vanilla; "
        "[95 % Wilson interval]; p: exact McNemar, paired; Holm: the same, adjusted for all lines of this table",
        "",
        "| method | settings | AUs | right | gain | up / down | p | Holm |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    tested = [row for row in rows if row["site"] and row["method"] not in CONTROLS]
    adjusted = dict(zip(map(id, tested), holm([row["p"] for row in tested]), strict=True))
    for row in rows:
        if row["method"] in ("vanilla", "prompt-only"):
            lines.append(_line(row, vanilla, labels.get(row["method"], row["method"]), None))
    for site in dict.fromkeys(row["site"] for row in rows if row["site"]):
        here = [row for row in rows if row["site"] == site]
        for method in dict.fromkeys(row["method"] for row in here):
            draws = [row for row in here if row["method"] == method]
            name = _name(draws[0], labels)
            if len(draws) == 1 and method not in CONTROLS:
                lines.append(_line(draws[0], vanilla, name, adjusted[id(draws[0])]))
            else:
                gains = sorted(gain(row, vanilla) for row in draws)
                lines.append(
                    f"| {name}, {len(draws)} draws | | | | {gains[0]:+.1f} / {median(gains):+.1f} / {gains[-1]:+.1f} "
                    f"(min / median / max) | | | |"
                )
    return "\n".join(lines)


def more(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """The measures beside the one that settings were chosen by; "" where there are none. Draws show their median."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    measures = [name for name in vanilla["measures"] if name != vanilla["measure"]]
    extras = list(vanilla["extras"])
    if not measures + extras:
        return ""
    shares = {name for name in measures if isinstance(vanilla["columns"][name], str)}
    lines = [
        f"Beside it, on the same {vanilla['n']} items: [95 % interval], Wilson for shares in %, else bootstrap. Where steered: "
        "the p of the paired difference to vanilla (McNemar, or sign-flip), not adjusted. Figures of all texts together "
        "have no interval.",
        "",
        "| method | " + " | ".join(measures + extras) + " |",
        "|---|" + "--:|" * len(measures + extras),
    ]
    for method, site in dict.fromkeys((row["method"], row["site"]) for row in rows):
        draws = [row for row in rows if (row["method"], row["site"]) == (method, site)]
        name = _name(draws[0], labels)
        name += f", {len(draws)} draws" if len(draws) > 1 else ""
        row = sorted(draws, key=lambda row: row["right"])[len(draws) // 2]
        shown = [
            _with_interval(row["measures"][measure], 100 if measure in shares else 1)
            + (f", p = {_paired(row, vanilla, measure):.1g}" if site else "")
            for measure in measures
        ]
        lines.append(
            "| " + " | ".join([name, *shown, *(_three_digits(row["extras"].get(key)) for key in extras)]) + " |"
        )
    return "\n".join(lines)


def costs(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """What each method took before its first answer, how much it touches at every token, and what the test took."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")["cost"]["test_s"]
    lines = [
        "| method | prepared in, s | settings tried | AUs touched | test, against vanilla's time |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "prepare_s" in row["cost"] and row["draw"] == 0:
            name = _name(row, labels)
            seconds = row["cost"]["prepare_s"]
            took = "not known, shipped ranks" if seconds is None else f"{seconds:.2f}"
            tested = f"{row['cost']['test_s'] / vanilla:.2f}" if row["settings"] and vanilla else ""
            lines.append(f"| {name} | {took} | {len(row['grid'])} | {row['touched']} | {tested} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def verdict(rows: Sequence[dict], labels: dict[str, str]) -> list[str]:
    """What the table says about each method, in words: does it beat the controls of its site?"""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    said = []
    for site in dict.fromkeys(row["site"] for row in rows if row["site"]):
        here = [row for row in rows if row["site"] == site]
        controls = {m: [gain(row, vanilla) for row in here if row["method"] == m] for m in CONTROLS}
        for method in ("published", "causal"):
            for row in [row for row in here if row["method"] == method]:
                mine = gain(row, vanilla)
                against = [
                    f"{sum(mine > other for other in gains)} of {len(gains)} {labels[control]}"
                    for control, gains in controls.items()
                    if gains
                ]
                if not against:
                    said.append(f"{labels[method]}, {SITES[site]}: {mine:+.1f} points; no controls were run beside it")
                    continue
                beaten = all(mine > other for gains in controls.values() for other in gains)
                sure = "" if row["p"] < 0.05 else ", which is no sure gain"
                said.append(
                    f"{labels[method]}, {SITES[site]}: {mine:+.1f} points (p = {row['p']:.1g}{sure}); it "
                    + ("beats every control" if beaten else "does NOT beat every control")
                    + f" ({' and '.join(against)} gain less)"
                )
    return said


def gain(row: dict, vanilla: dict) -> float:
    return 100 * (row["right"] / row["n"] - vanilla["right"] / vanilla["n"])


def _name(row: dict, labels: dict[str, str]) -> str:
    name = labels.get(row["method"], row["method"]) + (f", {SITES[row['site']]}" if row["site"] else "")
    options = ", ".join(f"{key}={value}" for key, value in (row["options"] or {}).items())
    return f"{name} ({options})" if options else name


def _line(row: dict, vanilla: dict, name: str, adjusted: float | None) -> str:
    low, high = wilson(row["right"], row["n"])
    settings = ", ".join(f"{key}={value:g}" for key, value in (row.get("settings") or {}).items())
    cells = [name, settings, str(row.get("touched", ""))]
    cells.append(f"{100 * row['right'] / row['n']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    steered = row["method"] != "vanilla"
    cells.append(f"{gain(row, vanilla):+.1f}" if steered else "")
    cells.append(f"{row['gained']} / {row['lost']}" if "gained" in row else "")
    cells.append(f"{row['p']:.1g}" if "p" in row else "")
    cells.append("" if adjusted is None else f"{adjusted:.1g}")
    return "| " + " | ".join(cells) + " |"


def _paired(row: dict, vanilla: dict, measure: str) -> float:
    after, before = row["columns"][measure], vanilla["columns"][measure]
    if isinstance(after, str):
        return mcnemar(unpack(before), unpack(after))[2]
    return sign_flip([a - b for a, b in zip(after, before, strict=True)])


def _with_interval(measure: dict[str, float], unit: int) -> str:
    value, low, high = (unit * measure[key] for key in ("value", "low", "high"))
    digits = 1 if unit == 100 else 3
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _three_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
