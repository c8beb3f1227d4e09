"""Set a plan on a model, for the length of a `with` or by hand, and report what it did."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.errors import AUSteerError, Overflow
from austeer.identity import check_made_for
from austeer.plan import Plan
from rmodels import decoder_layers, gates, without_head


class Steering:
    """Hold plans that are set on a model: `clear` removes them, `check` raises on overflow, `receipt` counts."""

    def __init__(
        self, model: PreTrainedModel, plans: list[Plan | None], rowwise: bool, prompt_end: int | Tensor | None
    ):
        self.model, self.prompt_end = model, prompt_end
        self._end: Tensor | None = None  # where the prompt of the current generation ends
        real = [plan for plan in plans if plan is not None]
        scopes = {plan.tokens for plan in real}
        if len(scopes) > 1:
            raise AUSteerError(f"all plans of a batch must steer the same tokens, not {' and '.join(sorted(scopes))}")
        self.tokens = scopes.pop() if scopes else "all"
        self.rows = len(plans) if rowwise else None
        self.sites = sorted({site for plan in real for site in plan.sites})
        device = model.get_input_embeddings().weight.device
        self._not_finite, self._steered = _state(torch.bool, device), _state(torch.int64, device)
        self._steered_rows = [row for row, plan in enumerate(plans) if plan is not None]
        self._scope: Tensor | None = None  # the steered positions of the current forward; None: all
        self._length: int | None = None  # of the cache after the current forward; None: it has no cache
        self._aus = 0
        self._gates = [gate for site in self.sites for gate in gates(model, site)]
        like = {gate: _float_weight(layer) for layer in decoder_layers(model) for gate in gates(layer)}
        for gate in self._gates:
            gate.clear()
            scale, shift = (_gate_rows(plans, kind, gate, rowwise) for kind in ("scales", "shifts"))
            if scale is not None or shift is not None:
                gate.set(scale, shift, like=like[gate])
                self._aus += _count_aus(scale, shift)
        base = without_head(model)
        self._hooks = [base.register_forward_hook(self._note)]
        if rowwise or self.tokens != "all":
            self._hooks.append(base.register_forward_pre_hook(self._place, with_kwargs=True))

    def clear(self) -> None:
        self.release(set(self.sites))

    def release(self, sites: set[str]) -> None:
        """Clear these sites only. Once every site is cleared or replaced, the hooks are removed."""
        for gate in self._gates:
            if gate.site in sites:
                gate.clear()
        self._gates = [gate for gate in self._gates if gate.site not in sites]
        if not self._gates:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def receipt(self) -> dict[str, int]:
        """Count the AUs that are set (0: nothing is steered) and the token positions steered so far."""
        return {"aus": self._aus, "positions": int(self._steered)}

    def check(self) -> None:
        """Raise if a forward under this plan ended in inf or nan: its answers must not be scored."""
        if bool(self._not_finite):
            raise Overflow(
                f"steering overflowed: hidden states became inf or nan in {self.model.dtype}; "
                "lower alpha, or load the model in bfloat16 or float32"
            )

    def _place(self, base, args, kwargs) -> None:
        """Check before a forward that every row has its plan, and mark the positions to steer."""
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        batch, new = inputs.shape[:2]
        if self.rows not in (None, batch):
            raise AUSteerError(f"{self.rows} plans were set, one per row, but the batch has {batch} rows")
        if self.tokens == "all":
            return
        cache = kwargs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        prompt_end = self.prompt_end if self.prompt_end is not None else getattr(cache, "prompt_end", None)
        if prompt_end is not None:
            end = torch.as_tensor(prompt_end).cpu().reshape(-1, 1)
        elif start == 0 and (cache is not None or kwargs.get("use_cache")):  # an empty cache: this is the prompt
            end = self._end = torch.tensor([[new]])
        elif cache is not None and self._end is not None:
            end = self._end
        else:
            raise AUSteerError(
                f"tokens={self.tokens!r} needs to know where the answers begin, which no generation cache that began "
                "under this plan tells; pass prompt_end=..."
            )
        self._length = start + new if cache is not None or kwargs.get("use_cache") else None
        column = torch.arange(start, start + new)
        steered = {
            "prompt": column < end,
            "before-last": column < end - 1,
            "before-last-2": column < end - 2,
            "prompt-end": column == end - 1,
            "generated": column >= end,
            "last": column >= end - 1,
        }[self.tokens]
        self._scope = steered
        for gate in self._gates:
            gate.positions = steered[..., None]

    def _note(self, base, args, output) -> None:
        states = output[0]
        bad = ~torch.isfinite(states).all()
        self._not_finite.logical_or_(bad.to(self._not_finite.device))  # the last layer may be on another GPU
        batch, new = states.shape[:2]
        if self._scope is None:  # counted by shapes: no value is read back in a forward
            self._steered.add_((batch if self.rows is None else len(self._steered_rows)) * new)
        else:
            self._check_cache(getattr(output, "past_key_values", None))
            scope = self._scope.expand(batch, new)
            self._steered.add_((scope if self.rows is None else scope[self._steered_rows]).sum())

    def _check_cache(self, cache) -> None:
        """Refuse a model whose cache does not count tokens, as Mamba's: each new one would pass for a prompt."""
        if self._length is not None and (cache is None or int(cache.get_seq_length()) != self._length):
            raise AUSteerError(
                f"the cache of {type(self.model).__name__} does not count tokens, so tokens={self.tokens!r} has no meaning "
                "during generation; steer all tokens"
            )


