"""One cell of a comparison: a method at a site on a task, searched on validation, tested once, recorded.

A cell is computed from its description alone, in this process or in any other: workers share nothing but
the folders of ranks and records.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from austeer import processes as shared_work
from austeer.errors import AUSteerError, one_line
from austeer.evidence import Evidence
from austeer.identity import fingerprint, public_name
from austeer.methods.base import BUDGET, Method, Settings, sites_of
from austeer.methods.registry import METHODS, with_options
from austeer.pairs import pairs_hash
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from embedded import acceptance
from eval.answering.answer_file import AnswerFile
from eval.answering.live import LiveAnswerer
from eval.statistics import mcnemar, summary
from eval.tasks.base import Scores, items_hash
from eval.tasks.embedded import VALIDATION
from experiments import records
from experiments.engines.grid_batches import FEW
from experiments.engines.vllm_batches import LIVE, engine_name, served
from experiments.search import SEARCHES, key_of, shuffled
from experiments.setting import MADE_OF_MODELS, UNSTEERED, Cell, Setting, asked_once, load
from MFU_screening import MOMENTA, screen
from rmodels import gates


def prepare(setting: Setting, todo: Sequence[Cell]) -> int:
    """Check that there is skill to recover, and make the ranks that are not there yet. Returns how many."""
    model, tokenizer, task = load(setting)
    if setting.embedded:
        acceptance.latent_skill(model, tokenizer, setting.task, n=VALIDATION)
    searched = [cell for cell in todo if cell.method not in UNSTEERED]
    chosen = [cell for cell in searched if cell.setting.search != "test" and len(grid(cell)) > 1]
    if chosen and not task.validation:
        raise AUSteerError(
            f"the {setting.protocol} protocol ranks on all rows of {setting.task_name} and leaves none to choose k and "
            "alpha on: give --k and --alpha (Tables 8 and 9 of the paper have theirs), choose on the test split as the paper did "
            "(--search test), or use --protocol clean"
        )
    made = 0
    for momentum in MOMENTA:
        ranked = [cell for cell in searched if momentum in METHODS[cell.method].momenta]
        wanted = {site: None for cell in ranked for site in sites_of(cell.site)}
        missing = [site for site in wanted if stored_ranks(setting, momentum, site) is None]
        if missing:
            start = time.perf_counter()
            found = screen(
                task.pairs, model, tokenizer, missing, momentum=momentum, protocol=setting.protocol,
                progress=not setting.embedded,
            )  # fmt: skip
            for site, ranks in found.items():
                ranks.header["code"] = records.code_hash()
                ranks.header["seconds"] = round((time.perf_counter() - start) / len(missing), 2)
                if shared_work.is_first():
                    ranks.save(setting.ranks_folder(momentum) / f"{site}.safetensors")
                made += 1
    return made


def in_protocol(protocol: str, method: Method) -> bool:
    """The paper protocol is the authors' code: it has activation momentum, and nothing else to steer by."""
    return protocol == "clean" or method.momenta == ("activation",)


def _prepared(setting: Setting, name: str, site: str) -> tuple[object, float | None]:
    """However the settings are to be chosen."""
    return _prepared_once(replace(setting, ks=(), alphas=(), search="grid"), name, site)


@lru_cache(maxsize=32)
def _prepared_once(setting: Setting, name: str, site: str) -> tuple[object, float | None]:
    """What a method makes of the evidence, and the seconds it took, with those its ranks took when they were made;
    None where these are not known, as of shipped ranks."""
    model, tokenizer, task = load(setting)

    before = []  # seconds that went into ranks when they were made

    def ranks(momentum: str, at: str = site) -> AURanks:
        found = stored_ranks(setting, momentum, at)
        if found is None:
            found = screen(
                task.pairs, model, tokenizer, [at], momentum=momentum, protocol=setting.protocol,
                progress=not setting.embedded,
            )[at]  # fmt: skip
        before.append(found.header.get("seconds"))
        return found

    start = time.perf_counter()
    made = _method(setting, name).prepare(Evidence(model, tokenizer, task.pairs, site, ranks))
    return made, None if None in before else time.perf_counter() - start + sum(before)


