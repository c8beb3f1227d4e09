"""Compute one cell: search its grid on validation, test once, and record the result under the cell's key.

A cell is computed from its description alone, in this process or in any other: processes share nothing but the
folders of the store.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

from austeer.change import Adapter, Change
from austeer.code_identity import code_hash
from austeer.errors import AUSteerError, one_line
from austeer.evidence import Evidence
from austeer.identity import fingerprint, public_name
from austeer.methods.base import MOST_POINTS, ORIGINAL, GridPoint, Method, sites_of
from austeer.methods.registry import METHODS, with_options
from austeer.pairs import pairs_hash
from austeer.plan import Plan
from eval.answering.answer_file import Answer, AnswerFile
from eval.decomposition import UNBIASED, Preferences, without_offset
from eval.statistics import mcnemar, summary
from eval.tasks.base import Scores, Task, items_hash
from experiments import records
from experiments.bench import BENCHES, Bench, is_paper_task
from experiments.cell import AT_KL, Cell, MethodSpec
from experiments.costs import cost_of_prompts, costs_of, meter_of, neutral_of, predicted_cost
from experiments.engines.answering import answering, engine_code, engine_name, one_batch_pays
from experiments.equal_kl import TOLERATED, Unreached, candidates, scaled_to
from experiments.ranking import ranks_of
from experiments.search import SEARCHES, key_of, shuffled
from experiments.store import Store
from MFU_screening import MOMENTA, screen
from rmodels import code_roots, gates


def attempt(cell: Cell, store: Store) -> dict:
    """Return the cell's record, or {"failed": why}: one cell that fails does not end the others."""
    try:
        return run_cell(cell, BENCHES.open(cell.model, cell.task, store))
    except Exception as error:  # of any kind: the table shows it, and the exit status is 1
        return {"failed": one_line(error)}


def stored(cell: Cell, store: Store) -> dict | None:
    return store.find(cell_key(cell, BENCHES.open(cell.model, cell.task, store)))


def run_cell(cell: Cell, bench: Bench) -> dict:
    """Return the cell's stored record, or compute and store it."""
    key = cell_key(cell, bench)
    record = bench.store.find(key)
    if record is not None:
        return record
    name, at_kl = records.record_id(key), cell.search.kind == AT_KL
    if not cell.steered and not at_kl:
        return bench.store.write(key, bench.origin | Run(cell, bench, name).unsteered())
    base = cell.unsteered("vanilla" if cell.steered else cell.method.name)
    before = run_cell(base, BENCHES.open(base.model, base.task, bench.store))
    if not cell.steered:
        result = Run(cell, bench, name).with_kl(before)
    else:
        result = RunAtKL(cell, bench, name).at_kl(before) if at_kl else SteeredRun(cell, bench, name).steered(before)
    return bench.store.write(key, bench.origin | result)


def cell_key(cell: Cell, bench: Bench) -> dict:
    """Return everything that determines the cell's result, the code that computes it included."""
    model, task = bench.model, bench.task
    points = grid(cell) if cell.steered else None
    key = {
        "model": cell.model.name if cell.model.embedded else public_name(cell.model.name),
        "task": cell.task.label,
        "site": cell.method.site,
        "method": cell.method.name,
        "draw": cell.method.draw,
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype),
        "quantization": cell.model.quantization,
        # rounding differs between kinds of devices, kernels and batches: never mixed under one name
        "device": model.device.type,
        "kernel": model.config._attn_implementation,
        "batch_size": cell.task.batch_size,
        "engine": engine_name(cell.model.engine),
        "pairs_hash": pairs_hash(task.pairs) if cell.steered else None,
        "pairs_by": task.pairs_by if cell.steered else None,  # read after `pairs`, which set it
        "items_hash": task.fingerprint,
        "test_split": task.test_split,
        "grid": points,
        "search": cell.search.kind if cell.steered and len(points) > 1 else None,
        "options": _options_by_content(cell.method) if cell.steered else None,
        "files": _hashed(method_of(cell.method).files(model)) if cell.steered else {},
        "wording": task.wording,
        "protocol": cell.task.protocol,
        "measured": task.measured,
        "code": cell_code(cell, type(task), type(model)),
    }
    if cell.method.name == "prompt-only":
        key["items_hash"] = items_hash(task.prompted([*task.validation, *task.test]))
    if has_costs(cell):
        key["neutral"] = neutral_of(bench).hash
    if cell.search.kind == AT_KL:
        key |= {"search": AT_KL, "level": cell.search.level}
    return key


