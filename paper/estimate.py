"""`--estimate`: what a scale would compute, what of that is done, and a rough guess of memory and time. It loads no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from time import perf_counter

import torch
from transformers import AutoConfig

import rmodels
from austeer.code_identity import code_hash
from eval.data.read import catalogue_entry
from eval.tasks.registry import PAPER_TASKS
from experiments.bench import task_class
from experiments.cell import AT_KL, Cell, ModelSpec
from experiments.run_cell import cell_code, grid
from experiments.search import SAMPLE, race_budget
from paper.manifest import Manifest
from paper.specs import Panel, Spec, models
from paper.studies import STUDIES

PROMPT = {"boolq": 160, "mawps": 110, "toxicity": 40}  # tokens of a prompt, roughly
OTHER_PROMPT = 60  # of the other tasks
NEW = {"svamp": 20, "mawps": 250, "toxicity": 50, "bpo": 500}  # tokens of an answer; 1 for the other tasks
OTHER_TEST = 1000  # test items of a task whose number of rows the catalogue does not have
VALIDATION, RANKING = 400, 1000
BATCH = 16  # answers decoded at once
UTILIZATION = 0.4  # share of the measured rates that a run reaches: a guess
EMBEDDED_CELL, EMBEDDED_PANEL = 2.0, 10.0  # seconds on one core


def text(specs: Sequence[Spec], manifest: Manifest) -> str:
    """Return the whole estimate: cells and finished ones per table, every row, then memory and time of the rest."""
    counts, todo, panels = [], {}, []
    for spec in specs:
        cells = dict.fromkeys(cell for entry in spec.entries for cell in entry.cells)
        finished = {
            cell
            for entry in spec.entries
            for cell, record in zip(
                entry.cells, manifest.records(spec.name, entry.block, entry.row, entry.column), strict=False
            )
            if record["code"] == _code(cell)
        }
        missing = [panel for panel in spec.panels if not _is_current(panel, manifest.panel(spec.name, panel.name))]
        total = len(cells) + len(spec.panels)
        counts.append((spec, total, len(finished) + len(spec.panels) - len(missing)))
        todo |= dict.fromkeys(cell for cell in cells if cell not in finished)
        panels += missing
    lines = [f"{'':<12}{'cells':>7}{'done':>7}  "]
    for spec, total, n_finished in counts:
        content = f"from the records of {spec.source}" if spec.source else f"blocks: {len(spec.blocks or spec.panels)}"
        lines.append(f"{spec.name:<12}{total:>7}{n_finished:>7}  {spec.title} ({content})")
    lines += [
        "",
        f"left to compute: {len(todo)} cells (one that several tables share is computed once) and {len(panels)} "
        "measurements of figures",
        "",
        *_cell_lines(specs),
        "",
    ]
    return "\n".join(lines + _needs(list(todo), panels))


@cache
def _code(cell: Cell) -> str:
    """Hash the code that makes a cell, as its record does, but without loading its model."""
    return cell_code(cell, task_class(cell.model, cell.task), _family(cell.model))


def _is_current(panel: Panel, record: dict | None) -> bool:
    if record is None:
        return False
    roots = task_class(panel.model, panel.task), *rmodels.code_roots(_family(panel.model))
    return record["code"] == code_hash(STUDIES[panel.study].measure, *roots)


def _family(model: ModelSpec) -> type:
    by_hub = {known["hub"]: known["family"] for known in models().values()}
    return rmodels.model_class(AutoConfig.for_model(by_hub.get(model.name, "llama")))  # the embedded models are Llamas


def _cell_lines(specs: Sequence[Spec]) -> list[str]:
    """Return a line per row of every block, with the columns it has and the number of its cells."""
    lines = []
    for spec in specs:
        for block in dict.fromkeys(entry.block for entry in spec.entries):
            for row in dict.fromkeys(entry.row for entry in spec.entries if entry.block == block):
                entries = [entry for entry in spec.entries if (entry.block, entry.row) == (block, row)]
                n_cells = sum(len(entry.cells) for entry in entries)
                lines.append(
                    f"{spec.name} | {block} | {row} | {' '.join(entry.column for entry in entries)} | {n_cells} cells"
                )
        lines += [f"{spec.name} | {panel.name} | {panel.study}" for panel in spec.panels]
    return lines


def _needs(todo: Sequence[Cell], panels: Sequence[Panel]) -> list[str]:
    """Return the memory and time that each model needs."""
    if not todo and not panels:
        return ["nothing is left to compute"]
    if all(job.model.embedded for job in (*todo, *panels)):
        seconds = len(todo) * EMBEDDED_CELL + len(panels) * EMBEDDED_PANEL
        return [f"about {seconds / 60:.0f} core-minutes; no GPU; under 2 GB of memory per process"]
    known = {model["hub"]: (name, model) for name, model in models().items()}
    rate, bandwidth = _rates()
    lines = [
        f"this machine: {rate / 1e12:.2f} TFLOP/s in matrix products, {bandwidth / 1e9:.0f} GB/s in memory (measured now; "
        f"{UTILIZATION:.0%} of both is assumed, and {BATCH} answers per batch)",
        f"{'model':<28}{'cells':>6}{'memory':>10}{'hours':>9}",
    ]
    for hub in dict.fromkeys(job.model.name for job in (*todo, *panels)):
        if hub not in known:
            continue  # an embedded model, or a tiny one of a dry run
        name, model = known[hub]
        dtypes = {job.model.dtype for job in (*todo, *panels) if job.model.name == hub}
        size = model["parameters"] * (32 if "float32" in dtypes else model["bits"]) / 8
        cells = [cell for cell in todo if cell.model.name == hub]
        seconds = sum(
            count * _seconds(cell, model, rate, bandwidth) for cell, count in Counter(map(_first_draw, cells)).items()
        )
        seconds += sum(_panel_seconds(panel, model, rate, bandwidth) for panel in panels if panel.model.name == hub)
        hours = seconds / 3600
        lines.append(f"{name:<28}{len(cells):>6}{1.2 * size / 1e9:>7.0f} GB{hours:>9.1f}")
    lines.append("memory: the weights and a fifth more for activations and the cache, as a rule of thumb")
    return lines


def _first_draw(cell: Cell) -> Cell:
    return replace(cell, method=replace(cell.method, draw=0))


def _seconds(cell: Cell, model: dict, rate: float, bandwidth: float) -> float:
    """Estimate a cell's time: prompts by their arithmetic, answers by reading the weights at every token."""
    task = cell.task.name
    test = _n_test(task)
    test = min(test, cell.task.limit or test)
    searched, tokens = _searched(cell, test), NEW.get(task, 1)
    answered = test + (searched if task_class(cell.model, cell.task).generates_on_validation else 0)
    arithmetic = 2 * model["active"] * (test + searched) * (_prompt(task) + tokens)
    reading = model["parameters"] * model["bits"] / 8 * answered / BATCH * tokens
    ranking = 0 if not cell.steered else 2 * model["active"] * RANKING * _prompt(task)
    return ((arithmetic + ranking) / rate + reading / bandwidth) / UTILIZATION


