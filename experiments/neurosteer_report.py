"""Turn the records of NeuroSteer's tasks into tables, and those of a sweep into a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.data.behaviours import BEHAVIOURS
from eval.statistics import bootstrap, paired_bootstrap, resampled_ratios
from experiments.neurosteer_sweep import Value
from experiments.plots import Panel, curves

Swept = Sequence[tuple[dict[str, Value], dict]]  # swept values and the record of each point
Estimate = tuple[float, float, float]  # with its 95 % interval
PerPrompt = list | dict  # a measure with a value per prompt: the values, or the nats and tokens of a perplexity


def table(record: dict) -> str:
    """Return a Markdown table, a line per measure and, with several files of prompts, a line per file."""
    lines = [
        f"## {_title(record)}",
        "",
        f"{record['settings']['neurons']} neurons of layer {record['layer']}, alpha {record['settings']['alpha']:g}, "
        f"{record['texts']} texts of each kind; {_sampled(record)}; [95 % interval, paired bootstrap over prompts]",
        "",
        "| measure | unsteered | steered | difference |",
        "|---|--:|--:|--:|",
    ]
    sets = record["prompt_sets"] if len(record["prompt_sets"]) > 1 else []
    for name, before in record["unsteered"].items():
        after = record["steered"][name]
        lines.append(_line(name, before, after))
        start = 0
        for file, count in sets if isinstance(before, PerPrompt) else []:
            part = slice(start, start := start + count)
            lines.append(_line(f"{name}: {count} {file}", _part(before, part), _part(after, part)))
    return "\n".join(lines) + "\n"


def _line(name: str, before, after) -> str:
    if isinstance(before, str):
        cells = ["-", "-", before]
    elif isinstance(before, PerPrompt):
        gain, low, high = difference(before, after)
        cells = [f"{_value(before):.3f}", f"{_value(after):.3f}", f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"]
    else:
        cells = [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
    return f"| {name} | {' | '.join(cells)} |"


def sweep_table(swept: Swept) -> str:
    """Return a Markdown table, a line per point: the rate that steering aims at, and perplexity."""
    values, record = swept[0]
    shown = _shown(record)
    fixed = {
        "k": f"{record['settings']['neurons']} neurons",
        "layer": f"layer {record['layer']}",
        "alpha": f"alpha {record['settings']['alpha']:g}",
        "n-texts": f"{record['texts']} texts of each kind",
    }
    missing = [f"; {name}: {text}" for name, text in record["unsteered"].items() if isinstance(text, str)]
    head = [*values, *(cell for name in shown for cell in (name, "difference"))]
    base = [cell for name in shown for cell in (_with_interval(estimate(record["unsteered"][name])), "")]
    lines = [
        f"## {_title(record)}, by {' and '.join(values)}",
        "",
        f"{', '.join(text for name, text in fixed.items() if name not in values)}; {_sampled(record)}; "
        f"[95 % interval, bootstrap over prompts; differences to unsteered are paired]{''.join(missing)}",
        "",
        f"| {' | '.join(head)} |",
        f"|{'--:|' * len(head)}",
        f"| unsteered |{' |' * (len(values) - 1)} {' | '.join(base)} |",
    ]
    for values, record in swept:
        cells = [f"{value:g}" for value in values.values()]
        for name in shown:
            before, after = record["unsteered"][name], record["steered"][name]
            cells += [_with_interval(estimate(after)), _with_interval(difference(before, after), "+")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sweep_figure(swept: Swept, path: Path) -> None:
    """Draw the rate and perplexity against the first swept value, a line per combination of the others."""
    x, *others = swept[0][0]
    panels = []
    for name in _shown(swept[0][1]):
        lines: dict[str, list[tuple[float, Estimate]]] = {}
        for values, record in swept:
            label = ", ".join(f"{other} {values[other]:g}" for other in others)
            lines.setdefault(label, []).append((values[x], estimate(record["steered"][name])))
        is_perplexity = isinstance(swept[0][1]["unsteered"][name], dict)
        panels.append(Panel(name, estimate(swept[0][1]["unsteered"][name]), lines, is_perplexity))
    curves(panels, x, _title(swept[0][1]), path)


def estimate(values: PerPrompt) -> Estimate:
    low, high = np.percentile(_perplexities(values), (2.5, 97.5)) if isinstance(values, dict) else bootstrap(values)
    return _value(values), float(low), float(high)


def difference(before: PerPrompt, after: PerPrompt) -> Estimate:
    if isinstance(before, list):
        return paired_bootstrap(before, after)
    low, high = np.percentile(_perplexities(after) - _perplexities(before), (2.5, 97.5))
    return _value(after) - _value(before), float(low), float(high)


def _value(values: PerPrompt) -> float:
    if isinstance(values, list):
        return sum(values) / len(values)
    tokens = sum(values["tokens"])
    return float(np.exp(sum(values["nats"]) / tokens)) if tokens else float("nan")


def _perplexities(values: dict) -> np.ndarray:
    return np.exp(resampled_ratios(values["nats"], values["tokens"]))


def _part(values: PerPrompt, part: slice) -> PerPrompt:
    return values[part] if isinstance(values, list) else {name: column[part] for name, column in values.items()}


def _shown(record: dict) -> list[str]:
    """Return the names of the measures to show: the rate, unless it needs a judge that is missing, and perplexity."""
    measures = record["unsteered"]
    first = next(iter(measures))
    rate = [first] if isinstance(measures[first], list) else []
    return rate + [name for name, values in measures.items() if isinstance(values, dict)]


def _title(record: dict) -> str:
    behaviour = BEHAVIOURS[record["task"]]
    towards = behaviour.source if record["reverse"] else behaviour.target
    return f"NeuroSteer, {record['task']}, towards {towards}: {record['model']}"


def _sampled(record: dict) -> str:
    how = record["sampling"]
    return (
        f"steered tokens: {record['tokens']}; {record['prompts']} prompts, {how['samples']} samples each, "
        f"{how['new_tokens']} new tokens, seed {how['seed']}"
    )


def _with_interval(values: Estimate, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.3f}" for number in values)
    return f"{value} [{low}, {high}]"