def has_costs(cell: Cell) -> bool:
    """Say whether a cell's result depends on neutral text."""
    return cell.search.kind == AT_KL or (cell.steered and METHODS[cell.method.name].budgeted)


def cell_code(cell: Cell, task: type[Task], family: type) -> str:
    """Hash the code that makes this cell: what computes it, its task, its family, and its method with what that needs."""
    cut = REGISTRIES if has_costs(cell) else REGISTRIES | COSTS
    if not cell.steered:
        run = Run.with_kl if cell.search.kind == AT_KL else Run.unsteered
        return code_hash(run, Run.unsteered, task, *code_roots(family), *engine_code(cell.model.engine), cut=cut)
    method = METHODS[cell.method.name]
    screening = [screen, *(MOMENTA[momentum] for momentum in method.momenta)] if method.momenta else []
    run = [RunAtKL.at_kl] if cell.search.kind == AT_KL else [SteeredRun.steered, SEARCHES[cell.search.kind]]
    return code_hash(
        *run, type(method), task, *code_roots(family), *screening, *engine_code(cell.model.engine), cut=cut
    )


# definitions that list alternatives or choose among them; `cell_code` adds the one that the cell uses
REGISTRIES = frozenset({
    "austeer.methods.registry:METHODS", "experiments.search:SEARCHES", "MFU_screening:MOMENTA",
    "experiments.ranking:ranks_of", "experiments.engines.answering:answering", "eval.tasks.registry:PAPER_TASKS",
    "experiments.bench:BENCHES",
})  # fmt: skip
# and definitions that only cells use which depend on neutral text
COSTS = frozenset(f"experiments.costs:{name}" for name in ("costs_of", "predicted_cost", "cost_of_prompts"))


def _options_by_content(method: MethodSpec) -> dict[str, str]:
    """Replace files by their hashes: another SAE under the same path makes another record."""
    return {key: _hashed({key: Path(value)})[key] if Path(value).is_file() else value for key, value in method.options}


