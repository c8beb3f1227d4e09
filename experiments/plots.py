"""Plot comparisons and sweeps, in the Okabe-Ito colors, which color-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from eval.statistics import wilson
from experiments.parts_report import Line
from experiments.report import CONTROLS, SITES, gain, row_name, vanilla_of

COLORS = {
    "vanilla": "#555555", "prompt-only": "#000000", "random": "#999999", "flipped": "#E69F00",
    "published": "#0072B2", "sign-aware": "#56B4E9", "causal": "#D55E00",
}  # fmt: skip
OTHERS = "#009E73"
PARTS = {"skill": "#009E73", "bias": "#E69F00", "format": "#999999"}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDE = 10  # an axis whose values differ by more than this factor is logarithmic


def comparison(
    by_task: dict[str, Sequence[dict]],
    scores: dict[str, dict[str, np.ndarray]],
    labels: dict[str, str],
    method: str,
    path: Path,
) -> None:
    """Draw a row per task: gains with intervals, one method's scores by layer and dimension, and its grid."""
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "figure.dpi": 110})
    lines = max(len({(row["method"], row["site"]) for row in rows}) for rows in by_task.values())
    size = (19, max(4.6, 0.36 * lines) * len(by_task))
    figure, axes = plt.subplots(len(by_task), 3, figsize=size, squeeze=False, width_ratios=(1.5, 1, 1))
    for (left, middle, right), (task, rows) in zip(axes, by_task.items(), strict=True):
        _bars_of_comparison(left, rows, labels, task)
        best = max((row for row in rows if row["method"] == method), key=lambda row: row["right"])
        where = f"{labels[method]}, {SITES[best['site']]}"
        _score_map(middle, scores[task][best["site"]], f"{task}: scores, {where}")
        if best["grid_scores"]:
            ks, alphas, values = grid_of(best["grid_scores"])
            heat_map(right, ks, alphas, 100 * values, f"{task}: {where}, validation %")
        else:
            right.axis("off")
            right.text(0.5, 0.5, "k and alpha were given:\nno search", ha="center", va="center")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


@dataclass(frozen=True)
class Panel:
    """Hold the curves of one measure. Every estimate is (value, low, high), with its 95 % interval."""

    label: str
    base: tuple[float, float, float]  # the estimate for the unsteered model
    lines: dict[str, Sequence[tuple[float, tuple[float, float, float]]]]  # label -> (x, estimate) of each point
    logarithmic: bool = False  # where values span more than a factor of WIDE


def curves(panels: Sequence[Panel], x_label: str, title: str, path: Path) -> None:
    """Draw measures against a swept value, side by side, with their intervals."""
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "figure.dpi": 110})
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.8), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        value, low, high = panel.base
        axis.axhline(value, color=COLORS["vanilla"], lw=1.5, ls="--", label="unsteered")
        axis.axhspan(low, high, color=COLORS["vanilla"], alpha=0.15, lw=0)
        for color, (label, points) in zip(LINES * len(panel.lines), panel.lines.items(), strict=False):
            xs, estimates = zip(*sorted(points), strict=True)
            middle, low, high = zip(*estimates, strict=True)
            axis.fill_between(xs, low, high, color=color, alpha=0.2, lw=0)
            axis.plot(xs, middle, "o-", color=color, label=label or "steered")
        shown = [estimate[0] for points in panel.lines.values() for _, estimate in points]
        if panel.logarithmic and max(shown) > WIDE * min(shown):
            axis.set_yscale("log")
        swept = sorted({x for points in panel.lines.values() for x, _ in points})
        if swept[0] > 0 and swept[-1] > WIDE * swept[0]:
            axis.set_xscale("log")
        axis.set_xticks(swept, [f"{x:g}" for x in swept])
        axis.xaxis.minorticks_off()
        axis.set(xlabel=x_label, title=panel.label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


Points = Sequence[tuple[float, tuple[float, float, float]]]  # (KL, (gain, low, high)) of a method


def gains(by_task: dict[str, dict[str, Points] | Sequence[Line]], path: Path) -> None:
    """Draw the gains of each task: what they are made of, or curves over KL, or where there is one level alone a line per method."""
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "figure.dpi": 110})
    kinds = {task: _kind(shown) for task, shown in by_task.items()}
    heights = [6.0 if kinds[task] is _kl_curves else 1.2 + 0.38 * len(shown) for task, shown in by_task.items()]
    figure, axes = plt.subplots(len(by_task), 1, figsize=(12, sum(heights) + 0.4), squeeze=False, height_ratios=heights)
    for axis, (task, shown) in zip(axes[:, 0], by_task.items(), strict=True):
        kinds[task](axis, shown)
        axis.set_title(task)
        axis.set_axisbelow(True)
        axis.grid(axis="both" if kinds[task] is _kl_curves else "x", alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _kind(shown: dict[str, Points] | Sequence[Line]) -> Callable:
    """Return the function that draws this."""
    if not isinstance(shown, dict):
        return _parts
    return _kl_curves if max(map(len, shown.values())) > 1 else _at_one_kl


def _kl_curves(axis, by_name: dict[str, Points]) -> None:
    """Draw a curve per method, and a point for what has no strength."""
    for color, marker, (name, points) in zip(cycle(LINES), cycle("osD^vP*X"), by_name.items(), strict=False):
        kls, estimates = zip(*sorted(points), strict=True)
        middle, low, high = zip(*estimates, strict=True)
        if len(points) > 1:
            axis.fill_between(kls, low, high, color=color, alpha=0.12, lw=0)
            axis.plot(kls, middle, marker=marker, color=color, lw=1.8, label=name)
        else:
            reach = [[middle[0] - low[0]], [high[0] - middle[0]]]
            axis.errorbar(kls, middle, reach, fmt=marker, color=color, ms=9, capsize=4, label=name)
    axis.axhline(0, color=COLORS["vanilla"], lw=1)
    axis.set_xscale("log")
    swept = sorted({float(f"{kl:.1g}") for points in by_name.values() if len(points) > 1 for kl, _ in points})
    axis.set_xticks(swept, [f"{kl:g}" for kl in swept])
    axis.xaxis.minorticks_off()
    axis.set(
        xlabel="KL of the unsteered to the steered model, nats per token of neutral text",
        ylabel="gain over vanilla, points",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10)


def _at_one_kl(axis, by_name: dict[str, Points]) -> None:
    """Draw one line per method: its gain with the interval, labelled with its name and KL."""
    for y, points in enumerate(by_name.values()):
        ((_, (middle, low, high)),) = points
        axis.errorbar([middle], [y], xerr=[[middle - low], [high - middle]], fmt="o", color=LINES[0], ms=7, capsize=3)
    axis.axvline(0, color=COLORS["vanilla"], lw=1)
    axis.set_yticks(range(len(by_name)), [f"{name}, {points[0][0]:.2g} nats" for name, points in by_name.items()])
    axis.invert_yaxis()
    axis.set_xlabel("gain over vanilla, points")


def _parts(axis, lines: Sequence[Line]) -> None:
    """Draw a bar per method, the parts of its gain side by side, and a diamond at their sum."""
    for y, line in enumerate(lines):
        ends = {1: 0.0, -1: 0.0}  # parts that gain are stacked to the right, those that lose to the left
        for name, part in line.parts.items():
            side = 1 if part.gain >= 0 else -1
            axis.barh(y, part.gain, left=ends[side], height=0.62, color=PARTS[name], label=name if not y else None)
            ends[side] += part.gain
        axis.plot(line.total, y, "D", color="#000000", ms=6, label="gain" if not y else None)
    axis.use_sticky_edges = False  # bars leave no room for the diamonds at their ends
    axis.margins(x=0.05)
    axis.axvline(0, color=COLORS["vanilla"], lw=1)
    axis.set_yticks(range(len(lines)), [line.name for line in lines])
    axis.invert_yaxis()
    axis.set_xlabel("gain over vanilla, points of exact match")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=11)


