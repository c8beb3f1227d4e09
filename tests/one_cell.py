"""Compute one cell in a test, from flat fields."""

from pathlib import Path

from experiments.bench import BENCHES, Bench
from experiments.cell import Cell, bench_of, cell_of
from experiments.run_cell import attempt, run_cell
from experiments.store import Store


def store_in(folder: Path) -> Store:
    return Store(ranks=str(folder / "ranks"), records=str(folder / "records"))


def bench_for(folder: Path, **flat) -> Bench:
    return BENCHES.open(*bench_of(**{"model": "embedded", "device": "cpu", **flat}), store_in(folder))


def embedded_cell(**flat) -> Cell:
    return cell_of(**{"model": "embedded", "device": "cpu", **flat})


def computed(folder: Path, **flat) -> dict:
    cell = embedded_cell(**flat)
    return run_cell(cell, BENCHES.open(cell.model, cell.task, store_in(folder)))


def attempted(folder: Path, **flat) -> dict:
    return attempt(embedded_cell(**flat), store_in(folder))
