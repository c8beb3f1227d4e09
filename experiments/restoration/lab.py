"""Hold what the rows of a restoration share: the dense model, its pruned copy, and what is learned from both, each made on demand."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from austeer.evidence import Evidence
from austeer.methods.restore_lcc import Prepared, Recipe, RestoreLCC
from austeer.pruning.prune import parse_sparsity, prune
from experiments.bench import Bench
from experiments.restoration.material import Material


@dataclass
class Lab:
    bench: Bench
    material: Material
    pruning: str
    sparsity: str
    recipe: Recipe

    @property
    def dense(self) -> PreTrainedModel:
        return self.bench.model

    @cached_property
    def _pruning(self) -> tuple[PreTrainedModel, dict]:
        start, pruned = time.perf_counter(), copy.deepcopy(self.dense)
        counts = prune(pruned, self.pruning, parse_sparsity(self.sparsity), self.material.calibration)
        achieved = {"zeros": counts.zeros, "weights": counts.weights, "by_module": counts.by_module}
        return pruned, {"achieved": achieved, "pruning_s": time.perf_counter() - start}

    @property
    def pruned(self) -> PreTrainedModel:
        return self._pruning[0]

    @property
    def achieved(self) -> dict:
        return self._pruning[1]

    @property
    def evidence(self) -> Evidence:
        return Evidence(self.pruned, self.bench.tokenizer, self.material.pairs, "attention")

    @cached_property
    def method(self) -> RestoreLCC:
        return RestoreLCC(self.dense, self.recipe)

    @cached_property
    def prepared(self) -> Prepared:
        return self.method.prepare(self.evidence)