def _hashed(files: dict[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def grid(cell: Cell) -> list[GridPoint]:
    """Return the method's grid points, with the given ks and alphas in place of its own where there are any."""
    kind = "small" if cell.model.embedded else "full"
    points = method_of(cell.method).grid(kind)
    if len(points) > MOST_POINTS[kind]:
        name = cell.method.name
        says = f"{name} has {len(points)} grid points; the most that a method may have is {MOST_POINTS[kind]}"
        assert ("preset", ORIGINAL) in cell.method.options, says
        if cell.search.kind not in ("racing", AT_KL):  # which costs the same, however many points there are
            raise AUSteerError(
                f"{says}, and {name}.preset={ORIGINAL} may have more in a race only: add --search racing"
            )
    for key, values in (("k", cell.search.ks), ("alpha", cell.search.alphas)):
        if values:
            points = [{**point, key: value} for value in values for point in points if key in point] or points
    if cell.search.kind == AT_KL:
        points = [point | {"kl": cell.search.level} if "kl" in point else point for point in candidates(points)]
    return list({key_of(point): point for point in points}.values())


def method_of(spec: MethodSpec) -> Method:
    return with_options(spec.name, dict(spec.options))


# what every record says of a test: see Run.result
RESULT = ("cost", "n", "right", "measure", "outcomes", "columns", "measures", "extras")


class Run:
    """Answer and score the items of one cell. `record` is the id of its future record; answers are stored under it."""

    def __init__(self, cell: Cell, bench: Bench, record: str):
        self.cell, self.bench, self.record, self.task = cell, bench, record, bench.task

    def unsteered(self) -> dict:
        with_wording = self.task.prompted if self.cell.method.name == "prompt-only" else list
        others = with_wording(self.task.validation)
        answers = self.said(others, "validation", None)
        validation = self.task.columns(others, answers).outcomes if others else []
        fitted_on = self.task.preferences(others, answers) if others else None
        start = time.perf_counter()
        scores, extras, _ = self.test(with_wording(self.task.test), fitted_on, None)
        return {"validation": records.pack(validation), **self.result(scores, extras, start, {})}

    def with_kl(self, before: dict) -> dict:
        """Return the result of prompts with an instruction, with the KL of the instruction."""
        plain = self.task.test[:1]
        kl = cost_of_prompts(self.bench, plain[0].prompt, self.task.prompted(plain)[0].prompt)
        return {key: before[key] for key in RESULT} | {"kl": kl}

    def result(self, scores: Scores, extras: dict, start: float, cost: dict) -> dict:
        return {
            "cost": {**cost, "test_s": round(time.perf_counter() - start, 3)},
            "n": len(scores.outcomes),
            "right": sum(scores.outcomes),
            "measure": scores.main,
            "outcomes": records.pack(scores.outcomes),
            "columns": records.pack_columns(scores.columns),
            "measures": summary(scores.columns),
            "extras": extras,
        }

    def ask(self, items: Sequence, name: str, change: Change | None) -> list[bool]:
        """Return the outcomes of the measure that grid points are chosen by."""
        return self.task.columns(items, self.said(items, name, change)).outcomes if items else []

    def said(self, items: Sequence, name: str, change: Change | None) -> list[Answer]:
        """Return the answers under a change."""
        if not items:
            return []
        with answering(self.bench, [change], len(items)) as (answerer, _):
            return self.answers(answerer, items, name)

    def test(
        self, items: Sequence, fitted_on: Preferences | None, change: Change | None
    ) -> tuple[Scores, dict[str, float], dict[str, int]]:
        """Return scores, figures of the whole set, and a receipt of what the plan or the adapter did.

        fitted_on: the preferences of the validation answers, on which the constant preference is fitted.

        The receipt counts the AUs or modules that were changed, and the token positions that went through them or the
        modules of the engine's adapter. A resumed run would count only its own positions, so it leaves them out.
        """
        file = self.answer_file("test")
        resumed = file is not None and file.path.exists()
        with answering(self.bench, [change], len(items)) as (answerer, receipt):
            answers = self.answers(answerer, items, "test")
            counts = receipt()
        if resumed:
            counts.pop("positions", None)
        with answering(self.bench, [None], len(items)) as (unsteered, _):
            extras = self.task.extras(unsteered, items, answers)
        scores = self.task.columns(items, answers)
        if tested := self.task.preferences(items, answers):
            scores.columns[UNBIASED], extras["offset, nats"] = without_offset(tested, fitted_on)
        return scores, extras, counts

    def answers(self, answerer, items: Sequence, name: str) -> list[Answer]:
        file = self.answer_file(name)
        return self.task.answers(answerer, items, file, f"{self.cell} {name}" if file else None)

    def answer_file(self, name: str) -> AnswerFile | None:
        """Return the file of the answers. Those of the paper's tasks take long, and a killed run continues from them."""
        if not is_paper_task(self.cell.model, self.cell.task) or not (
            self.task.generates_on_validation or name == "test"
        ):
            return None
        return AnswerFile(self.bench.store.answers_file(self.record, name))


class SteeredRun(Run):
    """Choose a grid point and test it."""

    def steered(self, vanilla: dict) -> dict:
        method, points = method_of(self.cell.method), grid(self.cell)
        learned, seconds = self.learned(method)
        result = self.beginning()
        chosen = points[0]
        if len(points) > 1:
            chosen, searched = self.search(method, learned, points, vanilla)
            result |= searched
        result |= {"settings": chosen, "chosen": chosen and key_of(chosen)}
        start = time.perf_counter()
        if chosen is None:  # no grid point beat vanilla, so nothing is steered
            scores = Scores(vanilla["measure"], records.unpack_columns(vanilla["columns"]))
            result |= {"touched": 0, "inverted": 0, "gained": 0, "lost": 0, "p": 1.0}
            return result | self.result(scores, vanilla["extras"], start, {"prepare_s": seconds})
        change = method.plan(learned, chosen, self.cell.method.draw)
        if method.budgeted:
            result["kl"] = predicted_cost(self.bench, change) | {"measured": change.header["measured_kl"]}
        return result | self.tested(method, learned, chosen, change, vanilla, seconds)

    def beginning(self) -> dict:
        sites = sites_of(self.cell.method.site)
        return {
            "n_pairs": len(self.task.pairs),
            "grid_scores": {},
            "asked": 0,
            # all AUs of the sites, to tell what share of them is steered
            "aus": sum(gate.width for site in sites for gate in gates(self.bench.model, site)),
        }

    def tested(
        self,
        method: Method,
        learned: object,
        chosen: GridPoint,
        change: Change | None,
        vanilla: dict,
        seconds: float | None,
    ) -> dict:
        """Return the result of the test items under a change, compared with vanilla."""
        fitted_on, draw = self.preferences(method, learned, chosen, change), self.cell.method.draw
        start = time.perf_counter()
        items, shown = method.asked(learned, chosen, self.task.test, draw)
        scores, extras, receipt = self.test(items, fitted_on, change)
        gained, lost, p = mcnemar(records.unpack(vanilla["outcomes"]), scores.outcomes)
        result = {"receipt": receipt | shown, "touched": 0, "inverted": 0, "gained": gained, "lost": lost, "p": p}
        if change is not None:
            # a method may itself choose k = 0
            if chosen.get("alpha") != 0 and change.header.get("k") != 0 and 0 in receipt.values():
                raise AUSteerError(f"{self.cell} at {key_of(chosen)}: the plan steered nothing ({receipt})")
            result |= {"touched": len(change.aus()), "inverted": change.inverted}
            predicted = ("k", "alpha", "predicted", "measured") if "predicted" in change.header else ()
            result["foretold"] = {key: change.header[key] for key in predicted if key in change.header}
        if isinstance(change, Adapter):
            result["numbers"] = change.numbers
        return result | self.result(scores, extras, start, {"prepare_s": seconds})

    def preferences(
        self, method: Method, learned: object, chosen: GridPoint, change: Change | None
    ) -> Preferences | None:
        """Return which options the answers to validation items prefer; None without such items, or without two options."""
        if not self.task.validation or self.task.preferences([], []) is None:
            return None
        items, _ = method.asked(learned, chosen, self.task.validation, self.cell.method.draw)
        return self.task.preferences(items, self.said(items, "preferences", change))

    def learned(self, method: Method) -> tuple[object, float | None]:
        """Return what the method learned from the pairs, and the seconds that took, ranks included.

        The seconds are None where they are unknown, as for shipped ranks.
        """
        bench, site = self.bench, self.cell.method.site
        key = method.learns_as or method.name, self.cell.method.options, site
        if key not in bench.learned:
            BENCHES.forget_learned(bench)
            seconds = []  # how long the ranks took when they were made

            def ranks(momentum: str, at: str = site):
                ranks = ranks_of(bench, momentum, at)
                seconds.append(ranks.header.get("seconds"))
                return ranks

            start = time.perf_counter()
            evidence = Evidence(bench.model, bench.tokenizer, self.task.pairs, site, ranks, costs=costs_of(bench))
            learned = method.prepare(evidence)
            total = None if None in seconds else time.perf_counter() - start + sum(seconds)
            bench.learned[key] = learned, total
        return bench.learned[key]

    def search(
        self, method: Method, learned: object, points: Sequence[GridPoint], vanilla: dict
    ) -> tuple[GridPoint | None, dict]:
        """Choose a grid point on validation, or on the test split if the search is of kind "test"."""
        part, items, split = ("validation", self.task.validation, "validation")
        if self.cell.search.kind == "test":
            part, items, split = ("test", self.task.test, "outcomes")
        order = shuffled(len(items))
        before = records.unpack(vanilla[split])

        def ask(subset: Sequence[GridPoint], start: int, stop: int) -> list[list[bool]]:
            sample = [items[index] for index in order[start:stop]]
            draw = self.cell.method.draw
            changes = [method.plan(learned, point, draw) for point in subset]
            together = len(changes) > 1 and all(isinstance(change, Plan) for change in changes)
            if together and sample and one_batch_pays(self.cell.model.engine, self.task, len(sample)):
                return self.ask_together(sample, f"{part} {len(changes)} points {start}-{stop}", changes)
            outcomes = []
            for point, change in zip(subset, changes, strict=True):
                name = " ".join(f"{key}={value:g}" for key, value in point.items())
                asked, _ = method.asked(learned, point, sample, draw)
                outcomes.append(self.ask(asked, f"{part} {name} {start}-{stop}", change))
            return outcomes

        search = SEARCHES[self.cell.search.kind](ask, [before[index] for index in order], points)
        return search.chosen, {
            "grid_scores": search.scores,
            "asked": search.n_evaluated,
            "chosen_on": part,
            "grid_vanilla": records.pack([before[index] for index in order]),
            "grid_outcomes": {key: records.pack(outcomes) for key, outcomes in search.outcomes.items()},
        }

    def ask_together(self, items: Sequence, name: str, plans: Sequence[Plan]) -> list[list[bool]]:
        """Return the outcomes of the same items under each plan, asked in one batch."""
        with answering(self.bench, plans, len(items)) as (answerer, _):
            answers = self.answers(answerer, [*items] * len(plans), name)
        parts = [answers[start : start + len(items)] for start in range(0, len(answers), len(items))]
        return [self.task.columns(items, part).outcomes for part in parts]


class RunAtKL(SteeredRun):
    """Test a method at a stated KL on neutral text: one scalar brings its change to that KL, and no strength is searched.

    Methods with other choices than a strength, such as a layer, make them on validation, all candidates at that KL.
    """

    def at_kl(self, vanilla: dict) -> dict:
        method, points = method_of(self.cell.method), grid(self.cell)
        learned, seconds = self.learned(method)
        result, cost = self.beginning(), {"asked": self.cell.search.level, "text": neutral_of(self.bench).name}
        brought, refused = {}, {}
        for point in points:
            try:
                brought[key_of(point)] = point, *self.at_level(method, learned, point)
            except Unreached as why:
                refused[key_of(point)] = str(why)
        cost |= {"refused": refused} if refused else {}
        if not brought:
            point = {"settings": points[0], "chosen": key_of(points[0])}
            why = next(iter(refused.values()))
            return result | point | {"kl": cost | {"unreached": why}, "cost": {"prepare_s": seconds}}
        chosen, searched = self.best_of(method, learned, brought)
        point, change, found = brought[chosen]
        result |= searched | {"settings": point, "chosen": chosen, "kl": cost | found}
        if change is not None:
            result["kl"] |= predicted_cost(self.bench, change) | self.cost_on_other_text(change)
        return result | self.tested(method, learned, point, change, vanilla, seconds)

    def at_level(self, method: Method, learned: object, point: GridPoint) -> tuple[Change | None, dict]:
        """Return the change of a grid point at the cell's level, and how it got there."""
        bench, level, draw = self.bench, self.cell.search.level, self.cell.method.draw
        meter = meter_of(bench, "measure")
        spent = meter.passes
        change, factor = method.plan(learned, point, draw), None
        if change is None:  # only the prompts differ
            (asked, *_), _ = method.asked(learned, point, self.task.test[:1], draw)
            return None, cost_of_prompts(bench, self.task.test[0].prompt, asked.prompt)
        if method.budgeted:
            measured = change.header["measured_kl"]
            if abs(measured / level - 1) > TOLERATED:
                raise Unreached(change.header.get("reached", f"the nearest of its tries costs {measured:.3g}"))
        else:
            price = predicted_cost(bench, change)["predicted"]
            scaled = scaled_to(change, level, meter, math.sqrt(level / price) if price else 1.0)
            change, factor, measured = scaled.change, scaled.factor, scaled.kl
        return change, {"measured": measured, "factor": factor, "passes": meter.passes - spent}

    def best_of(self, method: Method, learned: object, brought: dict[str, tuple]) -> tuple[str, dict]:
        """Return the key of the candidate with the most right answers on validation; the first of equals.

        Where nothing is left to choose on, it is the middle one.
        """
        items, right = self.task.validation, {}
        if len(brought) == 1 or not items:
            chosen_on = {"chosen_on": "nothing: the middle candidate"} if len(brought) > 1 else {}
            return [*brought][len(brought) // 2], chosen_on
        for key, (point, change, _) in brought.items():
            asked, _ = method.asked(learned, point, items, self.cell.method.draw)
            right[key] = sum(self.ask(asked, f"validation {key} at KL", change))
        scores = {key: count / len(items) for key, count in right.items()}
        searched = {"grid_scores": scores, "asked": len(items) * len(right), "chosen_on": "validation"}
        return max(right, key=right.get), searched

    def cost_on_other_text(self, change: Change) -> dict:
        """Return the KL on neutral text that corrected nothing, with its error, on prompts, and on the model's own text."""
        fresh, error = meter_of(self.bench, "report").with_error(change)
        on_others = {f"on_{text}": meter_of(self.bench, text)(change) for text in ("prompts", "own")}
        return {"fresh": fresh, "fresh_error": error} | on_others