def _searched(cell: Cell, test: int) -> int:
    """Return the item-runs of a cell's search."""
    n_points = len(grid(cell)) if cell.steered else 1
    if n_points == 1:
        return 0
    validation = min(VALIDATION, cell.task.limit or VALIDATION)
    return {
        "racing": race_budget(n_points, validation),
        "sample": n_points * min(SAMPLE, validation),
        "grid": n_points * validation,
        "test": n_points * test,
        AT_KL: n_points * validation,
    }[cell.search.kind]


def _panel_seconds(panel: Panel, model: dict, rate: float, bandwidth: float) -> float:
    """Estimate a measurement's time from its prompts, and from the tokens of answers that it generates one at a time."""
    study, task = STUDIES[panel.study], panel.task.name
    arithmetic = 2 * model["active"] * study.n_prompts(panel.params, RANKING, VALIDATION) * _prompt(task)
    tokens = study.n_answers(panel.params) * NEW.get(task, 1) if hasattr(study, "n_answers") else 0
    reading = model["parameters"] * model["bits"] / 8 * tokens
    return (arithmetic / rate + reading / bandwidth) / UTILIZATION


def _prompt(task: str) -> int:
    return PROMPT.get(task, OTHER_PROMPT)


def _n_test(task: str) -> int:
    rows = catalogue_entry(PAPER_TASKS[task])["splits"]["test"]["rows"] if task in PAPER_TASKS else None
    return rows or OTHER_TEST


def _rates() -> tuple[float, float]:
    """Measure FLOP/s of matrix products and bytes/s of copies, in a moment."""
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
