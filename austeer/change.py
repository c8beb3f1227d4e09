"""Change a model for the length of a `with`: by a plan, or by an adapter, which is no plan.

An adapter adds a low-rank term to last projections, o_proj and down_proj: y -> y + strength * (x A^T) B^T, at all
positions. x is what enters the projection, y what leaves it, A `down` and B `up`. Trained adapters (LoRA) and rank-1
edits of weights are adapters. Comparisons treat them as plans: they can be made stronger or weaker, saved and checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.errors import AUSteerError, Overflow
from austeer.files import read_tensors, write_tensors
from austeer.identity import check_made_for
from austeer.plan import Plan
from austeer.steering import Steering, steer
from rmodels import linear_maps, without_head

FORMAT = "austeer-adapter-1"


@dataclass
class Adapter:
    """Hold two float32 factors for each projection, keyed by its name: `down` (rank, inputs) and `up` (outputs, rank)."""

    factors: dict[str, tuple[Tensor, Tensor]]
    strength: float = 1.0
    header: dict = field(default_factory=dict)
    tokens: ClassVar[str] = "all"
    inverted: ClassVar[int] = 0  # it turns no AU over

    def __post_init__(self):
        numbers = [values for both in self.factors.values() for values in both]
        if not math.isfinite(self.strength) or not all(torch.isfinite(values).all() for values in numbers):
            raise AUSteerError("the adapter has inf or nan; train it at a lower rate, or lower its strength")

    def times(self, factor: float) -> Adapter:
        return replace(self, strength=self.strength * factor)

    def aus(self) -> list:
        """List the AUs that are steered: none, since an adapter changes what projections make of them."""
        return []

    def __len__(self) -> int:
        """Count the projections that are changed."""
        return len(self.factors) if self.strength else 0

    def __bool__(self) -> bool:
        return True  # an adapter that does nothing is still an adapter

    @property
    def numbers(self) -> int:
        """Count the numbers that were learned or computed."""
        return sum(values.numel() for both in self.factors.values() for values in both)

    @property
    def nonzero(self) -> int:
        """Count the numbers that are not zero: without any, the adapter changes nothing."""
        both = [part for factors in self.factors.values() for part in factors]
        return sum(int((values != 0).sum()) for values in both) if self.strength else 0

    def save(self, path: str | Path) -> None:
        tensors = {
            f"{name}.{part}": values.contiguous()
            for name, both in self.factors.items()
            for part, values in zip(("down", "up"), both, strict=True)
        }
        metadata = {"format": FORMAT, "strength": repr(float(self.strength)), "header": json.dumps(self.header)}
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        tensors, metadata = read_tensors(Path(path), FORMAT, "low-rank adapter")
        names = [name.removesuffix(".down") for name in tensors if name.endswith(".down")]
        factors = {name: (tensors[f"{name}.down"], tensors[f"{name}.up"]) for name in names}
        return cls(factors, float(metadata["strength"]), json.loads(metadata["header"]))


class Adapting:
    """Hold an adapter that is set on a model: `clear` removes it, `check` raises on overflow, `receipt` counts."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter):
        check_made_for(model, {}, adapter.header, "this adapter was")
        modules = dict(model.named_modules())
        if missing := [name for name in adapter.factors if name not in modules]:
            raise AUSteerError(f"the adapter was made for another model: this one has no module {missing[0]}")
        self._model, self._positions = model, dict.fromkeys(adapter.factors, 0)
        self._not_finite = torch.zeros((), dtype=torch.bool, device=model.get_input_embeddings().weight.device)
        self._hooks = [without_head(model).register_forward_hook(self._note)]
        for name, (down, up) in adapter.factors.items():
            self._hooks.append(modules[name].register_forward_hook(self._adding(name, down, adapter.strength * up)))

    def _adding(self, name: str, down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        placed: dict[tuple, tuple[Tensor, Tensor]] = {}  # the factors on a device and in a dtype, moved there once

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if (x.shape[-1], output.shape[-1]) != (down.shape[1], up.shape[0]):
                raise AUSteerError(f"the adapter was made for another model: {name} has other widths here")
            if (x.device, x.dtype) not in placed:
                with torch.inference_mode(False):  # a later forward may want gradients
                    placed[x.device, x.dtype] = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
            into, out_of = placed[x.device, x.dtype]
            self._positions[name] += x.numel() // x.shape[-1]
            return output + (x @ into.T @ out_of.T).to(output)

        return add

    def _note(self, base: nn.Module, args: tuple, output: Any) -> None:
        self._not_finite.logical_or_((~torch.isfinite(output[0]).all()).to(self._not_finite.device))

    def clear(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def receipt(self) -> dict[str, int]:
        """Count the projections that are changed, and the token positions that went through one of them."""
        return {"modules": len(self._positions), "positions": max(self._positions.values(), default=0)}

    def check(self) -> None:
        """Raise if a forward ended in inf or nan: its answers must not be scored."""
        if bool(self._not_finite):
            raise Overflow(
                f"the adapter overflowed: hidden states became inf or nan in {self._model.dtype}; lower its strength"
            )


Change = Plan | Adapter


@contextmanager
def applied(
    model: PreTrainedModel, change: Change | None, prompt_end: int | Tensor | None = None
) -> Iterator[Steering | Adapting | None]:
    """Change the model inside a `with`: inf or nan inside raises on the way out. None changes nothing.

    prompt_end: the column where the answers begin, which plans for some tokens only need where no cache tells it.
    """
    if change is None:
        yield None
    elif isinstance(change, Plan):
        with steer(model, change, prompt_end=prompt_end) as steering:
            yield steering
    else:
        adapting = Adapting(model, change)
        try:
            yield adapting
        finally:
            adapting.clear()
        adapting.check()


def projections(model: PreTrainedModel, sites: Sequence[str]) -> dict[str, nn.Module]:
    """Return the last projections at these sites by name: o_proj of attention, and down_proj of ffn and neuron."""
    maps = [linear for _, *ends, linear in linear_maps(model) if set(sites) & set(ends)]
    if not maps or not all(linear.weight.endswith(".weight") for linear in maps):
        raise AUSteerError(
            f"{type(model).__name__} has no projection of its own at site {' and '.join(sites)} that an adapter could "
            "change (fused experts have one weight for all); use site attention"
        )
    names = [linear.weight.removesuffix(".weight") for linear in maps]
    return {name: model.get_submodule(name) for name in names}
