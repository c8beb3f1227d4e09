"""Turn the records of a comparison into its tables, and say in words what they show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from austeer.methods.registry import METHODS
from eval.statistics import holm, mcnemar, sign_flip, wilson
from experiments.records import unpack

LABELS = {"vanilla": "vanilla", "prompt-only": "prompt only", **{name: m.label for name, m in METHODS.items()}}
SITES = {
    "attention": "Head", "ffn": "FFN", "layer": "Layer", "neuron": "Neuron", "both": "Head+FFN",
    "attention+neuron": "Head+Neuron", "prompt": "",
}  # fmt: skip
CONTROLS = ("random", "flipped", "random-at-kl", "shuffled-pairs")  # repeated with other draws and shown as bands


def vanilla_of(rows: Sequence[dict]) -> dict:
    """Return the record of the unsteered model."""
    return next(row for row in rows if row["method"] == "vanilla")


def table(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Return a Markdown table, a line per method and site; the draws of a control share one line with their band."""
    vanilla = vanilla_of(rows)
    lines = [
        f"{vanilla['measure']} on {vanilla['n']} items of {vanilla['test_split']}; gains in points against vanilla; "
        "[95 % Wilson interval]; p: exact McNemar test, paired; Holm: that p, adjusted for all lines of this table; "
        "turned over: AUs whose sign changes, by gamma below -1",
        "",
        "| method | grid point | AUs | right | gain | up / down | p | Holm |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    places = Counter((row["method"], row["site"]) for row in rows)  # of what is drawn several times, no draw is tested
    tested = [
        row for row in rows if row["site"] and row["method"] not in CONTROLS and places[row["method"], row["site"]] == 1
    ]
    adjusted = dict(zip(map(id, tested), holm([row["p"] for row in tested]), strict=True))
    for row in rows:
        if row["method"] in ("vanilla", "prompt-only"):
            lines.append(_line(row, vanilla, labels.get(row["method"], row["method"]), None))
    for site in dict.fromkeys(row["site"] for row in rows if row["site"]):
        site_rows = [row for row in rows if row["site"] == site]
        for method in dict.fromkeys(row["method"] for row in site_rows):
            draws = [row for row in site_rows if row["method"] == method]
            name = name_of(draws[0], labels)
            if len(draws) == 1 and method not in CONTROLS:
                lines.append(_line(draws[0], vanilla, name, adjusted[id(draws[0])]))
            else:
                gains = sorted(gain(row, vanilla) for row in draws)
                lines.append(
                    f"| {name}, {len(draws)} draws | | | | {gains[0]:+.1f} / {median(gains):+.1f} / {gains[-1]:+.1f} "
                    f"(min / median / max) | | | |"
                )
    return "\n".join(lines)


def other_measures(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Return a table of the measures beside the main one; "" where there are none. Draws show their median."""
    vanilla = vanilla_of(rows)
    measures = [name for name in vanilla["measures"] if name != vanilla["measure"]]
    extras = list(vanilla["extras"])
    if not measures + extras:
        return ""
    shares = {name for name in measures if isinstance(vanilla["columns"][name], str)}
    lines = [
        f"Other measures on the same {vanilla['n']} items: [95 % interval], Wilson for shares in %, else bootstrap. Steered rows "
        "have the p of their paired difference from vanilla (McNemar, or sign-flip), not adjusted. Figures of all texts "
        "together have no interval.",
        "",
        "| method | " + " | ".join(measures + extras) + " |",
        "|---|" + "--:|" * len(measures + extras),
    ]
    for method, site in dict.fromkeys((row["method"], row["site"]) for row in rows):
        draws = [row for row in rows if (row["method"], row["site"]) == (method, site)]
        name = name_of(draws[0], labels)
        name += f", {len(draws)} draws" if len(draws) > 1 else ""
        row = sorted(draws, key=lambda row: row["right"])[len(draws) // 2]
        values = [
            with_interval(row["measures"][measure], 100 if measure in shares else 1)
            + (f", p = {_paired(row, vanilla, measure):.1g}" if site else "")
            for measure in measures
        ]
        lines.append(
            "| " + " | ".join([name, *values, *(_three_digits(row["extras"].get(key)) for key in extras)]) + " |"
        )
    return "\n".join(lines)


def costs(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Return a table of what each method cost: time to prepare, grid points tried, AUs steered, and time of the test."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")["cost"]["test_s"]
    lines = [
        "| method | preparation, s | grid points tried | AUs steered | test time / vanilla's |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "prepare_s" in row["cost"] and row["draw"] == 0:
            name = name_of(row, labels)
            seconds = row["cost"]["prepare_s"]
            preparation = "unknown: shipped ranks" if seconds is None else f"{seconds:.2f}"
            test_time = f"{row['cost']['test_s'] / vanilla:.2f}" if row["settings"] and vanilla else ""
            lines.append(f"| {name} | {preparation} | {len(row['grid'])} | {row['touched']} | {test_time} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def verdict(rows: Sequence[dict], labels: dict[str, str]) -> list[str]:
    """Say of each method in words whether it beats the controls of its site."""
    vanilla = vanilla_of(rows)
    sentences = []
    for site in dict.fromkeys(row["site"] for row in rows if row["site"]):
        site_rows = [row for row in rows if row["site"] == site]
        controls = {m: [gain(row, vanilla) for row in site_rows if row["method"] == m] for m in CONTROLS}
        for method in ("published", "causal"):
            for row in [row for row in site_rows if row["method"] == method]:
                own_gain = gain(row, vanilla)
                wins = [
                    f"{sum(own_gain > other for other in gains)} of {len(gains)} {labels[control]}"
                    for control, gains in controls.items()
                    if gains
                ]
                if not wins:
                    sentences.append(f"{labels[method]}, {SITES[site]}: {own_gain:+.1f} points; no controls were run")
                    continue
                beaten = all(own_gain > other for gains in controls.values() for other in gains)
                caveat = "" if row["p"] < 0.05 else ", not significant"
                sentences.append(
                    f"{labels[method]}, {SITES[site]}: {own_gain:+.1f} points (p = {row['p']:.1g}{caveat}); it "
                    + ("beats every control" if beaten else "does NOT beat every control")
                    + f" ({' and '.join(wins)} gain less)"
                )
    return sentences


def gain(row: dict, vanilla: dict) -> float:
    return 100 * (row["right"] / row["n"] - vanilla["right"] / vanilla["n"])


def row_name(method: str, site: str | None, labels: dict[str, str]) -> str:
    return ", ".join(filter(None, (labels.get(method, method), SITES.get(site))))


def name_of(row: dict, labels: dict[str, str]) -> str:
    name = row_name(row["method"], row["site"], labels)
    options = ", ".join(f"{key}={value}" for key, value in (row["options"] or {}).items())
    return f"{name} ({options})" if options else name


def cost_of(row: dict) -> str:
    """Say what the plan of a row was predicted to cost on neutral text, and what it costs; "" where nobody asked."""
    kl = row.get("kl")
    if not kl or not row.get("settings"):
        return ""
    predicted = "–" if kl["predicted"] is None else f"{kl['predicted']:.3g}"
    return f"; KL predicted {predicted}, measured {kl['measured']:.3g}"


def _line(row: dict, vanilla: dict, name: str, adjusted: float | None) -> str:
    low, high = wilson(row["right"], row["n"])
    point = ", ".join(f"{key}={value:g}" for key, value in (row.get("settings") or {}).items())
    point += cost_of(row)
    inverted = f", {row['inverted']} turned over" if row.get("inverted") else ""
    changed = f"{row['numbers']} numbers" if "numbers" in row else row.get("touched", "")  # an adapter sets no AU
    cells = [name, point, f"{changed}{inverted}"]
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


def with_interval(measure: dict[str, float], unit: int) -> str:
    value, low, high = (unit * measure[key] for key in ("value", "low", "high"))
    digits = 1 if unit == 100 else 3
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _three_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
