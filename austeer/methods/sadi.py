"""SADI: Wang et al., Semantics-Adaptive Dynamic Intervention, ICLR 2025.

The mean difference of last-token activations between right and wrong texts chooses K units. At inference these are
scaled by (1 + delta), so the query's own activation gives the direction: A' = A + delta * (A * M). A unit is

    head    the output of an attention head before o_proj, scored by the signed mean over its dimensions
    neuron  the MLP's nonlinearity; scaling it is the same as scaling its product with up_proj, which is done here
    hidden  a dimension of the MLP's output, as in the authors' code (site ffn), or of the residual stream (site layer)

`plan` is the paper's form: it scales at the prompt's last token and every new one, where layers see steered input.
`clamped` is the authors' code: at the prompt's last token every layer is overwritten with the values of an unsteered
run, the chosen ones times 1 + delta, so no layer reacts. Their code takes the largest signed differences; secondary
sources of the paper speak of absolute ones: select="absolute".

preset="original" reads pairs as their code does (`their_texts`) and tries their counts and strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.chat import is_in_chat
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import read_at, stack_layers
from austeer.methods.base import GridPoint, Method, every_kind, is_original
from austeer.methods.choice import by_head, highest
from austeer.pairs import Pair
from austeer.plan import Plan

SELECT = ("signed", "absolute")
LONGEST = 700  # tokens of a right text; the authors skip longer ones
THEIR_STRENGTHS = range(5, 85, 5)  # factors: alpha is one less


def alphas(*largest: float) -> dict[str, tuple[float, ...]]:
    return {"small": (0.5, 1.0, 2.0, 4.0, 8.0), "full": (1.0, 4.0, 9.0, 19.0, *largest)}


@dataclass(frozen=True)
class Scores:
    by_unit: Tensor  # (layers, units)
    unit_width: int  # AUs per unit: head_dim, or 1
    header: dict


class SADI(Method):
    """Scale k units of one kind. alpha is the paper's delta; the authors' code has strength = 1 + delta."""

    paper = "Wang et al., ICLR 2025"
    foldable = False  # only the prompt's last token is steered, and weights act on all
    unit: str
    count: ClassVar[str] = "k"  # the key of a grid point that says how many
    their_counts: tuple[int, ...]
    their_strengths: Sequence[int] = THEIR_STRENGTHS

    def __init__(self, select: str = "signed", preset: str | None = None):
        if select not in SELECT:
            raise AUSteerError(f"SADI can select {' or '.join(SELECT)} differences, not {select!r}")
        self.select, self.preset = select, preset
        if is_original(preset):
            deltas = [strength - 1.0 for strength in self.their_strengths]
            self.axes = every_kind(**{self.count: self.their_counts, "alpha": deltas})

    def read(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Return activations on right and on wrong texts, (pairs, layers, units, AUs per unit)."""
        right, wrong = evidence.activations("last")
        return right[..., None], wrong[..., None]

    def prepare(self, evidence: Evidence) -> Scores:
        right, wrong = self.read(their_texts(evidence) if self.preset else evidence)
        scores = difference(right, wrong)
        if not scores.any():
            raise AUSteerError(f"no {self.unit} differs between right and wrong texts: SADI has nothing to choose by")
        return Scores(scores, right.shape[-1], {**evidence.header(), "method": self.name})

    def plan(self, prepared: Scores, point: GridPoint, draw: int = 0) -> Plan:
        scores = prepared.by_unit.abs() if self.select == "absolute" else prepared.by_unit
        mask = highest(scores, point[self.count], f"{self.unit}s").repeat_interleave(prepared.unit_width, dim=1)
        header = {**prepared.header, **point}
        return Plan({header["site"]: point["alpha"] * mask.float()}, {}, "last", header)


class SADIHead(SADI):
    name, label, unit, count = "sadi-head", "SADI, heads", "head", "heads"
    edits, sites = "k heads, scaled", ("attention",)
    # AUSteer's comparison has 2 to 64 heads
    axes = {"heads": {"small": (1, 2, 4), "full": (2, 8, 32)}, "alpha": alphas(29.0, 49.0, 79.0)}
    their_counts = (1, 2, 4, 6, 8, 10)

    def read(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        right, wrong = evidence.activations("last")
        return by_head(right, evidence.model.config), by_head(wrong, evidence.model.config)


class SADINeuron(SADI):
    name, label, unit = "sadi-neuron", "SADI, neurons", "neuron"
    edits, sites = "k neurons, scaled", ("neuron",)
    axes = {"k": {"small": (4, 16, 64), "full": (10, 100, 500)}, "alpha": alphas(29.0, 49.0, 89.0)}
    their_counts, their_strengths = (3, 5, 10, 30, 50, 100, 200, 300, 400, 500), (10, 20, 30, 50, 70, 90)

    def read(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        right, wrong = evidence.activations("last", nonlinearity=True)
        return right[..., None], wrong[..., None]


class SADIHidden(SADI):
    name, label, unit = "sadi-hidden", "SADI, hidden", "dimension"
    edits, sites = "k dimensions, scaled", ("ffn", "layer")
    axes = {"k": {"small": (4, 16, 32), "full": (2, 8, 20)}, "alpha": alphas(39.0, 59.0, 79.0)}
    their_counts = (1, *range(2, 22, 2))


def their_texts(evidence: Evidence) -> Evidence:
    """Return the pairs as the authors' code reads them: prompt and answer without the space around them, one space
    between, and no pair whose right text is too long."""
    pairs = evidence.pairs
    if not is_in_chat(evidence.tokenizer, pairs[0].prompt):  # whose spaces are part of the format
        bare = [Pair(*map(str.strip, pair)) for pair in pairs]
        pairs = [Pair(prompt, f" {positive}", f" {negative}") for prompt, positive, negative in bare]
    texts = evidence.tokenizer([pair.prompt + pair.positive for pair in pairs], verbose=False)["input_ids"]
    short = [pair for pair, ids in zip(pairs, texts, strict=True) if len(ids) <= LONGEST]
    if not short:
        raise AUSteerError(
            f"every right text has over {LONGEST} tokens, and the authors' SADI skips those: drop the preset"
        )
    return replace(evidence, pairs=short)


def difference(right: Tensor, wrong: Tensor) -> Tensor:
    """Average (pairs, layers, units, AUs) over a unit's AUs, then their difference over pairs: (layers, units)."""
    return (right.double().mean(-1) - wrong.double().mean(-1)).mean(0).float()


@torch.inference_mode()
def clamped(model: PreTrainedModel, plan: Plan, prompt: Tensor) -> Plan:
    """Turn a SADI plan into what the authors' code does to one prompt (1, tokens); it costs an extra forward.

    Only the prompt's last position is overwritten, with the values of an unsteered run; new tokens are not steered.
    For a batch, `steer` takes a list of such plans.
    """
    (site,) = plan.sites
    if prompt.dim() != 2 or len(prompt) != 1:
        raise AUSteerError(
            "the authors' SADI makes one plan per prompt: give token ids of shape (1, tokens), "
            f"not {tuple(prompt.shape)}"
        )
    with read_at(model, [site], lambda x: x[0, -1].float().cpu()) as collected:
        model.base_model(prompt, use_cache=False)
    frozen = stack_layers({layer: rows[0] for (_, layer), rows in collected.items()}, plan.shape(site)[0])
    minus_one = torch.full_like(frozen, -1.0)
    return Plan({site: minus_one}, {site: frozen * (1 + plan.scales[site])}, "prompt-end", plan.header)


METHODS = (SADIHead(), SADINeuron(), SADIHidden())
