"""The table and the picture of benchmarks/steering.py, from its figures alone.

python benchmarks/steering_report.py benchmarks/results/steering-cpu.json docs/pictures/steering-cost.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"1": "#56B4E9", "8": "#0072B2", "32": "#000000"}  # Okabe-Ito, safe for color-blind readers
ADDED, SCALED = "a vector added to every layer", "100 AUs scaled, ffn"


def table(figures: dict) -> str:
    memory = figures["decoding, peak MB"]
    lines = [f"| time per token, 100 AUs | {' | '.join(f'batch {b}' for b in figures['decoding'])} | memory |"]
    lines.append("|---|" + "--:|" * (len(figures["decoding"]) + 1))
    for name in next(iter(figures["decoding"].values())):
        held = f"{memory[name] / memory['upstream']:.2f}" if name in memory else ""
        lines.append(f"| {name} | {_ratios(figures['decoding'], name)} | {held} |")
    lines += ["", f"| live, k = | {' | '.join(figures['growing k, batch 8'])} |", "|---|" + "--:|" * 4]
    lines.append(f"| batch 8 | {' | '.join(_ratio(one) for one in figures['growing k, batch 8'].values())} |")
    for name, seconds in figures["screening, s"].items():
        first = next(iter(seconds.values()))
        lines += ["", f"| screening, {name} | {' | '.join(seconds)} |", "|---|" + "--:|" * len(seconds)]
        lines.append("| time | " + " | ".join(f"{s / first:.2f}" for s in seconds.values()) + " |")
    lines += ["", "| screening at hidden 1024 | share of the matrix products' rate |", "|---|--:|"]
    for name, one in figures["matrix products at hidden 1024"].items():
        lines.append(f"| {name} | {one['share']:.2f} |")
    above = figures["screening, MB above the model"]
    lines += ["", "screening, above the model: " + ", ".join(f"{mb:.0f} MB at {n} pairs" for n, mb in above.items())]
    lines += ["", *_peers(figures["peers"])]
    return "\n".join(lines)


def _peers(peers: dict | str) -> list[str]:
    if isinstance(peers, str):
        return [f"peers: {peers}"]
    rates = peers["screening, pairs/s"]
    lines = ["| screening | pairs per second | ours, default, is faster by |", "|---|--:|--:|"]
    lines += [f"| {name} | {rate:.1f} | {rates['ours, default'] / rate:.2f} |" for name, rate in rates.items()]
    for plan in (ADDED, SCALED):
        batches = peers[plan]
        lines += ["", f"| {plan} | {' | '.join(f'batch {b}' for b in batches)} |", "|---|" + "--:|" * len(batches)]
        lines += [f"| {name} | {_ratios(batches, name)} |" for name in next(iter(batches.values()))]
    return lines


def _ratios(batches: dict, name: str) -> str:
    return " | ".join(_ratio(ways[name]) for ways in batches.values())


def _ratio(one: dict) -> str:
    return f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def draw(figures: dict, path: Path) -> None:
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "figure.dpi": 110})
    known = isinstance(figures["peers"], dict)
    figure, axes = plt.subplots(1, 2 + known, figsize=(12 + 5 * known, 4.8), width_ratios=(1.4, *([1] * known), 1))
    _bars(axes[0], figures["decoding"], "Time per token over upstream's, 100 AUs")
    if known:
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
