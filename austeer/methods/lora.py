"""Rank-1 LoRA on the projections of the sites: the rival that trains, on the same pairs and the same objective.

Hu et al., arXiv 2106.09685, through PEFT. Every o_proj (site attention) or down_proj (sites ffn and neuron) gets a term
of rank one, and both where a cell has sites of both kinds:

    y -> y + b (a . x),     loss = mean over pairs of -log sigmoid((M - offset) / tau)

a starts at random and b at 0; AdamW trains both. tau and the offsets are fitted to the unsteered model first, as for
causal momentum. The search varies the strength: the trained term times 0.1 to 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from austeer.change import Adapter, projections
from austeer.errors import AUSteerError, first_line, missing_extra
from austeer.evidence import Evidence
from austeer.methods.base import TOGETHER, GridPoint, Method, header_of, sites_of
from austeer.methods.training import TemperedLoss, check_finite, descend

SMALL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
STRENGTHS = {"small": SMALL, "full": tuple(sorted({*SMALL, 0.05, 0.15, 0.25, 0.35, 0.75, 1.75}))}
PAIRS_PER_STEP = 8


class LoRA(Method):
    name, label, trains = "lora-r1", "LoRA, rank 1", True
    paper = "Hu et al., arXiv 2106.09685"
    edits = "projections, a rank-1 term each"
    sites = ("attention", "ffn", "neuron", *TOGETHER)
    foldable = False  # it is no plan
    axes = {"strength": STRENGTHS}

    def __init__(self, rate: float = 1e-3, epochs: int = 4):
        self.rate, self.epochs = rate, epochs

    def prepare(self, evidence: Evidence) -> Adapter:
        loss = TemperedLoss(evidence)
        names = list(projections(evidence.model, sites_of(evidence.site)))
        with rank_one(evidence.model, names, evidence.seed) as terms:
            numbers = [weight for both in terms.values() for weight in both]
            adam = torch.optim.AdamW(numbers, lr=self.rate)
            descend(evidence, adam, loss, epochs=self.epochs, pairs_per_step=PAIRS_PER_STEP)
            check_finite(evidence, numbers)
            factors = {name: tuple(w.detach().float().cpu().clone() for w in both) for name, both in terms.items()}
        training = {"method": self.name, "rate": self.rate, "epochs": self.epochs, "seed": evidence.seed}
        return Adapter(factors, header=header_of(evidence) | training | loss.temperature.header())

    def plan(self, prepared: Adapter, point: GridPoint, draw: int = 0) -> Adapter:
        return replace(prepared.times(point["strength"]), header=prepared.header | point)


@contextmanager
def rank_one(
    model: PreTrainedModel, names: list[str], seed: int
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Put a trainable rank-1 term beside each of these modules, and take all of them out again.

    Yields (a, b) by module: (1, inputs) and (outputs, 1).
    """
    if find_spec("peft") is None:
        raise missing_extra("peft", "export")
    from peft import LoraConfig, get_peft_model  # takes seconds

    upstream = {name: model.get_submodule(name) for name in names}
    transposed = isinstance(upstream[names[0]], Conv1D)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=names, fan_in_fan_out=transposed)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        for name, module in upstream.items():  # some may have got their term before another was refused
            model.set_submodule(name, module)
        raise AUSteerError(
            f"PEFT puts no LoRA on these modules of {type(model).__name__}: {first_line(error)}"
        ) from None
    try:
        layers = {name: model.get_submodule(name) for name in names}
        yield {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in layers.items()}
    finally:
        adapted.unload()


METHODS = (LoRA(),)