def apply(
    model: PreTrainedModel,
    plan: Plan | Sequence[Plan | None],
    *,
    prompt_end: int | Tensor | None = None,
    check: bool = True,
) -> Steering:
    """Set a plan by hand, replacing what is set at its sites; undo with `.clear()`, or `clear(model)`.

    A list of plans steers each row of a batch by its own plan (None: not at all). prompt_end: the column where the
    answers begin; token scopes other than all need it where no generation cache tells it.
    """
    rowwise = not isinstance(plan, Plan)
    plans = list(plan) if rowwise else [plan]
    for one in {id(p): p for p in plans if p is not None}.values():
        shapes = {site: one.shape(site) for site in one.sites}
        check_made_for(model, shapes, one.header if check else {"model": one.header.get("model")}, "this plan was")
    for earlier in getattr(model, "_au_steering", []):
        earlier.release({site for one in plans if one is not None for site in one.sites})
    steering = Steering(model, plans, rowwise, prompt_end)
    model._au_steering = [s for s in getattr(model, "_au_steering", []) if s._hooks] + [steering]
    return steering


def clear(model: PreTrainedModel) -> None:
    """Remove everything that is set: the model is upstream's again, bit for bit."""
    for steering in getattr(model, "_au_steering", []):
        steering.clear()
    model._au_steering = []
    for gate in gates(model):
        gate.clear()


@contextmanager
def steer(
    model: PreTrainedModel,
    plan: Plan | Sequence[Plan | None],
    *,
    prompt_end: int | Tensor | None = None,
    check: bool = True,
) -> Iterator[Steering]:
    """Steer inside a `with`: cleared on the way out, and inf or nan inside raises, so that it cannot be scored."""
    if any(gate.scale is not None or gate.shift is not None for gate in gates(model)):
        raise AUSteerError("the model is already steered; add the plans (plan + plan), or clear(model) first")
    steering = apply(model, plan, prompt_end=prompt_end, check=check)
    try:
        yield steering
    finally:
        steering.clear()
    steering.check()


def _state(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number that forwards change in place: a tensor, so that compiled and captured code change it, too."""
    with torch.inference_mode(False):  # a later forward may run in another mode
        state = torch.zeros((), dtype=dtype, device=device)
    # without this torch.compile skips CUDA graphs where the hook is compiled by itself (a compiled base model)
    torch._dynamo.mark_static_address(state)
    return state


def _gate_rows(plans: list[Plan | None], kind: str, gate, rowwise: bool) -> Tensor | None:
    """Return what one gate gets: (width,), or (rows, 1, width) when every row has its own; None if all zero."""
    rows = []
    for plan in plans:
        values = getattr(plan, kind).get(gate.site) if plan is not None else None
        rows.append(torch.zeros(gate.width) if values is None else values[gate.layer, : gate.width])
    if not any(row.any() for row in rows):
        return None
    return torch.stack(rows)[:, None] if rowwise else rows[0]


def _count_aus(scale: Tensor | None, shift: Tensor | None) -> int:
    """Count the AUs of one gate that are steered in any row."""
    masks = [values != 0 for values in (scale, shift) if values is not None]
    return int(functools.reduce(torch.logical_or, masks).reshape(-1, masks[0].shape[-1]).any(0).sum())


def _float_weight(layer: nn.Module) -> Tensor:
    """Return a weight on the layer's device, in the dtype of its activations: that of a norm, which is never quantised."""
    weights = [weight for weight in layer.parameters() if weight.is_floating_point()]
    return min(weights, key=lambda weight: weight.dim())