MADE_OF_MODELS.append(_prepared_once.cache_clear)  # some methods keep the model


def _method(setting: Setting, name: str) -> Method:
    return with_options(name, _options(setting, name))


def _options(setting: Setting, name: str) -> dict[str, str]:
    """Of this method: a setting may have options of several."""
    return {key.partition(".")[2]: value for key, value in setting.options if key.partition(".")[0] == name}


def question(cell: Cell) -> dict:
    """Everything that determines the cell's result."""
    setting = cell.setting
    model, _, task = load(setting)
    searched = cell.method not in UNSTEERED
    everything = [*task.validation, *task.test]
    return {
        "model": setting.model if setting.embedded else public_name(setting.model),
        "task": setting.task_name,
        "site": cell.site,
        "method": cell.method,
        "draw": cell.draw,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype),
        "quantization": setting.quantization,
        # on other kinds of devices and in other batches rounding differs: never mixed under one name
        "device": model.device.type,
        "batch_size": setting.batch_size,
        "engine": engine_name(setting.engine),
        "pairs_hash": pairs_hash(task.pairs) if searched else None,
        "pairs_by": task.pairs_by if searched else None,  # behind `pairs`, which decide it
        "items_hash": items_hash(task.prompted(everything)) if cell.method == "prompt-only" else task.fingerprint,
        "test_split": task.test_split,
        "grid": grid(cell) if searched else None,
        "search": setting.search if searched and len(grid(cell)) > 1 else None,
        "options": _named_options(cell) if searched else None,
        "wording": task.wording,
        "protocol": setting.protocol,
        "measured": task.measured,
    }


def _named_options(cell: Cell) -> dict[str, str]:
    """A file by its content: another SAE under the same path is another question."""
    return {
        key: hashlib.sha256(Path(value).read_bytes()).hexdigest() if Path(value).is_file() else value
        for key, value in _options(cell.setting, cell.method).items()
    }


def stored(cell: Cell) -> dict | None:
    return shared_work.of_first(lambda: records.find(Path(cell.setting.records), question(cell)))


def attempt(cell: Cell) -> dict:
    """The cell's record, or {"failed": why}: one cell that fails does not end the others, and is tried again next time."""
    try:
        return shared_work.together(lambda: compute(cell))
    except Exception as error:  # whatever it is, it is said, and the exit status says so too
        return {"failed": one_line(error)}


def compute(cell: Cell) -> dict:
    """The cell's record: found, or made and written."""
    found = stored(cell)
    if found is not None:
        return found
    _, _, task = load(cell.setting)
    if cell.method in UNSTEERED:
        prepared = task.prompted if cell.method == "prompt-only" else lambda items: items
        validation = _outcomes(_scores(cell, prepared(task.validation), "validation"))
        result: dict = {"validation": records.pack(validation)}
        start = time.perf_counter()
        columns, extras, _ = _tested(cell, prepared(task.test))
    else:
        result, columns, extras, start = _steered(cell, compute(asked_once(cell.setting, "vanilla")))
    result.setdefault("cost", {})["test_s"] = round(time.perf_counter() - start, 3)
    measure, outcomes = next(iter(columns.items()))
    result |= {"n": len(outcomes), "right": sum(outcomes), "measure": measure, "outcomes": records.pack(outcomes)}
    result |= {"columns": records.pack_columns(columns), "measures": summary(columns), "extras": extras}
    return shared_work.of_first(lambda: records.write(Path(cell.setting.records), question(cell), result))