def _bars_of_comparison(axis, rows: Sequence[dict], labels: dict[str, str], task: str) -> None:
    vanilla = vanilla_of(rows)
    runs = list(dict.fromkeys((row["method"], row["site"]) for row in rows if row["method"] != "vanilla"))
    names = []
    for y, (method, site) in enumerate(runs):
        draws = [row for row in rows if (row["method"], row["site"]) == (method, site)]
        gains = [gain(row, vanilla) for row in draws]
        names.append(row_name(method, site, labels))
        color = COLORS.get(method, OTHERS)
        if len(draws) > 1 or method in CONTROLS:
            axis.plot([min(gains), max(gains)], [y, y], color=color, lw=7, alpha=0.35, solid_capstyle="butt")
            axis.plot(gains, [y] * len(gains), "|", color=color, ms=13, mew=2)
        else:
            base = 100 * vanilla["right"] / vanilla["n"]
            low, high = (100 * edge - base for edge in wilson(draws[0]["right"], draws[0]["n"]))
            axis.plot([low, high], [y, y], color=color, lw=2.5)
            axis.plot(gains, [y], "o", color=color, ms=9)
    axis.axvline(0, color="#555555", lw=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(f"gain over vanilla, points of {vanilla['measure']}")
    axis.set_title(f"{task}: vanilla {100 * vanilla['right'] / vanilla['n']:.1f} %, n = {vanilla['n']}")
    axis.grid(axis="x", alpha=0.3)


def _score_map(axis, score: np.ndarray, title: str) -> None:
    limit = float(np.abs(score).max()) or 1.0
    image = axis.imshow(score, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(xlabel="dimension", ylabel="layer", title=title)
    axis.set_yticks(range(score.shape[0])) if score.shape[0] <= 12 else None
    axis.figure.colorbar(image, ax=axis, label="score: scale up (+) or down (-)")


def grid_of(grid_scores: dict[str, float]) -> tuple[list[float], list[float], np.ndarray]:
    """Return the ks and alphas of a search, ascending, and its scores: a row per k, a column per alpha."""
    cells = {tuple(map(float, key.split(","))): score for key, score in grid_scores.items()}
    ks, alphas = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    return ks, alphas, np.array([[cells[k, alpha] for alpha in alphas] for k in ks])


def heat_map(
    axis,
    ks: Sequence[float],
    alphas: Sequence[float],
    values: np.ndarray,
    title: str,
    digits: int = 0,
    label: str = "",
    **style,
) -> None:
    """Draw numbers over a grid, k upwards, alpha to the right."""
    image = axis.imshow(values, aspect="auto", origin="lower", **{"cmap": "cividis", **style})
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=ink(image, value))
    axis.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
    axis.set_yticks(range(len(ks)), [f"{k:g}" for k in ks])
    axis.set(xlabel="α", ylabel="k", title=title)
    axis.figure.colorbar(image, ax=axis, label=label)


def ink(image, value: float) -> str:
    """Return black or white, whichever is readable on the color in which an image shows a value."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "white" if np.isfinite(value) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
