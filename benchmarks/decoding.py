"""Time ways to steer the same model against the first of them, while they decode in turn, token by token."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from core import VOCABULARY
from torch import nn

from austeer.plan import Plan


@dataclass
class Ratio:
    """Hold time per token over that of the first way: the median of all turns, with its 95 % interval."""

    ratio: float
    low: float
    high: float
    milliseconds: float

    @classmethod
    def of(cls, seconds: list[float], base: list[float]) -> Ratio:
        ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
        half = 0.98 * math.sqrt(len(ratios))  # half the width of the interval, in ranks around the median
        low, high = (ratios[min(max(round(len(ratios) / 2 + step), 0), len(ratios) - 1)] for step in (-half, half))
        return cls(statistics.median(ratios), low, high, 1000 * statistics.median(seconds))


@torch.inference_mode()
def against_first(ways: dict[str, Callable], batch: int, turns: int, prompt: int = 32) -> dict[str, Ratio]:
    """Return each way's CPU time per token over the first's. Every way has its own cache and gets the same tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (batch, prompt + turns), generator=generator)
    positions = torch.arange(prompt + turns).expand(batch, -1)
    cache = {
        name: way(input_ids=ids[:, :prompt], position_ids=positions[:, :prompt], use_cache=True).past_key_values
        for name, way in ways.items()
    }
    seconds = {name: [] for name in ways}
    names = list(ways)
    for turn in range(turns):
        at = slice(prompt + turn, prompt + turn + 1)
        first = turn % len(names)  # take turns at being first, since the way before may leave caches warm
        for name in names[first:] + names[:first]:
            start = time.process_time()
            ways[name](input_ids=ids[:, at], position_ids=positions[:, at], past_key_values=cache[name], use_cache=True)
            seconds[name].append(time.process_time() - start)
    return {name: Ratio.of(times, seconds[names[0]]) for name, times in seconds.items()}


def cpu_seconds(works: dict[str, Callable], repeats: int = 2) -> dict[str, float]:
    """Return the fewest CPU seconds of each work; they run in turn, and first runs also pay what is done once."""
    least = dict.fromkeys(works, math.inf)
    for _ in range(repeats):
        for name, work in works.items():
            start = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - start)
    return least


def shared(model: nn.Module, but: str | None = None) -> nn.Module:
    """Copy the modules of a model but share its weights, except those of one name: where a copy lies changes times by 3 %."""
    weights = {id(weight): weight for name, weight in model.named_parameters() if but is None or but not in name}
    return copy.deepcopy(model, weights)


@torch.no_grad()
def on_weights_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """Return the other model with its bit-equal weights in the first one's memory, since where weights lie changes the time."""
    known = model.state_dict()
    equal = {name: known[name] for name, weight in other.state_dict().items() if torch.equal(known[name], weight)}
    other.load_state_dict(equal, strict=False, assign=True)
    return other


def sparse_plan(site: str, shape: tuple[int, int], k: int = 100) -> Plan:
    """Return a plan that doubles k random AUs."""
    scale = torch.zeros(shape)
    scale.view(-1)[torch.randperm(scale.numel(), generator=torch.Generator().manual_seed(3))[:k]] = 1.0
    return Plan({site: scale})


def hook(model: nn.Module, plan: Plan) -> nn.Module:
    """Steer as one does without a library: by a forward hook on every MLP or layer of upstream's model."""
    for index, layer in enumerate(model.model.layers):
        for site, module in (("ffn", layer.mlp), ("layer", layer)):
            if site in plan.sites:
                scale, shift = plan.scale(site, index), plan.shift(site, index)
                if scale.any():
                    module.register_forward_hook(lambda module, args, out, scale=scale: out + out * scale)
                if shift.any():
                    module.register_forward_hook(lambda module, args, out, shift=shift: out + shift)
    return model