def _steered(cell: Cell, vanilla: dict) -> tuple[dict, dict[str, list[float]], dict[str, float], float]:
    """What was chosen, the columns and extras of the test, and when the test began."""
    model, _, task = load(cell.setting)
    method = _method(cell.setting, cell.method)
    prepared, seconds = _prepared(cell.setting, cell.method, cell.site)
    settings_to_try = grid(cell)
    result: dict = {"cost": {"prepare_s": seconds}, "n_pairs": len(task.pairs), "grid_scores": {}, "asked": 0}
    # all there are where the method acts, to say what share it touches
    result["aus"] = sum(gate.width for site in sites_of(cell.site) for gate in gates(model, site))
    if len(settings_to_try) == 1:
        chosen = settings_to_try[0]
    else:
        part, split = ("test", "outcomes") if cell.setting.search == "test" else ("validation", "validation")
        items = task.test if part == "test" else task.validation
        order = shuffled(len(items))
        before = records.unpack(vanilla[split])

        def pays(asked: int) -> bool:
            if cell.setting.engine != LIVE:
                return task.generates_on_validation
            return task.multi_token and asked <= FEW

        def ask(some: Sequence[Settings], start: int, stop: int) -> list[list[bool]]:
            now = [items[index] for index in order[start:stop]]
            plans = [method.plan(prepared, settings, cell.draw) for settings in some]
            if len(plans) > 1 and now and pays(len(now)):
                return _together(cell, now, f"{part} {len(plans)} settings {start}-{stop}", plans)
            return [
                _outcomes(_scores(cell, now, f"{part} {_named(settings)} {start}-{stop}", plan))
                for settings, plan in zip(some, plans, strict=True)
            ]

        found = SEARCHES[cell.setting.search](ask, [before[index] for index in order], settings_to_try)
        chosen = found.chosen
        result |= {"grid_scores": found.scores, "asked": found.asked, "chosen_on": part}
        result["grid_vanilla"] = records.pack([before[index] for index in order])
        result["grid_outcomes"] = {key: records.pack(outcomes) for key, outcomes in found.outcomes.items()}
    result |= {"settings": chosen, "chosen": chosen and key_of(chosen)}
    start = time.perf_counter()
    if chosen is None:  # nothing beat doing nothing, so nothing is done
        unchanged = records.unpack_columns(vanilla["columns"])
        return result | {"touched": 0, "gained": 0, "lost": 0, "p": 1.0}, unchanged, vanilla["extras"], start
    plan = method.plan(prepared, chosen, cell.draw)
    columns, extras, receipt = _tested(cell, task.test, plan)
    if chosen.get("alpha") != 0 and plan.header.get("k") != 0 and 0 in receipt.values():  # k: it may choose no AU
        raise AUSteerError(f"{cell} at {key_of(chosen)}: the plan steered nothing ({receipt})")
    result["receipt"] = receipt
    gained, lost, p = mcnemar(records.unpack(vanilla["outcomes"]), next(iter(columns.values())))
    result |= {"touched": len(plan.units()), "gained": gained, "lost": lost, "p": p}
    foretold = ("k", "alpha", "predicted", "measured") if "predicted" in plan.header else ()
    result["foretold"] = {key: plan.header[key] for key in foretold if key in plan.header}
    return result, columns, extras, start


def _named(settings: Settings) -> str:
    return " ".join(f"{key}={value:g}" for key, value in settings.items())


def _together(cell: Cell, items: Sequence, name: str, plans: Sequence[Plan]) -> list[list[bool]]:
    """The outcomes of the same items under each plan, asked in one batch."""
    model, tokenizer, task = load(cell.setting)
    file, progress = _kept(cell, name)
    rows = [plan for plan in plans for _ in items]
    live = cell.setting.engine == LIVE
    asking = nullcontext(LiveAnswerer(model, tokenizer, rows)) if live else served(model, tokenizer, rows)
    with asking as answerer:
        answers = task.answers(answerer, [*items] * len(plans), file, progress)
    found = []
    for start in range(0, len(answers), len(items)):
        mine = answers[start : start + len(items)]
        found.append(task.columns(items, mine).outcomes)
    return found


def _scores(cell: Cell, items: Sequence, name: str, plan: Plan | None = None) -> Scores:
    _, _, task = load(cell.setting)
    answers = _answers(cell, items, name, plan)[0] if items else []
    return task.columns(items, answers) if items else Scores("", {"": []})


