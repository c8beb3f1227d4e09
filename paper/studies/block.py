"""Steer single AUs of one block of a model, a head or the FFN output of a layer, and see what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.forward import input_device
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering.live import LiveAnswerer
from eval.tasks.base import Scores
from experiments.bench import Bench
from paper.studies.counting import place
from rmodels import site_shape


@dataclass(frozen=True)
class Block:
    """Locate one head, or one layer's output at a site. Dimensions count from its own first, as in the paper: 0 to 127 in a head."""

    site: str
    layer: int
    head: int | None
    first: int  # its first dimension within the site
    width: int
    shape: tuple[int, int]  # layers and width of the site

    @classmethod
    def of(cls, model: PreTrainedModel, params: dict) -> Block:
        site, layer, head = params["site"], params["layer"], params.get("head")
        layers, width = shape = site_shape(model, site)
        if not 0 <= layer < layers:
            raise AUSteerError(f"no layer {layer}: params count layers from 0, here to {layers - 1}")
        if head is None:
            return cls(site, layer, None, 0, width, shape)
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        if site != "attention" or not 0 <= head < heads:
            raise AUSteerError(
                f"no head {head} at site {site}: params count the heads of site attention from 0, here to {heads - 1}"
            )
        head_width = width // heads
        return cls(site, layer, head, head * head_width, head_width, shape)

    def __str__(self) -> str:
        return place({"site": self.site, "layer": self.layer, "head": self.head})

    def plan(self, strengths: dict[int, float], tokens: str = "all") -> Plan:
        """Return the plan x -> (1 + strength) x at these dimensions."""
        scale = torch.zeros(self.shape)
        for dim, strength in strengths.items():
            if not 0 <= dim < self.width:
                raise AUSteerError(f"no dimension {dim}: the {self} has dimensions 0 to {self.width - 1}")
            scale[self.layer, self.first + dim] = strength
        return Plan({self.site: scale}, {}, tokens)

    def shifted(self, values: Tensor, tokens: str) -> Plan:
        shift = torch.zeros(self.shape)
        shift[self.layer, self.first : self.first + self.width] = values
        return Plan({}, {self.site: shift}, tokens)


@dataclass(frozen=True)
class Evaluator:
    """Score some items of a task under plans."""

    bench: Bench
    items: Sequence

    def scores(self, plan: Plan) -> Scores:
        bench = self.bench
        with steer(bench.model, plan):
            answers = bench.task.answers(LiveAnswerer(bench.model, bench.tokenizer), self.items)
        return bench.task.columns(self.items, answers)

    def outcomes(self, plan: Plan) -> list[bool]:
        """Return the outcomes of the task's main measure."""
        return list(self.scores(plan).outcomes)

    def sweep(self, block: Block, dims: Sequence[int], alpha: float, progress: bool, part: str) -> list[list[bool]]:
        """Return the outcomes with each dimension steered alone."""
        bar = tqdm(dims, desc=f"{self.bench.task.name}, {block}, {part}", unit=" dims", disable=not progress)
        return [self.outcomes(block.plan({dim: alpha})) for dim in bar]


def n_dims(params: dict) -> int:
    """Return how many dimensions a study steers, in a head of 128 or in 4,096 of a layer's output."""
    width = 4096 if params.get("head") is None else 128
    return len(params.get("dims") or range(0, width, params.get("step", width)))


def extremes(bench: Bench, block: Block, params: dict, progress: bool) -> dict[str, int]:
    """Return the best, a neutral and the worst dimension of a sweep on validation items."""
    task = bench.task
    if not task.validation:
        raise AUSteerError(
            f"{task.name} has no validation items to choose dimensions on: name them in the study's dims"
        )
    evaluator = Evaluator(bench, task.validation[: params["n"]])
    dims = range(0, block.width, params["step"])
    if len(dims) < 3:
        raise AUSteerError(f"a sweep needs at least three dimensions; a step of {params['step']} leaves {len(dims)}")
    baseline = sum(evaluator.outcomes(block.plan({})))
    gains = [
        sum(outcomes) - baseline for outcomes in evaluator.sweep(block, dims, params["alpha"], progress, "validation")
    ]
    places = range(len(dims))
    best, worst = max(places, key=gains.__getitem__), min(places, key=gains.__getitem__)
    neutral = min((place for place in places if place not in (best, worst)), key=lambda place: abs(gains[place]))
    return {"best": dims[best], "neutral": dims[neutral], "worst": dims[worst]}


@torch.inference_mode()
def next_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, plans: Sequence[Plan]
) -> Tensor:
    """Return log p of the token after the prompt under each plan, (plans, vocabulary) float64, in one forward."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]] * len(plans), device=input_device(model))
    with steer(model, list(plans)):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.double().log_softmax(-1).cpu()
