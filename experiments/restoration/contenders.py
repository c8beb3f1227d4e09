"""Define the rows of a restoration (RestoreLCC, its controls, its rivals). Each changes a model within a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from itertools import product

import torch
from transformers import PreTrainedModel

from austeer.errors import AUSteerError, missing_extra
from austeer.identity import model_header
from austeer.methods.base import GridPoint
from austeer.methods.restore_lcc import (
    EPOCHS,
    RATES,
    SEED,
    MeanLost,
    RandomHeads,
    RestoreLCC,
    answer_loss,
    fit,
    questions_of,
)
from austeer.plan import Plan
from austeer.pruning.eora import Factors, compensated, eora
from austeer.steering import steer
from experiments.restoration.lab import Lab
from experiments.search import key_of
from rmodels.structural import linear_maps

RIVALS = ("lora", "dora", "eora")
# LoRA acts where RestoreLCC does, on o_proj; of rank 1 it has at least twice the numbers of RestoreLCC on half the heads
LORA_RANKS = dict.fromkeys(("small", "full"), (1, 2, 4))
EORA_RANKS = {"small": (1, 4, 16), "full": (8, 32, 128)}


class Contender(ABC):
    """Change the pruned model, at each point of a grid."""

    label: str
    grid: list[GridPoint]

    @abstractmethod
    def installed(self, point: GridPoint) -> AbstractContextManager[PreTrainedModel]:
        """Yield the changed model, and undo the change on leaving the `with` block."""

    @abstractmethod
    def size(self, point: GridPoint) -> dict[str, int]:
        """Count the activations it shifts, `touched`, and the numbers it learned or computed, `numbers`."""


class Steered(Contender):
    """Steer by RestoreLCC's plan, or by that of a control."""

    def __init__(self, lab: Lab, method: RestoreLCC, draw: int = 0):
        self.lab, self.method, self.draw = lab, method, draw
        self.label = method.label + (f", draw {draw + 1}" if method.draws else "")
        self.grid = method.grid(lab.bench.grid_kind)
        self._plans: dict[str, Plan] = {}

    def plan(self, point: GridPoint) -> Plan:
        if key_of(point) not in self._plans:
            self._plans[key_of(point)] = self.method.plan(self.prepared(), point, self.draw)
        return self._plans[key_of(point)]

    def prepared(self):
        return self.lab.prepared

    @contextmanager
    def installed(self, point: GridPoint) -> Iterator[PreTrainedModel]:
        model = self.prepared().model
        with steer(model, self.plan(point)):
            yield model

    def size(self, point: GridPoint) -> dict[str, int]:
        shifted = len(self.plan(point))
        return {"touched": shifted, "numbers": shifted * (2 if self.method.trains else 1)}  # beta and b


class SteeredDense(Steered):
    """Train on the dense model, which has lost nothing: what RestoreLCC gains beyond this is restoration."""

    def __init__(self, lab: Lab, point: GridPoint):
        super().__init__(lab, lab.method)
        self.label, self.grid = "dense, trained alike", [point]

    def prepared(self):
        return replace(self.lab.prepared, model=self.lab.dense, header=model_header(self.lab.dense))


class Adapted(Contender):
    """Train LoRA on o_proj, or DoRA, through PEFT, on the same answers and in the same way as RestoreLCC."""

    def __init__(self, lab: Lab, dora: bool):
        check_peft()
        self.lab, self.dora, self.label = lab, dora, "DoRA" if dora else "LoRA"
        kind = lab.bench.grid_kind
        self.grid = [{"rank": rank, "rate": rate} for rank, rate in product(LORA_RANKS[kind], RATES[kind])]
        self._trained: dict[str, dict[str, torch.Tensor]] = {}

    @contextmanager
    def installed(self, point: GridPoint) -> Iterator[PreTrainedModel]:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        rank, model = point["rank"], self.lab.pruned
        names = [
            linear.weight.removesuffix(".weight") for _, site, _, linear in linear_maps(model) if site == "attention"
        ]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, use_dora=self.dora)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            adapted = get_peft_model(model, config)
        try:
            if key_of(point) not in self._trained:
                self._fit([weight for weight in adapted.parameters() if weight.requires_grad], point["rate"])
                trained = get_peft_model_state_dict(adapted)
                self._trained[key_of(point)] = {name: weight.detach().cpu() for name, weight in trained.items()}
            set_peft_model_state_dict(adapted, self._trained[key_of(point)])
            yield model
        finally:
            adapted.unload()

    def _fit(self, parameters: list[torch.Tensor], rate: float) -> None:
        generator = torch.Generator().manual_seed(SEED)
        questions = questions_of(self.lab.evidence)
        model = self.lab.pruned
        fit(parameters, lambda batch: answer_loss(model, batch), questions, rate, self.lab.recipe, EPOCHS, generator)

    def size(self, point: GridPoint) -> dict[str, int]:
        return {"touched": 0, "numbers": sum(weight.numel() for weight in self._trained[key_of(point)].values())}


class Compensated(Contender):
    """Add EoRA's low-rank matrices to all pruned Linears. Nothing is trained."""

    label = "EoRA, untrained"

    def __init__(self, lab: Lab):
        self.lab = lab
        self.grid = [{"rank": rank} for rank in EORA_RANKS[lab.bench.grid_kind]]

    @cached_property
    def factors(self) -> Factors:
        """Return the factors of the largest rank, which contain those of all smaller ranks."""
        rank = max(point["rank"] for point in self.grid)
        return eora(self.lab.dense, self.lab.pruned, self.lab.material.calibration, rank)

    def installed(self, point: GridPoint) -> AbstractContextManager[PreTrainedModel]:
        return compensated(self.lab.pruned, self.factors, point["rank"])

    def size(self, point: GridPoint) -> dict[str, int]:
        rank = point["rank"]
        numbers = sum(a[:rank].numel() + b[:, :rank].numel() for a, b in self.factors.values())
        return {"touched": 0, "numbers": numbers}


def contenders(lab: Lab, draws: int, rivals: tuple[str, ...]) -> list[Contender]:
    rows = [
        Steered(lab, lab.method),
        *(Steered(lab, RandomHeads(lab.dense, lab.recipe), draw) for draw in range(draws)),
        Steered(lab, MeanLost(lab.dense, lab.recipe)),
    ]
    makers = {"lora": lambda: Adapted(lab, False), "dora": lambda: Adapted(lab, True), "eora": lambda: Compensated(lab)}
    return rows + [makers[name]() for name in rivals]


def check_peft() -> None:
    """Refuse LoRA and DoRA where PEFT is not installed."""
    if find_spec("peft") is None:
        raise AUSteerError(f"{missing_extra('peft', 'export')}; or leave LoRA and DoRA out: --rivals eora")
