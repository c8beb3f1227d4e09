"""One cell of a comparison: a method at a site on a task, searched on validation, tested once, recorded.

A cell is computed from its description alone, in this process or in any other: workers share nothing but
the folders of ranks and records.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rmodels
from baselines.base import BUDGET, Evidence, Method, Settings
from baselines.registry import METHODS
from embedded import gate
from errors import AUSteerError
from eval import records
from eval.answer_file import AnswerFile
from eval.search import key_of, search
from eval.statistics import mcnemar, summary
from eval.tasks.base import Columns, Task, items_hash
from eval.tasks.embedded import VALIDATION, EmbeddedTask
from eval.tasks.own_pairs import PairTask
from eval.tasks.registry import PAPER_TASKS, paper_task
from MFU_screening import screen
from momentum import MOMENTA
from pairs import pairs_hash, read_pairs
from plan import Plan
from ranks import AURanks, fingerprint, public_name
from set_MFU import steer

EMBEDDED = "embedded"
UNSTEERED = ("vanilla", "prompt-only")


@dataclass(frozen=True)
class Setting:
    """What every cell of one comparison shares. `model` is "embedded", a hub id or a folder."""

    model: str
    task: str  # a task of the embedded models, one of the paper, or the file of a user's pairs
    fields: tuple[str, str, str] = ("prompt", "positive", "negative")
    device: str | None = None
    dtype: str = "auto"
    ranks: str = "AU_ranks"
    records: str = "results/records"
    test_split: str = "test"
    limit: int | None = None
    k: int | None = None  # with alpha: no search
    alpha: float | None = None
    # of the paper's tasks
    data_dir: str | None = None
    protocol: str = "clean"
    toxicity: str = "local"
    encoder: str | None = None
    chat: bool = False
    sae: str | None = None  # of the methods that steer by one
    batch_size: int | None = None

    @property
    def of_the_paper(self) -> bool:
        return self.model != EMBEDDED and self.task in PAPER_TASKS

    @property
    def has_instruction(self) -> bool:
        """Is there a prompt-only control? The authors' code has none, and own pairs say not what they are for."""
        return self.model == EMBEDDED or (self.of_the_paper and self.protocol == "clean")

    @property
    def checkpoint(self) -> str:
        return str(gate.WEIGHTS / self.task) if self.model == EMBEDDED else self.model

    @property
    def task_name(self) -> str:
        return self.task if self.model == EMBEDDED else Path(self.task).stem

    def ranks_folder(self, momentum: str) -> Path:
        by = momentum if self.protocol == "clean" else f"{momentum}-{self.protocol}"
        return Path(self.ranks) / Path(self.model).name / self.task_name / by


@dataclass(frozen=True)
class Cell:
    setting: Setting
    method: str
    site: str | None = None
    draw: int = 0


@cache
def load(setting: Setting) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task]:
    # the model last: a mistake in the data should not wait for it
    if setting.model == EMBEDDED:
        task: Task = EmbeddedTask(setting.task, setting.test_split, limit=setting.limit)
    elif setting.of_the_paper:
        task = paper_task(
            setting.task, setting.toxicity, Path(setting.records).parent / "perspective.jsonl", setting.device,
            data_dir=setting.data_dir, protocol=setting.protocol,
            encoder=setting.encoder, chat=rmodels.load_tokenizer(setting.checkpoint) if setting.chat else None,
            limit=setting.limit, batch_size=setting.batch_size,
        )  # fmt: skip
    else:
        task = PairTask(setting.task_name, read_pairs(setting.task, setting.fields), setting.limit)
    model = rmodels.load(setting.checkpoint, dtype=setting.dtype, device=setting.device)
    return model, rmodels.load_tokenizer(setting.checkpoint), task


