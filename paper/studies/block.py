"""One block of a model, a head or the FFN output of a layer: its single AUs steered, and what the model then says."""

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
from eval.tasks.base import Scores, Task
from experiments.setting import Setting, load
from rmodels import site_shape


@dataclass(frozen=True)
class Block:
    """Its dimensions are counted from its own first, as the paper does: 0 to 127 in a head of Llama-2-7B."""

    site: str
    layer: int
    head: int | None
    first: int  # of its dimensions within the site
    width: int
    shape: tuple[int, int]  # of the site

    @classmethod
    def of(cls, model: PreTrainedModel, params: dict) -> Block:
        site, layer, head = params["site"], params["layer"], params.get("head")
        layers, width = shape = site_shape(model, site)
        if not 0 <= layer < layers:
            raise AUSteerError(f"no layer {layer}: the model has {layers}, counted from 0")
        if head is None:
            return cls(site, layer, None, 0, width, shape)
        heads = model.config.num_attention_heads
        if site != "attention" or not 0 <= head < heads:
            raise AUSteerError(f"no head {head} at site {site}: site attention has heads 0 to {heads - 1}")
        each = width // heads
        return cls(site, layer, head, head * each, each, shape)

    def __str__(self) -> str:
        return f"layer {self.layer}, " + (f"{self.site} output" if self.head is None else f"head {self.head}")

    def plan(self, strengths: dict[int, float], tokens: str = "all") -> Plan:
        """x -> (1 + strength) x at these dimensions."""
        scale = torch.zeros(self.shape)
        for dim, strength in strengths.items():
            if not 0 <= dim < self.width:
                raise AUSteerError(f"no dimension {dim}: {self} has {self.width}, counted from 0")
            scale[self.layer, self.first + dim] = strength
        return Plan({self.site: scale}, {}, tokens)

    def shifted(self, values: Tensor, tokens: str) -> Plan:
        shift = torch.zeros(self.shape)
        shift[self.layer, self.first : self.first + self.width] = values
        return Plan({}, {self.site: shift}, tokens)


@dataclass(frozen=True)
class Asked:
    """Some items of a task, and which of them a model steered by a plan gets right."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    items: Sequence

    def scores(self, plan: Plan) -> Scores:
        with steer(self.model, plan):
            answers = self.task.answers(LiveAnswerer(self.model, self.tokenizer), self.items)
        return self.task.columns(self.items, answers)

    def outcomes(self, plan: Plan) -> list[bool]:
        return self.scores(plan).outcomes

    def sweep(self, block: Block, dims: Sequence[int], alpha: float, progress: bool, part: str) -> list[list[bool]]:
        """Outcomes with each dimension steered alone."""
        bar = tqdm(dims, desc=f"{self.task.name}, {block}, {part}", unit=" dims", disable=not progress)
        return [self.outcomes(block.plan({dim: alpha})) for dim in bar]


def extremes(setting: Setting, block: Block, params: dict, progress: bool) -> dict[str, int]:
    """The best, a neutral and the worst dimension of a sweep on validation items, where params do not name them."""
    model, tokenizer, task = load(setting)
    if not task.validation:
        raise AUSteerError(
            f"{task.name} has no validation items to choose dimensions on: name them in the study's dims"
        )
    asked = Asked(model, tokenizer, task, task.validation[: params["n"]])
    dims = range(0, block.width, params["step"])
    if len(dims) < 3:
        raise AUSteerError(f"a sweep needs at least three dimensions; a step of {params['step']} leaves {len(dims)}")
    before = sum(asked.outcomes(block.plan({})))
    gains = [sum(outcomes) - before for outcomes in asked.sweep(block, dims, params["alpha"], progress, "validation")]
    places = range(len(dims))
    best, worst = max(places, key=gains.__getitem__), min(places, key=gains.__getitem__)
    neutral = min((place for place in places if place not in (best, worst)), key=lambda place: abs(gains[place]))
    return {"best": dims[best], "neutral": dims[neutral], "worst": dims[worst]}


@torch.inference_mode()
def next_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, plans: Sequence[Plan]
) -> Tensor:
    """log p of the token behind the prompt under each plan, (plans, vocabulary) float64; one forward for all."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]] * len(plans), device=input_device(model))
    with steer(model, list(plans)):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.double().log_softmax(-1).cpu()
