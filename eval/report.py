"""Records -> the table a person reads, and what it says in words. Built from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from eval.statistics import wilson

SITES = {"attention": "Head", "ffn": "FFN", "layer": "Layer"}


def table(rows: Sequence[dict], labels: dict[str, str]) -> str:
    """Markdown: one line a method and site; repeated draws of a control become one line with their band."""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    extra = "mean_log_odds" in vanilla
    lines = [
        f"{vanilla['measure']} on {vanilla['n']} items of {vanilla['test_split']}; gains in points against vanilla; "
        "[95 % Wilson interval]; p: exact McNemar, paired",
        "",
        "| method | k | alpha | right | gain | up / down | p |" + (" log-odds | perplexity |" if extra else ""),
        "|---|--:|--:|--:|--:|--:|--:|" + ("--:|--:|" if extra else ""),
    ]
    for row in rows:
        if row["method"] in ("vanilla", "prompt-only"):
            lines.append(_line(row, vanilla, labels.get(row["method"], row["method"]), extra))
    for site in dict.fromkeys(row["site"] for row in rows if row["site"]):
        here = [row for row in rows if row["site"] == site]
        for method in dict.fromkeys(row["method"] for row in here):
            draws = [row for row in here if row["method"] == method]
            name = f"{labels[method]}, {SITES[site]}"
            if len(draws) == 1 and method not in ("random", "flipped"):
                lines.append(_line(draws[0], vanilla, name, extra))
            else:
                gains = sorted(gain(row, vanilla) for row in draws)
                blank = " |" * (2 if extra else 0)
                lines.append(
                    f"| {name}, {len(draws)} draws | | | | {gains[0]:+.1f} / {median(gains):+.1f} / {gains[-1]:+.1f} "
                    f"(min / median / max) | | |{blank}"
                )
    return "\n".join(lines)


def verdict(rows: Sequence[dict], labels: dict[str, str]) -> list[str]:
    """What the table says about each method, in words: does it beat the controls of its site?"""
    vanilla = next(row for row in rows if row["method"] == "vanilla")
    said = []
    for site in dict.fromkeys(row["site"] for row in rows if row["site"]):
        here = [row for row in rows if row["site"] == site]
        controls = {m: [gain(row, vanilla) for row in here if row["method"] == m] for m in ("random", "flipped")}
        for method in ("published", "causal"):
            for row in [row for row in here if row["method"] == method]:
                mine = gain(row, vanilla)
                against = [
                    f"{sum(mine > other for other in gains)} of {len(gains)} {labels[control]}"
                    for control, gains in controls.items()
                    if gains
                ]
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


def _line(row: dict, vanilla: dict, name: str, extra: bool) -> str:
    low, high = wilson(row["right"], row["n"])
    cells = [name, _number(row.get("k")), _number(row.get("alpha"))]
    cells.append(f"{100 * row['right'] / row['n']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    steered = row["method"] != "vanilla"
    cells.append(f"{gain(row, vanilla):+.1f}" if steered else "")
    cells.append(f"{row['gained']} / {row['lost']}" if "gained" in row else "")
    cells.append(f"{row['p']:.1g}" if "p" in row else "")
    if extra:
        cells += [f"{row['mean_log_odds']:+.2f}", f"{row['perplexity']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