def prepare(setting: Setting, todo: Sequence[Cell]) -> int:
    """Check that there is skill to recover, and make the ranks that are not there yet. Returns how many."""
    model, tokenizer, task = load(setting)
    if setting.model == EMBEDDED:
        gate.latent_skill(model, tokenizer, setting.task, n=VALIDATION)
    searched = [cell for cell in todo if cell.method not in UNSTEERED]
    if searched and not task.validation and any(len(_grid(cell)) > 1 for cell in searched):
        raise AUSteerError(
            f"the {setting.protocol} protocol ranks on all rows of {setting.task_name} and leaves none to choose k and "
            "alpha on: give --k and --alpha (Tables 8 and 9 of the paper have theirs), or use --protocol clean"
        )
    made = 0
    for momentum in MOMENTA:
        wanted = {cell.site: None for cell in searched if getattr(METHODS[cell.method], "momentum", None) == momentum}
        missing = [site for site in wanted if _stored_ranks(setting, momentum, site) is None]
        if missing:
            start = time.perf_counter()
            found = screen(task.pairs, model, tokenizer, missing, momentum=momentum, protocol=setting.protocol)
            for site, ranks in found.items():
                ranks.header["seconds"] = round((time.perf_counter() - start) / len(missing), 2)
                ranks.save(setting.ranks_folder(momentum) / f"{site}.safetensors")
                made += 1
    return made


def in_protocol(protocol: str, method: Method) -> bool:
    """The paper protocol is the authors' code: it has activation momentum, and nothing else to steer by."""
    return protocol == "clean" or getattr(method, "momentum", None) == "activation"


@cache
def _prepared(setting: Setting, name: str, site: str) -> tuple[object, float | None]:
    """What a method makes of the evidence, and the seconds it took, with those its ranks took when they were made;
    None where these are not known, as of shipped ranks."""
    model, tokenizer, task = load(setting)

    before = []  # seconds that went into ranks when they were made

    def ranks(momentum: str) -> AURanks:
        found = _stored_ranks(setting, momentum, site)
        if found is None:
            found = screen(task.pairs, model, tokenizer, [site], momentum=momentum, protocol=setting.protocol)[site]
        before.append(found.header.get("seconds"))
        return found

    start = time.perf_counter()
    method = METHODS[name]
    if setting.sae is not None and hasattr(method, "sae"):
        method = replace(method, sae=setting.sae)
    made = method.prepare(Evidence(model, tokenizer, task.pairs, site, ranks))
    return made, None if None in before else time.perf_counter() - start + sum(before)


def question(cell: Cell) -> dict:
    """Everything that determines the cell's result."""
    setting = cell.setting
    model, _, task = load(setting)
    searched = cell.method not in UNSTEERED
    everything = [*task.validation, *task.test]
    return {
        "model": EMBEDDED if setting.model == EMBEDDED else public_name(setting.model),
        "task": setting.task_name,
        "site": cell.site,
        "method": cell.method,
        "draw": cell.draw,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype),
        # on other kinds of devices and in other batches rounding differs: never mixed under one name
        "device": model.device.type,
        "batch_size": setting.batch_size,
        "pairs_hash": pairs_hash(task.pairs) if searched else None,
        "pairs_by": task.pairs_by if searched else None,  # behind `pairs`, which decide it
        "items_hash": items_hash(task.prompted(everything)) if cell.method == "prompt-only" else task.fingerprint,
        "test_split": task.test_split,
        "grid": _grid(cell) if searched else None,
        "wording": task.wording,
        "protocol": setting.protocol,
        "sae": _sae_named(setting.sae) if searched and hasattr(METHODS[cell.method], "sae") else None,
        "measured": task.measured,
    }


def _sae_named(name: str | None) -> str | None:
    """A file by its content: another SAE under the same path is another question."""
    if name is None or not Path(name).is_file():
        return name
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def stored(cell: Cell) -> dict | None:
    return records.find(Path(cell.setting.records), question(cell))


def compute(cell: Cell) -> dict:
    """The cell's record: found, or made and written."""
    found = stored(cell)
    if found is not None:
        return found
    _, _, task = load(cell.setting)
    if cell.method in UNSTEERED:
        prepared = task.prompted if cell.method == "prompt-only" else lambda items: items
        result = {"validation": _share(_columns(cell, prepared(task.validation), "validation"))}
        columns, extras = _tested(cell, prepared(task.test))
    else:
        result, columns, extras = _steered(cell, compute(Cell(cell.setting, "vanilla")))
    measure, outcomes = next(iter(columns.items()))
    result |= {"n": len(outcomes), "right": sum(outcomes), "measure": measure, "outcomes": records.pack(outcomes)}
    result |= {"columns": records.pack_columns(columns), "measures": summary(columns), "extras": extras}
    return records.write(Path(cell.setting.records), question(cell), result)


