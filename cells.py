"""One cell of a comparison: a method at a site on a task, searched on validation, tested once, recorded.

A cell is computed from its description alone, in this process or in any other: workers share nothing but
the folders of ranks and records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from baselines.austeer import METHODS
from embedded import gate
from eval import records
from eval.search import ALPHAS, KS, search
from eval.statistics import mcnemar
from eval.tasks import VALIDATION, EmbeddedTask, PairTask
from MFU_screening import screen
from momentum import MOMENTA
from pairs import pairs_hash, read_pairs
from ranks import AURanks, fingerprint, public_name
from set_MFU import steer

EMBEDDED = "embedded"
UNSTEERED = ("vanilla", "prompt-only")
Task = EmbeddedTask | PairTask


@dataclass(frozen=True)
class Setting:
    """What every cell of one comparison shares. `model` is "embedded", a hub id or a folder."""

    model: str
    task: str  # an embedded task, or the file of a user's pairs
    fields: tuple[str, str, str] = ("prompt", "positive", "negative")
    device: str | None = None
    dtype: str = "auto"
    ranks: str = "AU_ranks"
    records: str = "results/records"
    test_split: str = "test"
    limit: int | None = None
    k: int | None = None  # with alpha: no search
    alpha: float | None = None

    @property
    def checkpoint(self) -> str:
        return str(gate.WEIGHTS / self.task) if self.model == EMBEDDED else self.model

    @property
    def task_name(self) -> str:
        return self.task if self.model == EMBEDDED else Path(self.task).stem

    def ranks_folder(self, momentum: str) -> Path:
        return Path(self.ranks) / Path(self.model).name / self.task_name / momentum


@dataclass(frozen=True)
class Cell:
    setting: Setting
    method: str
    site: str | None = None
    draw: int = 0


@cache
def load(setting: Setting) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    if setting.model == EMBEDDED:
        task: Task = EmbeddedTask(setting.task, setting.test_split, limit=setting.limit)
    else:
        task = PairTask(setting.task_name, read_pairs(setting.task, setting.fields), setting.limit)
    model = rmodels.load(setting.checkpoint, dtype=setting.dtype, device=setting.device)
    return model, rmodels.load_tokenizer(setting.checkpoint), task


def prepare(setting: Setting, sites: tuple[str, ...]) -> int:
    """Check that there is skill to recover, and make the ranks that are not there yet. Returns how many."""
    model, tokenizer, task = load(setting)
    if setting.model == EMBEDDED:
        gate.latent_skill(model, tokenizer, setting.task, n=VALIDATION)
    made = 0
    for momentum in MOMENTA:
        missing = [site for site in sites if _stored_ranks(setting, momentum, site) is None]
        for site, ranks in screen(task.pairs, model, tokenizer, missing, momentum=momentum).items() if missing else ():
            ranks.save(setting.ranks_folder(momentum) / f"{site}.safetensors")
            made += 1
    return made


def question(cell: Cell) -> dict:
    """Everything that determines the cell's result."""
    setting = cell.setting
    model, _, task = load(setting)
    searched = cell.method not in UNSTEERED
    return {
        "model": EMBEDDED if setting.model == EMBEDDED else public_name(setting.model),
        "task": setting.task_name,
        "site": cell.site,
        "method": cell.method,
        "draw": cell.draw,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype),
        "pairs_hash": pairs_hash(task.pairs) if searched else None,
        "items_hash": task.fingerprint,
        "test_split": task.test_split,
        "grid": [list(axis) for axis in _grid(setting)] if searched else None,
    }


def stored(cell: Cell) -> dict | None:
    return records.find(Path(cell.setting.records), question(cell))


def compute(cell: Cell) -> dict:
    """The cell's record: found, or made and written."""
    found = stored(cell)
    if found is not None:
        return found
    model, tokenizer, task = load(cell.setting)
    if cell.method in UNSTEERED:
        prepared = task.prompted if cell.method == "prompt-only" else lambda items: items
        validation, test = (task.outcomes(model, tokenizer, prepared(items)) for items in (task.validation, task.test))
        result = {"validation": _share(validation), **_extras(task, model, tokenizer)}
    else:
        vanilla = compute(Cell(cell.setting, "vanilla"))
        result, test = _steered(cell, vanilla["validation"], records.unpack(vanilla["outcomes"]))
    result |= {"n": len(test), "right": sum(test), "measure": task.measure, "outcomes": records.pack(test)}
    return records.write(Path(cell.setting.records), question(cell), result)


def _steered(cell: Cell, vanilla_validation: float, vanilla_test: list[bool]) -> tuple[dict, list[bool]]:
    setting, method = cell.setting, METHODS[cell.method]
    model, tokenizer, task = load(setting)
    ranks = {method.momentum: _stored_ranks(setting, method.momentum, cell.site)}

    def on(items) -> Callable[[int, float], list[bool]]:
        def outcomes(k: int, alpha: float) -> list[bool]:
            with steer(model, method.plan(ranks, k, alpha, cell.draw)):
                return task.outcomes(model, tokenizer, items)

        return outcomes

    if setting.k is not None and setting.alpha is not None:
        chosen, grid = (setting.k, setting.alpha), {}
    else:
        validate = on(task.validation)
        chosen, grid = search(lambda k, alpha: _share(validate(k, alpha)), vanilla_validation, *_grid(setting))
    result: dict = {"k": chosen and chosen[0], "alpha": chosen and chosen[1], "grid_scores": grid}
    if chosen is None:  # nothing beat doing nothing on validation, so nothing is done
        return result | {"gained": 0, "lost": 0, "p": 1.0, **_extras(task, model, tokenizer)}, vanilla_test
    test = on(task.test)(*chosen)
    gained, lost, p = mcnemar(vanilla_test, test)
    with steer(model, method.plan(ranks, *chosen, cell.draw)):
        extras = _extras(task, model, tokenizer)
    return result | {"gained": gained, "lost": lost, "p": p, **extras}, test


def _extras(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    if not isinstance(task, PairTask):
        return {}
    odds = task.log_odds(model, tokenizer, task.test)
    return {"mean_log_odds": sum(odds) / len(odds), "perplexity": task.perplexity(model, tokenizer)}


def _stored_ranks(setting: Setting, momentum: str, site: str) -> AURanks | None:
    """Ranks of exactly this model and these pairs, if they are there."""
    model, _, task = load(setting)
    file = setting.ranks_folder(momentum) / f"{site}.safetensors"
    if not file.exists():
        return None
    ranks = AURanks.load(file)
    wanted = {
        "fingerprint": fingerprint(model),
        "pairs_hash": pairs_hash(task.pairs),
        "momentum": momentum,
        "protocol": "clean",
    }
    return ranks if all(ranks.header.get(key) == value for key, value in wanted.items()) else None


def _grid(setting: Setting) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return ((setting.k,) if setting.k is not None else KS, (setting.alpha,) if setting.alpha is not None else ALPHAS)


def _share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)
