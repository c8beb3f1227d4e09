"""SADI: Wang et al., Semantics-Adaptive Dynamic Intervention, ICLR 2025.

The mean difference of last-token activations between right and wrong texts says which K units matter. At inference they
are scaled by (1 + delta), so that the query's own activation is the direction: A' = A + delta * (A * M). Units:

    head    the output of an attention head before o_proj, by the signed mean over its dimensions
    neuron  the MLP's nonlinearity; to scale it before the product with up_proj is to scale the product, as is done here
    hidden  a dimension of the MLP's output, as in the authors' code (site ffn), or of the residual stream (site layer)

`plan` is the paper's form: at the prompt's last token and every new one, layers see each other's steering. `clamped`
is the authors' code: at the prompt's last token every layer is overwritten with the values of an unsteered run, the
chosen ones times 1 + delta, so that no layer reacts. Their code takes the largest signed differences; secondary
sources of the paper speak of absolute ones: select="absolute".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import read_at
from austeer.methods.base import Method, Settings
from austeer.methods.units import by_head, highest
from austeer.plan import Plan

SELECT = ("signed", "absolute")
SMALL_ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Scores:
    by_unit: Tensor  # (layers, units)
    each: int  # AUs of a unit: head_dim, or 1
    header: dict


class SADI(Method):
    """What the three share. alpha is the paper's delta; the authors' code says strength = 1 + delta."""

    paper = "Wang et al., ICLR 2025"
    foldable = False  # the prompt stays as it is
    unit: str
    count: ClassVar[str] = "k"  # the setting that says how many
    ks: dict[str, tuple[int, ...]]
    alphas: dict[str, tuple[float, ...]]

    def __init__(self, select: str = "signed"):
        if select not in SELECT:
            raise AUSteerError(f"SADI selects {' or '.join(SELECT)} differences, not {select!r}")
        self.select = select

    def grid(self, kind: str) -> list[Settings]:
        return [{self.count: k, "alpha": alpha} for k, alpha in product(self.ks[kind], self.alphas[kind])]

    def read(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Right and wrong texts, (pairs, layers, units, AUs of a unit)."""
        right, wrong = evidence.activations("last")
        return right[..., None], wrong[..., None]

    def prepare(self, evidence: Evidence) -> Scores:
        right, wrong = self.read(evidence)
        scores = difference(right, wrong)
        if not scores.any():
            raise AUSteerError(f"no {self.unit} differs between right and wrong texts: SADI has nothing to choose by")
        return Scores(scores, right.shape[-1], {**evidence.header(), "method": self.name})

    def plan(self, prepared: Scores, settings: Settings, draw: int = 0) -> Plan:
        scores = prepared.by_unit.abs() if self.select == "absolute" else prepared.by_unit
        kept = highest(scores, settings[self.count], f"{self.unit}s").repeat_interleave(prepared.each, dim=1)
        header = {**prepared.header, **settings}
        return Plan({header["site"]: settings["alpha"] * kept.float()}, {}, "last", header)


class SADIHead(SADI):
    name, label, unit, count = "sadi-head", "SADI, heads", "head", "heads"
    edits, sites = "k heads, scaled", ("attention",)
    # AUSteer's comparison has 2 to 64 heads; the authors' strengths are 5 to 80, in steps
    ks = {"small": (1, 2, 4), "full": (2, 8, 32)}
    alphas = {"small": SMALL_ALPHAS, "full": (1.0, 4.0, 9.0, 19.0, 29.0, 49.0, 79.0)}

    def read(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        right, wrong = evidence.activations("last")
        return by_head(right, evidence.model.config), by_head(wrong, evidence.model.config)


class SADINeuron(SADI):
    name, label, unit = "sadi-neuron", "SADI, neurons", "neuron"
    edits, sites = "k neurons, scaled", ("neuron",)
    ks = {"small": (4, 16, 64), "full": (10, 100, 500)}
    alphas = {"small": SMALL_ALPHAS, "full": (1.0, 4.0, 9.0, 19.0, 29.0, 49.0, 89.0)}

    def read(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        right, wrong = evidence.activations("last", nonlinearity=True)
        return right[..., None], wrong[..., None]


class SADIHidden(SADI):
    name, label, unit = "sadi-hidden", "SADI, hidden", "dimension"
    edits, sites = "k dimensions, scaled", ("ffn", "layer")
    ks = {"small": (4, 16, 32), "full": (2, 8, 20)}
    alphas = {"small": SMALL_ALPHAS, "full": (1.0, 4.0, 9.0, 19.0, 39.0, 59.0, 79.0)}


def difference(right: Tensor, wrong: Tensor) -> Tensor:
    """(pairs, layers, units, AUs) -> (layers, units): of the means over a unit's AUs, the mean over pairs."""
    return (right.double().mean(-1) - wrong.double().mean(-1)).mean(0).float()


@torch.inference_mode()
def clamped(model: PreTrainedModel, plan: Plan, prompt: Tensor) -> Plan:
    """A SADI plan as the authors' code applies it to one prompt (1, tokens): costs a forward of its own.

    Only the prompt's last position is overwritten, with what an unsteered run has there; what follows is unsteered.
    For a batch, `steer` takes a list of such plans.
    """
    (site,) = plan.sites
    if prompt.dim() != 2 or len(prompt) != 1:
        raise AUSteerError(
            f"the authors' SADI is one plan a prompt: give token ids of shape (1, tokens), not {tuple(prompt.shape)}"
        )
    with read_at(model, [site], lambda x: x[0, -1].float().cpu()) as collected:
        model.base_model(prompt, use_cache=False)
    frozen = torch.stack([collected[place][0] for place in sorted(collected)])
    nothing_of_its_own = torch.full_like(frozen, -1.0)
    return Plan({site: nothing_of_its_own}, {site: frozen * (1 + plan.scales[site])}, "prompt-end", plan.header)


METHODS = (SADIHead(), SADINeuron(), SADIHidden())