def _steered(cell: Cell, vanilla: dict) -> tuple[dict, Columns, dict[str, float]]:
    _, _, task = load(cell.setting)
    method = METHODS[cell.method]
    prepared, seconds = _prepared(cell.setting, cell.method, cell.site)

    def validated(settings: Settings) -> float:
        name = " ".join(["validation", *(f"{key}={value:g}" for key, value in settings.items())])
        return _share(_columns(cell, task.validation, name, method.plan(prepared, settings, cell.draw)))

    grid = _grid(cell)
    chosen, scores = (grid[0], {}) if len(grid) == 1 else search(validated, vanilla["validation"], grid)
    result: dict = {
        "settings": chosen,
        "chosen": chosen and key_of(chosen),
        "grid_scores": scores,
        "cost": {"prepare_s": seconds},
    }
    if chosen is None:  # nothing beat doing nothing on validation, so nothing is done
        unchanged = records.unpack_columns(vanilla["columns"])
        return result | {"touched": 0, "gained": 0, "lost": 0, "p": 1.0}, unchanged, vanilla["extras"]
    plan = method.plan(prepared, chosen, cell.draw)
    columns, extras = _tested(cell, task.test, plan)
    gained, lost, p = mcnemar(records.unpack(vanilla["outcomes"]), next(iter(columns.values())))
    return result | {"touched": len(plan.units()), "gained": gained, "lost": lost, "p": p}, columns, extras


def _columns(cell: Cell, items: Sequence, name: str, plan: Plan | None = None) -> Columns:
    _, _, task = load(cell.setting)
    return task.columns(items, _answers(cell, items, name, plan)) if items else {}


def _tested(cell: Cell, items: Sequence, plan: Plan | None = None) -> tuple[Columns, dict[str, float]]:
    model, tokenizer, task = load(cell.setting)
    answers = _answers(cell, items, "test", plan)
    return task.columns(items, answers), task.extras(model, tokenizer, items, answers)


def _answers(cell: Cell, items: Sequence, name: str, plan: Plan | None):
    """Of the paper's tasks, which take long, answers are kept as they come, and a killed run goes on."""
    model, tokenizer, task = load(cell.setting)
    file = progress = None
    if cell.setting.of_the_paper and (task.speaks_on_validation or name == "test"):
        file = AnswerFile(answers_path(cell, name))
        progress = " ".join(filter(None, (cell.setting.task_name, cell.site, cell.method, name)))
    with steer(model, plan) if plan is not None else nullcontext():
        return task.answers(model, tokenizer, items, file, progress)


def answers_path(cell: Cell, name: str = "test") -> Path:
    setting = cell.setting
    part = name.replace(" ", "-").replace("=", "")
    return Path(setting.records).parent / "answers" / f"{records.record_id(question(cell))}-{part}.jsonl"


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
        "protocol": setting.protocol,
    }
    return ranks if all(ranks.header.get(key) == value for key, value in wanted.items()) else None


def _grid(cell: Cell) -> list[Settings]:
    """The method's settings, with k and alpha as they were given; all methods may try as many."""
    kind = "embedded" if cell.setting.model == EMBEDDED else "real"
    grid = METHODS[cell.method].grid(kind)
    assert len(grid) <= BUDGET[kind], f"{cell.method} tries {len(grid)} settings, others {BUDGET[kind]}"
    given = {key: value for key in ("k", "alpha") if (value := getattr(cell.setting, key)) is not None}
    fixed = [{**settings, **{key: given[key] for key in given if key in settings}} for settings in grid]
    return list({key_of(settings): settings for settings in fixed}.values())


def _share(columns: Columns) -> float | None:
    outcomes = next(iter(columns.values()), [])
    return sum(outcomes) / len(outcomes) if outcomes else None