def _tested(
    cell: Cell, items: Sequence, plan: Plan | None = None
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, int]]:
    model, tokenizer, task = load(cell.setting)
    answers, receipt = _answers(cell, items, "test", plan)
    columns = task.columns(items, answers).columns
    return columns, task.extras(LiveAnswerer(model, tokenizer), items, answers), receipt


def _answers(cell: Cell, items: Sequence, name: str, plan: Plan | None) -> tuple[Sequence, dict[str, int]]:
    """And the receipt of what the plan did: AUs that were set, and token positions that went through them, or the
    engine's adapter. Not counted again are positions of a run that was killed, whose answers were kept."""
    model, tokenizer, task = load(cell.setting)
    file, progress = _kept(cell, name)
    kept = shared_work.of_first(lambda: file is not None and file.path.exists())
    live = cell.setting.engine == LIVE
    speaks = nullcontext(LiveAnswerer(model, tokenizer)) if live else served(model, tokenizer, [plan] * len(items))
    with steer(model, _of_first(plan)) if plan is not None else nullcontext() as steering, speaks as speaker:
        answers = task.answers(speaker, items, file, progress)
        if steering is None:
            return answers, {}
        receipt = steering.receipt()
        positions = sum(shared_work.merged([receipt.pop("positions")]))
        counted = {"positions": positions} if live else speaker.receipt()
        return answers, receipt | ({} if kept else counted)


def _kept(cell: Cell, name: str) -> tuple[AnswerFile | None, str | None]:
    """Of the paper's tasks, which take long, answers are kept as they come, and a killed run goes on."""
    _, _, task = load(cell.setting)
    if not cell.setting.of_the_paper or not (task.generates_on_validation or name == "test"):
        return None, None
    return AnswerFile(answers_path(cell, name)), f"{cell} {name}"


def _of_first(plan: Plan) -> Plan:
    return replace(plan, **{kind: shared_work.tensors_of_first(getattr(plan, kind)) for kind in ("scales", "shifts")})


def answers_path(cell: Cell, name: str = "test") -> Path:
    return answers_of_record(cell.setting, records.record_id(question(cell)), name)


def answers_of_record(setting: Setting, record: str, name: str = "test") -> Path:
    part = name.replace(" ", "-").replace("=", "")
    return Path(setting.records).parent / "answers" / f"{record}-{part}.jsonl"


def stored_ranks(setting: Setting, momentum: str, site: str) -> AURanks | None:
    """Ranks of exactly this model and these pairs, if they are there, for all processes."""
    found = _ranks_here(setting, momentum, site)
    return found if shared_work.all_say(found is not None) else None


def _ranks_here(setting: Setting, momentum: str, site: str) -> AURanks | None:
    model, _, task = load(setting)
    file = setting.ranks_folder(momentum) / f"{site}.safetensors"
    if not file.exists():
        return None
    ranks = AURanks.load(file)
    wanted = {
        "code": ranks.header.get("code") and records.code_hash(),  # those that come with the repository have none
        "fingerprint": fingerprint(model),
        "pairs_hash": pairs_hash(task.pairs),
        "momentum": momentum,
        "protocol": setting.protocol,
    }
    return ranks if all(ranks.header.get(key) == value for key, value in wanted.items()) else None


def grid(cell: Cell) -> list[Settings]:
    """The method's settings, or those of the k and alpha that were given. Its own may be as many as any other's."""
    kind = "small" if cell.setting.embedded else "full"
    found = _method(cell.setting, cell.method).grid(kind)
    assert len(found) <= BUDGET[kind], f"{cell.method} tries {len(found)} settings, others {BUDGET[kind]}"
    for key, given in (("k", cell.setting.ks), ("alpha", cell.setting.alphas)):
        if given:
            found = [{**settings, key: value} for value in given for settings in found if key in settings] or found
    return list({key_of(settings): settings for settings in found}.values())


def _outcomes(scores: Scores) -> list[bool]:
    """Return those of the measure that settings are chosen by."""
    return scores.outcomes
