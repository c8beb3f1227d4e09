"""Print the rows of a restoration as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from eval.statistics import mcnemar
from experiments import records
from experiments.restoration.lab import Lab


def table(rows: Sequence[dict], lab: Lab) -> str:
    """Return a line per row, each compared with the pruned model."""
    achieved, material = rows[1]["achieved"], lab.material
    columns = [next(iter(records.unpack_columns(row["columns"]).values())) for row in rows]
    paired = all(isinstance(value, bool) for value in columns[1])
    percent = 100 if paired else 1
    chosen_on = "held-out instructions" if material.held_out else "validation items of the task"
    lines = [
        f"{lab.pruning}, {lab.sparsity}: {achieved['zeros']:,} of {achieved['weights']:,} weights are zero "
        f"({100 * achieved['zeros'] / achieved['weights']:.2f} %); calibrated on {material.calibrated_on}",
        f"{rows[0]['measure']} on {rows[0]['n']} items of {lab.bench.task.test_split} [95 % interval]; up / down and p: exact "
        f"McNemar test against pruned; grid points chosen on {chosen_on}; numbers: those learned or computed for the row",
        "",
        f"| model | grid point | AUs shifted | numbers | right | perplexity of {material.text_name} | up / down | p |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row, values in zip(rows, columns, strict=True):
        value, low, high = (percent * row[key] for key in ("value", "low", "high"))
        point = ", ".join(f"{key}={value:g}" for key, value in (row.get("settings") or {}).items())
        cells = [row["label"], point, str(row["touched"] or ""), f"{row['numbers']:,}" if row["numbers"] else ""]
        cells += [f"{value:.1f} [{low:.1f}, {high:.1f}]", f"{row['perplexity']:.3f}"]
        gained, lost, p = mcnemar(columns[1], values) if paired else (0, 0, 1.0)
        cells += [f"{gained} / {lost}", f"{p:.1g}"] if paired and values is not columns[1] else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_zero_shot(rows)])


def _zero_shot(rows: Sequence[dict]) -> list[str]:
    """Return a second table, of lm-eval's accuracies, if they were measured."""
    if "lm_eval" not in rows[0]:
        return []
    names = list(rows[0]["lm_eval"])
    lines = ["", "Zero-shot accuracy by lm-eval (acc, not acc_norm), in %, ± its standard error", ""]
    lines += ["| model | " + " | ".join(names) + " | mean |", "|---|" + "--:|" * (len(names) + 1)]
    for row in rows:
        scores = row["lm_eval"].values()
        cells = [f"{100 * score['accuracy']:.1f} ± {100 * score['stderr']:.1f}" for score in scores]
        mean = sum(score["accuracy"] for score in scores) / len(names)
        lines.append("| " + " | ".join([row["label"], *cells, f"{100 * mean:.1f}"]) + " |")
    return lines
