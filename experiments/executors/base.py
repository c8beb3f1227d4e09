"""The interface of executors, and the order in which the cells of a table go through one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from austeer.errors import AUSteerError, one_line
from austeer.methods.base import sites_of
from austeer.methods.registry import METHODS
from embedded import acceptance
from eval.tasks.embedded import VALIDATION
from experiments.bench import BENCHES
from experiments.cell import AT_KL, Cell, ModelSpec, TaskSpec
from experiments.costs import fisher_of
from experiments.ranking import make_ranks
from experiments.run_cell import attempt, grid, stored
from experiments.store import Store

Job = TypeVar("Job")


class Executor(ABC):
    """Map a function over jobs. A function returns a dict, {"failed": why} where it could not do its job."""

    spreads = True  # whether jobs of several models run at once; if not, one model after another

    @abstractmethod
    def map(self, work: Callable[[Job], dict], jobs: Sequence[Job], what: str) -> Iterator[tuple[Job, dict]]:
        """Yield each job with its result, as they come. `what` labels the progress bar."""

    @abstractmethod
    def close(self) -> None:
        """Free what the executor holds."""


def run_cells(cells: Sequence[Cell], store: Store, executor: Executor) -> Iterator[tuple[Cell, dict]]:
    """Yield every cell with its record, or {"failed": why} if it could not be computed.

    Unsteered cells come first, since steered ones are compared with them, and ranks before the methods that use them.
    """
    for group in [list(cells)] if executor.spreads else _by_model(cells):
        yield from _run_group(group, store, executor)


def _run_group(cells: list[Cell], store: Store, executor: Executor) -> Iterator[tuple[Cell, dict]]:
    known_cells: set[Cell] = set()
    for _, records in executor.map(partial(_stored, store=store), [tuple(g) for g in _by_model(cells)], "looking up"):
        for cell, record in records.get("records", ()):
            known_cells.add(cell)
            yield cell, record
    missing = [cell for cell in cells if cell not in known_cells]
    steered = [cell for cell in missing if cell.steered]
    # a steered cell is compared with vanilla even where no table shows vanilla
    bases = dict.fromkeys([*(c for c in missing if not c.steered), *(c.unsteered() for c in steered)])
    failures: dict[Cell, str] = {}
    for cell, record in executor.map(partial(attempt, store=store), list(bases), "unsteered"):
        if "failed" in record:
            failures[cell] = record["failed"]
        if cell in missing:
            yield cell, record
    rankings: dict[tuple[ModelSpec, TaskSpec], list[Cell]] = {}
    for cell in steered:
        rankings.setdefault((cell.model, cell.task), []).append(cell)
    ready: list[Cell] = []
    jobs = [Ranking(model, task, tuple(group)) for (model, task), group in rankings.items()]
    for ranking, result in executor.map(partial(rank, store=store), jobs, "ranking"):
        for cell in ranking.cells:
            if "failed" in result:
                yield cell, {"failed": result["failed"], "stage": "ranking"}
            elif cell.unsteered() in failures:
                yield cell, {"failed": failures[cell.unsteered()]}
            else:
                ready.append(cell)
    ready.sort(key=cells.index)
    yield from executor.map(partial(attempt, store=store), ready, "steered")


def _by_model(cells: Iterable[Cell]) -> list[list[Cell]]:
    groups: dict[ModelSpec, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.model, []).append(cell)
    return list(groups.values())


def _stored(cells: Sequence[Cell], store: Store) -> dict:
    """Return the stored records of cells. A cell whose lookup fails is attempted later, and fails there with its reason."""
    records = []
    for cell in cells:
        with suppress(Exception):
            record = stored(cell, store)
            if record is not None:
                records.append((cell, record))
    return {"records": records}


@dataclass(frozen=True)
class Ranking:
    """Name the ranks that some cells of one model and one set of pairs need."""

    model: ModelSpec
    task: TaskSpec
    cells: tuple[Cell, ...]

    def __str__(self) -> str:
        return f"{self.task.label} of {self.model.name.rpartition('/')[2]}"


def rank(ranking: Ranking, store: Store) -> dict:
    """Make the missing ranks, after checking that there is skill to recover. Return {"made": how many}."""
    try:
        bench = BENCHES.open(ranking.model, ranking.task, store)
        if ranking.model.embedded:
            acceptance.latent_skill(bench.model, bench.tokenizer, ranking.task.name, n=VALIDATION)
        if not bench.task.validation and any(
            c.search.kind not in ("test", AT_KL) and len(grid(c)) > 1 for c in ranking.cells
        ):
            raise AUSteerError(
                f"the {ranking.task.protocol} protocol ranks on all rows of {ranking.task.label} and leaves none to choose "
                "k and alpha on: give --k and --alpha (Tables 8 and 9 of the paper have theirs), choose on the test split "
                "as the paper did (--search test), or use --protocol clean"
            )
        priced = {
            site: None for c in ranking.cells if METHODS[c.method.name].budgeted for site in sites_of(c.method.site)
        }
        if priced:
            fisher_of(bench, list(priced))
        sites: dict[str, dict[str, None]] = {}
        for cell in ranking.cells:
            for momentum in METHODS[cell.method.name].momenta:
                sites.setdefault(momentum, {}).update(dict.fromkeys(sites_of(cell.method.site)))
        return {"made": sum(make_ranks(bench, momentum, momentum_sites) for momentum, momentum_sites in sites.items())}
    except Exception as error:  # its cells fail with this reason; others go on
        return {"failed": one_line(error)}
