"""Choose, measure and store the rows of a restoration. Each is a record of its own, so a stopped run can be continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from austeer.code_identity import code_hash
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.identity import fingerprint, public_name
from austeer.methods.base import GridPoint
from austeer.methods.restore_lcc import answer_loss, questions_of
from austeer.plan import Plan
from eval.answering.live import LiveAnswerer
from eval.statistics import summary
from experiments import records
from experiments.cell import EMBEDDED
from experiments.restoration.contenders import Contender, SteeredDense, contenders
from experiments.restoration.lab import Lab
from experiments.restoration.measures import perplexity, zero_shot
from experiments.search import full_grid
from rmodels import code_roots


class Restoration:
    """Compare the dense model, the pruned one and the contenders."""

    def __init__(self, lab: Lab, draws: int, rivals: tuple[str, ...], lm_eval: tuple[str, ...] = ()):
        self.lab, self.lm_eval, self.task = lab, lm_eval, lab.bench.task
        if not (self.task.validation or lab.material.held_out):
            raise AUSteerError(
                f"{lab.bench.task_spec.label} has no validation items to choose a grid point on: take another task, or "
                "give more pairs"
            )
        self.ours, *self.others = contenders(lab, draws, rivals)
        self.key = self._key()
        self._floor: list[float] | None = None

    def rows(self) -> list[dict]:
        """Return all rows, computing those that have no record yet."""
        lab = self.lab
        dense = self._row("dense", lambda: self._measured("dense", nullcontext(lab.dense)))
        dense |= self._zero_shot("dense", lambda: nullcontext(lab.dense))
        pruned = self._row("pruned", lambda: self._measured("pruned", nullcontext(lab.pruned)) | lab.achieved)
        pruned |= self._zero_shot("pruned", lambda: nullcontext(lab.pruned))
        rows = [dense, pruned, self._contend(self.ours, pruned)]
        if settings := rows[-1]["settings"]:
            rows.append(self._contend(SteeredDense(lab, settings), pruned, settings))
        return rows + [self._contend(contender, pruned) for contender in self.others]

    def plan(self, rows: Sequence[dict]) -> Plan | None:
        """Return RestoreLCC's plan for the pruned model, None where no grid point beat the pruned model."""
        settings = rows[2]["settings"]
        return self.ours.plan(settings) if settings else None

    def _contend(self, contender: Contender, pruned: dict, settings: GridPoint | None = None) -> dict:
        def compute() -> dict:
            chosen, scores = (settings, {}) if settings else self._search(contender)
            details = {"settings": chosen, "grid_scores": scores}
            if chosen is None:  # the pruned model stays as it is
                measured = {
                    name: pruned[name] for name in ("measure", "value", "low", "high", "n", "perplexity", "columns")
                }
                return measured | {"label": contender.label, "touched": 0, "numbers": 0} | details
            measured = self._measured(contender.label, contender.installed(chosen))
            return measured | contender.size(chosen) | details

        row = self._row(contender.label, compute)
        if row["settings"] is None:
            return row | ({"lm_eval": pruned["lm_eval"]} if self.lm_eval else {})
        return row | self._zero_shot(contender.label, lambda: contender.installed(row["settings"]))

    def _row(self, label: str, compute: Callable[[], dict]) -> dict:
        key = self.key | {"row": label}
        bench = self.lab.bench
        return dict(bench.store.find(key) or bench.store.write(key, bench.origin | compute()))

    def _zero_shot(self, label: str, installed: Callable[[], AbstractContextManager[PreTrainedModel]]) -> dict:
        if not self.lm_eval:
            return {}
        limit, store = self.lab.bench.task_spec.limit, self.lab.bench.store
        key = self.key | {"row": label, "lm_eval_tasks": list(self.lm_eval), "lm_eval_limit": limit}
        record = store.find(key)
        if record is None:
            with installed() as model:
                record = store.write(
                    key,
                    self.lab.bench.origin
                    | {"lm_eval": zero_shot(model, self.lab.bench.tokenizer, self.lm_eval, limit)},
                )
        return {"lm_eval": record["lm_eval"]}

    def _measured(self, label: str, installed: AbstractContextManager[PreTrainedModel]) -> dict:
        with installed as model:
            answers = self.task.answers(LiveAnswerer(model, self.lab.bench.tokenizer), self.task.test)
            scores = self.task.columns(self.task.test, answers)
            held_out = perplexity(model, self.lab.material.text)
        return {"label": label, "measure": scores.main, **summary(scores.columns)[scores.main], "perplexity": held_out,
                "touched": 0, "numbers": 0, "columns": records.pack_columns(scores.columns)}  # fmt: skip

    def _search(self, contender: Contender) -> tuple[GridPoint | None, dict[str, float]]:
        if self._floor is None:
            self._floor = self._validated(self.lab.pruned)

        def ask(points: Sequence[GridPoint], start: int, stop: int) -> list[list[float]]:
            outcomes = []
            for point in tqdm(points, desc=contender.label, unit="grid point", leave=False):
                with contender.installed(point) as model:
                    outcomes.append(self._validated(model)[start:stop])
            return outcomes

        search = full_grid(ask, self._floor, contender.grid)
        return search.chosen, search.scores

    @torch.no_grad()
    def _validated(self, model: PreTrainedModel) -> list[float]:
        """Return an outcome per validation item; for held-out instructions, the negative loss of each answer."""
        held_out, tokenizer = self.lab.material.held_out, self.lab.bench.tokenizer
        if held_out:
            questions = questions_of(Evidence(model, tokenizer, held_out, "attention"))
            questions = [question.cut(self.lab.recipe.max_tokens) for question in questions]
            return [-float(answer_loss(model, [question])) for question in questions if question.answer]
        answers = self.task.answers(LiveAnswerer(model, tokenizer), self.task.validation)
        return self.task.columns(self.task.validation, answers).outcomes

    def _key(self) -> dict:
        lab, bench, task = self.lab, self.lab.bench, self.lab.bench.task
        return {
            "model": EMBEDDED if bench.model_spec.embedded else public_name(bench.model_spec.name),
            "task": bench.task_spec.label,
            "method": "restore",
            "fingerprint": fingerprint(lab.dense),
            "dtype": str(lab.dense.dtype),
            "device": lab.dense.device.type,
            "kernel": lab.dense.config._attn_implementation,
            **lab.material.key(),
            "items_hash": task.fingerprint,
            "test_split": task.test_split,
            "wording": task.wording,
            "measured": task.measured,
            "pruning": lab.pruning,
            "sparsity": lab.sparsity,
            "recipe": vars(lab.recipe),
            "code": code_hash(Restoration, type(task), *code_roots(type(lab.dense))),
        }
