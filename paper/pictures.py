"""Records -> the pictures of a spec: curves and heat maps of cells, and what the studies draw."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eval.figures import grid_map
from eval.records import unpack
from eval.statistics import wilson
from paper.manifest import Manifest
from paper.specs import Spec
from paper.tables import accuracy
from studies import STUDIES

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")  # Okabe and Ito
MARKERS = "osD^vP*"


def draw(spec: Spec, manifest: Manifest, folder: Path) -> list[tuple[str, Path]]:
    """(caption, file) of every picture that the records allow."""
    if spec.kind == "study":
        return [
            made
            for panel in spec.panels
            if (record := manifest.panel(spec.name, panel.name)) is not None
            for made in [_study(spec, panel, record, folder)]
        ]
    if spec.kind in ("lines", "heatmap"):
        path = folder / f"{spec.name}.png"
        plt.rcParams.update({"font.size": 12, "axes.titlesize": 13, "figure.dpi": 110})
        drawn = (_lines if spec.kind == "lines" else _heatmaps)(spec, manifest, path)
        return [(f"{spec.label}: {spec.title}", path)] if drawn else []
    return []


def _study(spec: Spec, panel, record: dict, folder: Path) -> tuple[str, Path]:
    path = folder / f"{spec.name}-{'-'.join(re.findall('[a-z0-9]+', panel.name.lower()))}.png"
    STUDIES[panel.study].draw(record["found"], panel.params, path)
    return f"{spec.label}: {spec.title} ({panel.name})", path


def _lines(spec: Spec, manifest: Manifest, path: Path) -> bool:
    """A panel a block, a line a row; draws of a control are a band."""
    figure, axes = plt.subplots(1, len(spec.blocks), figsize=(7 * len(spec.blocks), 4.8), squeeze=False, sharey=False)
    xs, drawn = [says["x"] for says in spec.columns.values()], False
    for axis, block in zip(axes[0], spec.blocks, strict=True):
        for index, (label, _, values) in enumerate(accuracy(spec, manifest, block).rows):
            shown = [(x, value) for x, value in zip(xs, values, strict=True) if value.number is not None]
            if not shown:
                continue
            drawn = True
            color, at = PALETTE[index % len(PALETTE)], [x for x, _ in shown]
            axis.plot(at, [value.number for _, value in shown], marker=MARKERS[index], color=color, label=label)
            lows, highs = zip(*(_range(value) for _, value in shown), strict=True)
            axis.fill_between(at, lows, highs, color=color, alpha=0.15, lw=0)
        axis.set(xlabel=spec.show["x"], ylabel="accuracy, %", title=block)
        if spec.show.get("log"):
            axis.set_xscale("log")
            axis.set_xticks(xs, [f"{x:g}" for x in xs], rotation=45)
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=10)
    _save(figure, path)
    return drawn


def _range(value) -> tuple[float, float]:
    """Of draws, least to most; of one run, its interval."""
    shares = [100 * sum(hits) / len(hits) for hits in value.hits]
    if len(shares) > 1:
        return min(shares), max(shares)
    return tuple(100 * edge for edge in wilson(sum(value.hits[0]), len(value.hits[0])))


def _heatmaps(spec: Spec, manifest: Manifest, path: Path) -> bool:
    """A panel a row and column of the spec: the whole grid, k upwards, alpha to the right."""
    places = [(block, row, column) for block in spec.blocks for row in spec.rows for column in spec.columns]
    found = [(place, records[0]) for place in places if (records := manifest.records(spec.name, *place))]
    if not found:
        return False
    wide = len(spec.columns)
    high = -(-len(found) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(5.4 * wide, 4.4 * high), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, ((block, row, column), record) in zip(axes.flat, found, strict=False):
        before = unpack(record["grid_vanilla"])
        title = f"{column}: {spec.rows[row]['label']}\n{block}, vanilla {100 * sum(before) / len(before):.1f}"
        grid_map(axis, record["grid_scores"], title, 1, f"{record['measure']}, %")
    _save(figure, path)
    return True


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
