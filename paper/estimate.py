"""`--estimate`: what a scale would compute, what of it is done, the memory it needs, and a rough time. Loads no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from time import perf_counter

import torch

import rmodels
from austeer.code_identity import code_hash
from experiments.bench import task_class
from experiments.cell import Cell, ModelSpec
from experiments.run_cell import cell_code, grid
from paper.manifest import Manifest
from paper.specs import Panel, Spec, models
from paper.studies import STUDIES

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
EMBEDDED_CELL, EMBEDDED_PANEL = 2.0, 10.0  # seconds of one core
WHOLE_BLOCKS = 30  # other plans of a sweep: the whole block, combinations, and what ITI and SADI try
WIDTH = {True: 128, False: 4096}  # dimensions of a head, or of an ffn


def text(found: Sequence[Spec], manifest: Manifest) -> str:
    counted, left, undrawn = [], {}, []
    for spec in found:
        its = dict.fromkeys(cell for entry in spec.entries for cell in entry.cells)
        there = {
            cell
            for entry in spec.entries
            for cell, record in zip(
                entry.cells, manifest.records(spec.name, entry.block, entry.row, entry.column), strict=False
            )
            if record["code"] == _code(cell)
        }
        missing = [panel for panel in spec.panels if not _is_current(panel, manifest.panel(spec.name, panel.name))]
        counted.append((spec, len(its) + len(spec.panels), len(there) + len(spec.panels) - len(missing)))
        left |= dict.fromkeys(cell for cell in its if cell not in there)
        undrawn += missing
    lines = [f"{'':<12}{'cells':>7}{'done':>7}  "]
    for spec, count, ready in counted:
        what = f"read off {spec.source}" if spec.source else f"{len(spec.blocks or spec.panels)} blocks"
        lines.append(f"{spec.name:<12}{count:>7}{ready:>7}  {spec.title} ({what})")
    lines += [
        "",
        f"{len(left)} different cells are left (one that several tables share is computed once), and {len(undrawn)} "
        "measurements of figures",
        "",
    ]
    lines += [*_cells(found), ""]
    return "\n".join(lines + _needs(list(left), undrawn))


@cache
def _code(cell: Cell) -> str:
    """Hash the code that makes a cell, as its record does, without loading its model."""
    return cell_code(cell, task_class(cell.model, cell.task), _family(cell.model))


def _is_current(panel: Panel, record: dict | None) -> bool:
    if record is None:
        return False
    classes = task_class(panel.model, panel.task), _family(panel.model)
    return record["code"] == code_hash(STUDIES[panel.study].measure, *classes)


def _family(model: ModelSpec) -> type:
    by_hub = {known["hub"]: known["family"] for known in models().values()}
    return rmodels.family(by_hub.get(model.name, "llama"))  # the embedded models are Llamas


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


def _needs(todo: Sequence[Cell], undrawn: Sequence[Panel]) -> list[str]:
    """Memory and time, by model."""
    if not todo and not undrawn:
        return ["nothing is left"]
    if all(one.model.embedded for one in (*todo, *undrawn)):
        seconds = len(todo) * EMBEDDED_CELL + len(undrawn) * EMBEDDED_PANEL
        return [f"about {seconds / 60:.0f} core-minutes; no GPU; under 2 GB of memory a process"]
    known = {model["hub"]: (name, model) for name, model in models().items()}
    rate, bandwidth = _rates()
    lines = [
        f"this machine: {rate / 1e12:.2f} TFLOP/s in matrix products, {bandwidth / 1e9:.0f} GB/s of memory (measured now; "
        f"{USED:.0%} of both are assumed to be reached, and {AT_ONCE} answers at once)",
        f"{'model':<28}{'cells':>6}{'memory':>10}{'hours':>9}",
    ]
    for hub in dict.fromkeys(one.model.name for one in (*todo, *undrawn)):
        if hub not in known:
            continue  # an embedded model, or a tiny one of a dry run
        name, model = known[hub]
        size = model["parameters"] * model["bits"] / 8
        mine = [cell for cell in todo if cell.model.name == hub]
        seconds = sum(
            count * _seconds(cell, model, rate, bandwidth) for cell, count in Counter(map(_alike, mine)).items()
        )
        seconds += sum(_panel_seconds(panel, model, rate) for panel in undrawn if panel.model.name == hub)
        hours = seconds / 3600
        lines.append(f"{name:<28}{len(mine):>6}{1.2 * size / 1e9:>7.0f} GB{hours:>9.1f}")
    lines.append("memory: the weights and a fifth more for activations and the cache, as a rule of thumb")
    return lines


def _alike(cell: Cell) -> Cell:
    return replace(cell, method=replace(cell.method, draw=0))


def _seconds(cell: Cell, model: dict, rate: float, bandwidth: float) -> float:
    """Prompts by arithmetic, answers by the weights read at every token."""
    task, search = cell.task.name, cell.search.kind
    test = min(TEST[task], cell.task.limit or TEST[task])
    items = test
    if cell.steered:
        settings = len(grid(cell))
        asked = test if search == "test" else min(VALIDATION, cell.task.limit or VALIDATION)
        items += settings * asked * ASKED[search] if settings > 1 else 0
    tokens = NEW.get(task, 1)
    arithmetic = 2 * model["active"] * items * (PROMPT[task] + tokens)
    reading = model["parameters"] * model["bits"] / 8 * items / AT_ONCE * tokens
    ranking = 0 if not cell.steered else 2 * model["active"] * RANKING * PROMPT[task]
    return ((arithmetic + ranking) / rate + reading / bandwidth) / USED


def _panel_seconds(panel: Panel, model: dict, rate: float) -> float:
    """Prompts alone: the tasks of the sweeps answer in a token."""
    params, task = panel.params, panel.task.name
    width = WIDTH[params.get("head") is not None]
    dims = len(params.get("dims") or range(0, width, params.get("step", width)))
    causal = 3 if params.get("momentum") == "causal" else 1  # a backward pass is two forward ones
    runs = {
        "dimension_sweep": lambda: (dims + WHOLE_BLOCKS) * (params["n"] + min(params["n"], VALIDATION)),
        "convergence": lambda: dims * len(params["strengths"]) * params["prompts"],
        "top_tokens": lambda: dims * params["n"],
        "score_map": lambda: 2 * RANKING * causal,
        "overlap": lambda: 2 * RANKING * causal * len(params["tasks"]),
        "rank_stability": lambda: 2 * RANKING * 4,
        "overhead": lambda: params["items"] * params["trials"] * 4 + 2 * RANKING * 3,
    }[panel.study]()
    return 2 * model["active"] * runs * PROMPT[task] / rate / USED


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
