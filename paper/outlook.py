"""`--plan`: what a scale would compute, what of it is done, the memory it needs, and a rough time. Loads no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from cells import grid
from paper.manifest import NAME, Manifest
from paper.specs import Spec, models
from setting import UNSTEERED, Cell

TEST = {"boolq": 3270, "copa": 500, "winogrande": 1267, "svamp": 300, "mawps": 355, "toxicity": 1199, "bpo": 200}
PROMPT = {
    "boolq": 160,
    "copa": 60,
    "winogrande": 60,
    "svamp": 60,
    "mawps": 110,
    "toxicity": 40,
    "bpo": 60,
}  # tokens, about
NEW = {"svamp": 20, "mawps": 250, "toxicity": 50, "bpo": 500}  # tokens of an answer; else 1
VALIDATION, RANKING = 400, 1000
ASKED = {"grid": 1.0, "racing": 0.25, "sample": 0.25, "test": 1.0}  # share of the grid's item-runs
AT_ONCE = 16  # answers decoded together
USED = 0.4  # of the measured rates, as a guess
EMBEDDED_CELL = 2.0  # seconds of one core


def text(found: Sequence[Spec], folder: Path) -> str:
    manifest = Manifest.read(folder) if (folder / NAME).exists() else Manifest(folder, "")
    counted, left = [], {}
    for spec in found:
        its = dict.fromkeys(cell for entry in spec.entries for cell in entry.cells)
        there = {
            cell
            for entry in spec.entries
            if manifest.records(spec.name, entry.block, entry.row, entry.column)
            for cell in entry.cells
        }
        drawn = sum(manifest.panel(spec.name, panel.name) is not None for panel in spec.panels)
        counted.append((spec, len(its) + len(spec.panels), len(there) + drawn))
        left |= dict.fromkeys(cell for cell in its if cell not in there)
    lines = [f"{'':<12}{'cells':>7}{'done':>7}  "]
    for spec, count, ready in counted:
        what = f"read off {spec.source}" if spec.source else f"{len(spec.blocks or spec.panels)} blocks"
        lines.append(f"{spec.name:<12}{count:>7}{ready:>7}  {spec.title} ({what})")
    lines += [
        "",
        f"{len(left)} different cells are left (one that several tables share is computed once); figures' own measurements "
        "are not counted in what follows",
        "",
    ]
    lines += [*_cells(found), ""]
    return "\n".join(lines + _needs(list(left)))


def _cells(found: Sequence[Spec]) -> list[str]:
    """A line a row of every block: its columns are its cells."""
    lines = []
    for spec in found:
        for block in dict.fromkeys(entry.block for entry in spec.entries):
            for row in dict.fromkeys(entry.row for entry in spec.entries if entry.block == block):
                mine = [entry for entry in spec.entries if (entry.block, entry.row) == (block, row)]
                many = sum(len(entry.cells) for entry in mine)
                lines.append(
                    f"{spec.name} | {block} | {row} | {' '.join(entry.column for entry in mine)} | {many} cells"
                )
        lines += [f"{spec.name} | {panel.name} | {panel.study}" for panel in spec.panels]
    return lines


def _needs(todo: Sequence[Cell]) -> list[str]:
    """Memory and time, by model."""
    if not todo:
        return ["nothing is left but what is read off records, and figures"]
    if all(cell.setting.embedded for cell in todo):
        minutes = len(todo) * EMBEDDED_CELL / 60
        return [f"about {minutes:.0f} core-minutes, training not counted; no GPU; under 2 GB of memory a process"]
    known = {model["hub"]: (name, model) for name, model in models().items()}
    rate, bandwidth = _rates()
    lines = [
        f"this machine: {rate / 1e12:.2f} TFLOP/s in matrix products, {bandwidth / 1e9:.0f} GB/s of memory (measured now; "
        f"{USED:.0%} of both are assumed to be reached, and {AT_ONCE} answers at once)",
        f"{'model':<28}{'cells':>6}{'memory':>10}{'hours':>9}",
    ]
    for hub, count in Counter(cell.setting.model for cell in todo).items():
        if hub not in known:
            continue  # an embedded model, or a tiny one of a dry run
        name, model = known[hub]
        size = model["parameters"] * model["bits"] / 8
        mine = [cell for cell in todo if cell.setting.model == hub]
        hours = sum(_seconds(cell, model, rate, bandwidth) for cell in dict.fromkeys(map(_alike, mine))) / 3600
        hours *= len(mine) / len(dict.fromkeys(map(_alike, mine)))
        lines.append(f"{name:<28}{count:>6}{1.2 * size / 1e9:>7.0f} GB{hours:>9.1f}")
    lines.append("memory: the weights and a fifth more for activations and the cache, as a rule of thumb")
    return lines


def _alike(cell: Cell) -> Cell:
    return replace(cell, draw=0)


def _seconds(cell: Cell, model: dict, rate: float, bandwidth: float) -> float:
    """Prompts by arithmetic, answers by the weights read at every token."""
    setting, task = cell.setting, cell.setting.task
    test = min(TEST[task], setting.limit or TEST[task])
    items = test
    if cell.method not in UNSTEERED:
        settings = len(grid(cell))
        asked = test if setting.search == "test" else min(VALIDATION, setting.limit or VALIDATION)
        items += settings * asked * ASKED[setting.search] if settings > 1 else 0
    tokens = NEW.get(task, 1)
    arithmetic = 2 * model["active"] * items * (PROMPT[task] + tokens)
    reading = model["parameters"] * model["bits"] / 8 * items / AT_ONCE * tokens
    ranking = 0 if cell.method in UNSTEERED else 2 * model["active"] * RANKING * PROMPT[task]
    return ((arithmetic + ranking) / rate + reading / bandwidth) / USED


def _rates() -> tuple[float, float]:
    """FLOP/s of matrix products and bytes/s of copies, in a moment."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = torch.ones(n, n, device=device, dtype=dtype), torch.empty(n, n, device=device, dtype=dtype)

    def seconds(work) -> float:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(5):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (perf_counter() - start) / 5

    return 2 * n**3 / seconds(lambda: torch.mm(a, a, out=b)), 2 * a.nbytes / seconds(lambda: b.copy_(a))
