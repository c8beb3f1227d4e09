"""Make the table and the picture of benchmarks/steering.py from its saved figures alone.

python benchmarks/steering_report.py benchmarks/results/steering-cpu.json docs/pictures/steering-cost.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from figures import markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"1": "#56B4E9", "8": "#0072B2", "32": "#000000"}  # Okabe-Ito, safe for color-blind readers
ADDED, SCALED = "a vector added to every layer", "100 AUs scaled, ffn"


def table(figures: dict) -> str:
    memory = figures["decoding, peak MB"]
    relative_memory = {name: f"{mb / memory['upstream']:.2f}" for name, mb in memory.items()}
    parts = [_decoding("time per token, 100 AUs", figures["decoding"], relative_memory)]
    growing = figures["growing k, batch 8"]
    parts.append(markdown(["live, k =", *growing], [["batch 8", *map(_ratio, growing.values())]]))
    for name, seconds in figures["screening, s"].items():
        first = next(iter(seconds.values()))
        growth = ["time", *(f"{s / first:.2f}" for s in seconds.values())]
        parts.append(markdown([f"screening, {name}", *seconds], [growth]))
    products = figures["matrix products at hidden 1024"]
    shares = [[name, f"{one['share']:.2f}"] for name, one in products.items()]
    parts.append(markdown(["screening at hidden 1024", "share of the matrix products' rate"], shares))
    above = figures["screening, MB above the model"]
    parts.append("screening, above the model: " + ", ".join(f"{mb:.0f} MB at {n} pairs" for n, mb in above.items()))
    return "\n\n".join([*parts, *_peers(figures["peers"])])


def _peers(peers: dict | str) -> list[str]:
    if isinstance(peers, str):
        return [f"peers: {peers}"]
    rates = peers["screening, pairs/s"]
    rows = [[name, f"{rate:.1f}", f"{rates['ours, default'] / rate:.2f}"] for name, rate in rates.items()]
    screening = markdown(["screening", "pairs per second", "ours, default, is faster by"], rows)
    return [screening, *(_decoding(plan, peers[plan]) for plan in (ADDED, SCALED))]


def _decoding(title: str, batches: dict, memory: dict[str, str] | None = None) -> str:
    """Return a table of ways by batch size, with a last column of peak memory if there are numbers."""
    head = [title, *(f"batch {batch}" for batch in batches), *(["memory"] if memory else [])]
    names = next(iter(batches.values()))
    rows = [[name, *(_ratio(ways[name]) for ways in batches.values())] for name in names]
    return markdown(head, [[*row, memory.get(row[0], "")] for row in rows] if memory else rows)


def _ratio(one: dict) -> str:
    return f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def draw(figures: dict, path: Path) -> None:
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "figure.dpi": 110})
    has_peers = isinstance(figures["peers"], dict)
    figure, axes = plt.subplots(
        1, 2 + has_peers, figsize=(12 + 5 * has_peers, 4.8), width_ratios=(1.4, *([1] * has_peers), 1)
    )
    _bars(axes[0], figures["decoding"], "Time per token over upstream's, 100 AUs")
    if has_peers:
        _bars(axes[1], figures["peers"][ADDED], "The same, a vector added to every layer")
    _growth(axes[-1], figures["screening, s"])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _bars(axis, batches: dict, title: str) -> None:
    names = [name for name in next(iter(batches.values())) if name != "upstream"]
    for place, (batch, ways) in enumerate(batches.items()):
        for y, name in enumerate(names):
            one, at = ways[name], y + 0.22 * (place - 1)
            axis.plot([one["low"], one["high"]], [at, at], color=COLORS[batch], lw=2, alpha=0.6)
            axis.plot(one["ratio"], at, "o", color=COLORS[batch], ms=6, label=f"batch {batch}" if y == 0 else None)
    axis.axvline(1, color="#555555", lw=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(title)
    axis.legend(fontsize=9)


def _growth(axis, screening: dict) -> None:
    for (name, seconds), color, marker in zip(
        screening.items(), ("#D55E00", "#0072B2", "#009E73"), ("o", "s", "^"), strict=True
    ):
        first = next(iter(seconds.values()))
        times = [s / first for s in seconds.values()]
        axis.plot([1, 2, 4], times, marker=marker, color=color, label=f"{name}: {', '.join(seconds)}")
    for power, label in ((1, "times n"), (2, "times n²")):
        axis.plot([1, 4], [1, 4**power], ":", color="#999999", lw=1)
        axis.annotate(label, (4, 4**power), textcoords="offset points", xytext=(-2, -20), ha="right", color="#777777")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks([1, 2, 4], ["1", "2", "4"])
    axis.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axis.set_xlabel("times as many")
    axis.set_title("Time of screening")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    read = json.loads(Path(source).read_text())
    print(table(read))
    draw(read, Path(target))
