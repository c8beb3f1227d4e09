"""What the studies' pictures share. Colors are the Okabe-Ito set, safe for color-blind readers."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#555555"
SITES = {"attention": "attention", "ffn": "FFN"}


def subplots(columns: int = 1, size: tuple[float, float] = (8.0, 4.6), **options):
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 11.5, "figure.dpi": 110})
    return plt.subplots(1, columns, figsize=size, layout="constrained", **options)


def save(figure, path: Path) -> None:
    """The same picture, the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def write_values(axis, values: np.ndarray, image, form: str) -> None:
    """Each cell's number on it; none where there is no number."""
    texts = [[format(value, form) if np.isfinite(value) else "" for value in row] for row in values]
    write_labels(axis, values, image, texts)


def write_labels(axis, values: np.ndarray, image, texts: list[list[str]]) -> None:
    """In black or white, whichever can be read on the cell's color."""
    for (i, j), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = np.isfinite(value) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        color = "white" if dark else "black"
        axis.text(j, i, texts[i][j], ha="center", va="center", color=color, parse_math=False)
