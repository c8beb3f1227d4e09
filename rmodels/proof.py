"""Prove the gates of a loaded model on the model itself: steering a site does what scaling its weight does.

On a few tokens, one AU per site and layer is taken that moves the logits, and three things are shown:

1. Every gate is called exactly once in a forward, with (batch, tokens, width).
2. The chosen AU's gate moves the logits by at least 100 times what is called a difference below.
3. All chosen gates of a site together change the logits as the scaled weights do: columns of the site's projection for
   its inputs, rows (of every expert) for its outputs. Where no weight can be scaled, at site layer and in quantised or
   offloaded models, a plain hook that multiplies the activation takes the weights' place.

Factors are powers of two, which scale a weight without rounding. A gate computes x + x * (factor - 1): in half precision
that is as exact for 2, 4096 and -4096, and off by its rounding for those between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from austeer.errors import AUSteerError, first_line
from rmodels.causal_lm import sites
from rmodels.gate import SITES, AUGate
from rmodels.structural import find_blocks, linear_maps, with_hidden_states

TOKENS = 6
FEW = 3  # tokens are enough for the gates; a long proof of a large model costs in proportion
# of the largest logit: differences above are differences. In 16 bits, too, gate and weight round alike, so that their
# logits are equal unless a kernel adds up in another order
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 2e-4}
# where the same text is run in other pieces, every activation rounds otherwise
SAME_TEXT = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MOVES = 100  # a chosen AU moves the logits by so many tolerances
# x + x * (factor - 1) has to be x * factor exactly: in 16 bits it is for 2, and where the sum rounds x away
FACTORS = {torch.float32: (16.0, 256.0, 4096.0, -4096.0), None: (4096.0, -4096.0, 2.0)}
ROWS = 32  # AUs tried in one forward
SLOW = 2.0  # seconds after which the cost is printed


def prove(
    model: PreTrainedModel, gates: Iterable[AUGate], *, quick: bool = False
) -> tuple[dict[str, str], dict[str, float]]:
    """Return why sites could not be proven, and how far gates and weights were apart, as a part of the largest logit.

    quick: at each site the first, a middle and the last layer that has it.
    """
    start = time.monotonic()
    proof = _Proof(model, list(gates), quick)
    try:
        reasons = proof.reasons()
    finally:
        for gate in proof.gates:
            gate.clear()
            gate.tap = None
    seconds = time.monotonic() - start
    if seconds > SLOW:
        how = "three layers" if quick else f"{len(proof.chosen)} atomic units, one per site and layer"
        print(f"gates proven in {seconds:.1f} s ({how})", file=sys.stderr)
    return reasons, proof.errors


@torch.no_grad()
def reads_on_caches(model: PreTrainedModel) -> bool:
    """Say whether the model reads texts in pieces on a cache as it reads them whole.

    The pieces: a beginning that two prompts share, their own parts, padded on the left or of equal length, and two tails
    each, on the repeated cache. Recurrent layers and some position biases cannot; pairs and answers then run otherwise.
    """
    ids = _tokens(model).to(_input_device(model))[0]
    full, short = ids, torch.cat([ids[:2], ids[4:]])
    even = ids.new_ones(2, 4)
    padded = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=ids.device)
    return _reads_in_pieces(model, [full, short], padded) and _reads_in_pieces(model, [full, full], even)


@torch.no_grad()
def generates_on_caches(model: PreTrainedModel) -> bool:
    """Say whether `generate` gives two texts the same logits on its cache as without one. RWKV mixes the texts up."""
    ids = _tokens(model).to(_input_device(model))
    ids = torch.cat([ids, ids.flip(1)])

    def logits(use_cache: bool) -> Tensor:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2, min_new_tokens=2, pad_token_id=0,
            use_cache=use_cache, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.stack(out.logits).float()

    try:
        expected = logits(use_cache=False)
        error = (logits(use_cache=True) - expected).abs().max()
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return False
    return bool(error <= SAME_TEXT.get(model.dtype, SAME_TEXT[torch.bfloat16]) * expected.abs().max())


def _reads_in_pieces(model: PreTrainedModel, texts: list[Tensor], own: Tensor) -> bool:
    whole = torch.stack([model(input_ids=text[None], use_cache=False).logits[0, -2:] for text in texts])
    middle, tail = texts[0][2:4].expand(2, -1), texts[0][4:].expand(4, -1)
    try:
        cache = DynamicCache()
        model(input_ids=texts[0][None, :2], past_key_values=cache, use_cache=True)
        for rows, mask in (middle, own), (tail, torch.cat([own.repeat_interleave(2, 0), own.new_ones(4, 2)], 1)):
            cache.batch_repeat_interleave(2)
            out = model(
                input_ids=rows,
                position_ids=(mask.cumsum(1) - 1)[:, -2:],
                attention_mask=None if own.all() else mask,
                past_key_values=cache,
                use_cache=True,
            )
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return False
    expected = whole.repeat_interleave(2, 0).float()
    tolerance = SAME_TEXT.get(model.dtype, SAME_TEXT[torch.bfloat16]) * expected.abs().max()
    return bool((out.logits.float() - expected).abs().max() <= tolerance)


class _Proof:
    def __init__(self, model: PreTrainedModel, gates: list[AUGate], quick: bool):
        self.model, self.gates = model, gates
        self.count = 1 + max(gate.layer for gate in gates)
        self.tried = [gate for gate in gates if gate.width]
        if quick:
            self.tried = [gate for site in SITES for gate in _few([gate for gate in self.tried if gate.site == site])]
        self.like = torch.zeros((), dtype=model.dtype, device=_input_device(model))
        self.ids = _tokens(model)[:, :FEW].to(self.like.device)
        self.chosen: dict[AUGate, tuple[int, float]] = {}  # dimension and factor
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def reasons(self) -> dict[str, str]:
        faults = self._watch()
        self._choose([gate for gate in self.tried if gate.site not in faults])
        for site in dict.fromkeys(gate.site for gate in self.tried):
            aus = {gate: self.chosen[gate] for gate in self.tried if gate.site == site and gate in self.chosen}
            unmoved = [gate.layer for gate in self.tried if gate.site == site and gate not in self.chosen]
            if site not in faults and unmoved:
                faults[site] = (
                    f"no atomic unit of layer {unmoved[0]} moves the logits, so nothing shows that its gate works"
                )
            if site not in faults and not self._agrees(site, aus):
                alone = [gate.layer for gate, au in aus.items() if not self._agrees(site, {gate: au})]
                layer = f"of layer {alone[0]}" if alone else "of several layers together"
                faults[site] = f"the gate {layer} does something else than scaling {self._reference_name(site)}"
        missing = set(sites(self.model)) - {gate.site for gate in self.tried}
        return faults | {site: self._why_missing(site) for site in missing}

    def _why_missing(self, site: str) -> str:
        mixture = next((block.experts for block in find_blocks(self.model) if block.experts is not None), None)
        if site == "neuron" and mixture is not None:
            return f"the experts of {type(mixture).__name__} are not fused in transformers' way"
        return "no layer has a projection for it"

    def _watch(self) -> dict[str, str]:
        """Run the tokens once: every gate must be called once, and at the end of what it steers."""
        faults = {
            site: f"block {min(lost)} has no gate of its own there; two blocks name one module"
            for site in {gate.site for gate in self.gates}
            if (lost := set(range(self.count)) - {gate.layer for gate in self.gates if gate.site == site})
        }
        shapes: dict[AUGate, list[tuple[int, ...]]] = {gate: [] for gate in self.tried}

        def look(gate: AUGate):
            def tap(x: Tensor) -> Tensor:
                seen = gate.dense(x)
                shapes[gate].append(tuple(seen.shape))
                if seen.dim() == 3 and seen.shape[-1] == gate.width:
                    # the most active unit at the last token, an even one in every second layer and an odd one in the
                    # others, so that no gate can stand in for its neighbour
                    odd = gate.layer % 2
                    self.chosen[gate] = 2 * int(seen[0, -1, odd::2].abs().argmax()) + odd, 1.0
                return x

            return tap

        for gate in self.tried:
            gate.tap = look(gate)
        later = self.ids.clone()
        later[:, -1] = self.ids[:, 0]
        with _calls_of_projections(self.model) as order:
            try:
                logits = self._logits(torch.cat([self.ids, later]), keep=0)
            except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
                raise AUSteerError(
                    f"{type(self.model).__name__} does not run on text alone: {first_line(error)}"
                ) from error
        for gate in self.tried:
            gate.tap = None
        if (logits[0, :-1] - logits[1, :-1]).abs().max() > MOVES * self._tolerance(logits):
            raise AUSteerError(
                f"{type(self.model).__name__} is no causal language model: its first tokens see the last one; take a decoder"
            )
        for gate, seen in shapes.items():
            wanted = (2, self.ids.shape[1], gate.width)
            if len(seen) != 1:
                faults.setdefault(gate.site, f"layer {gate.layer} passes it {len(seen)} times instead of once")
            elif seen[0] != wanted:
                why = "several residual streams" if gate.site == "layer" else "another shape"
                wanted_here = f"{seen[0]} instead of (batch, tokens, {gate.width})"
                faults.setdefault(gate.site, f"layer {gate.layer} has {why}, {wanted_here}")
        for layer, last in order.items():
            faults.setdefault(
                "attention", f"{last} of layer {layer} comes after the projection that was taken for the last"
            )
        return faults

    def _choose(self, gates: list[AUGate]) -> None:
        """Give each chosen AU the first factor that moves the logits, and drop AUs that none moves."""
        waiting, idle = gates, self._logits(self.ids)
        self.chosen = {gate: au for gate, au in self.chosen.items() if gate in set(gates)}
        for factor in FACTORS.get(self.model.dtype, FACTORS[None]):
            still = []
            for start in range(0, len(waiting), ROWS):
                rows = waiting[start : start + ROWS]
                for row, gate in enumerate(rows):
                    scale = torch.zeros(len(rows), 1, gate.width)
                    scale[row, 0, self.chosen[gate][0]] = factor - 1
                    gate.set(scale, None, like=self.like)
                steered = self._logits(self.ids.expand(len(rows), -1))
                for gate in rows:
                    gate.clear()
                moved = (steered - idle).abs().flatten(1).amax(1)
                enough = (moved > 0) & (moved >= MOVES * self._tolerance(idle)) & steered.flatten(1).isfinite().all(1)
                for gate, is_enough in zip(rows, enough.tolist(), strict=True):
                    self.chosen[gate] = self.chosen[gate][0], factor
                    still += [] if is_enough else [gate]
            waiting = still
        for gate in waiting:
            del self.chosen[gate]

    def _agrees(self, site: str, aus: dict[AUGate, tuple[int, float]]) -> bool:
        """Say whether these gates together, and their weights together, change the logits alike."""
        for gate, (dim, factor) in aus.items():
            scale = torch.zeros(gate.width)
            scale[dim] = factor - 1
            gate.set(scale, None, like=self.like)
        steered = self._logits(self.ids)
        for gate in aus:
            gate.clear()
        with self._reference(site, {gate.layer: au for gate, au in aus.items()}):
            expected = self._logits(self.ids)
        if not (steered.isfinite() & expected.isfinite()).all():  # many factors at once: one by one they are finite
            return len(aus) > 1 and all(self._agrees(site, {gate: au}) for gate, au in aus.items())
        error = float((steered - expected).abs().max() / expected.abs().max())
        self.errors[site] = max(error, self.errors.get(site, 0.0))
        return self._alike(steered, expected)

    def _reference(self, site: str, aus: dict[int, tuple[int, float]]):
        return (_scaled_weights if self._has_weights(site) else _plain_hooks)(self.model, site, aus)

    def _has_weights(self, site: str) -> bool:
        weights = [self.model.get_parameter(entry[3].weight) for entry in linear_maps(self.model) if site in entry[1:3]]
        return bool(weights) and all(not weight.is_meta and weight.dtype in TOLERANCES for weight in weights)

    def _reference_name(self, site: str) -> str:
        return "its weight" if self._has_weights(site) else "the activation by a plain hook"

    def _logits(self, ids: Tensor, keep: int = 1) -> Tensor:
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float()

    def _alike(self, some: Tensor, others: Tensor) -> bool:
        return bool((some - others).abs().max() <= self._tolerance(others))

    def _tolerance(self, logits: Tensor) -> float:
        return TOLERANCES.get(self.model.dtype, TOLERANCES[torch.bfloat16]) * float(logits.abs().max())


def _few(gates: list[AUGate]) -> list[AUGate]:
    return [gates[index] for index in sorted({0, len(gates) // 2, len(gates) - 1})] if gates else []


def _input_device(model: PreTrainedModel) -> torch.device:
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate moves what it gets


def _tokens(model: PreTrainedModel) -> Tensor:
    """Return a row of ordinary tokens: ids that no field of the config gives a meaning."""
    config = model.config.get_text_config(decoder=True)
    special = {value for part in (model.config, config) for value in vars(part).values() if isinstance(value, int)}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(config.vocab_size, generator=generator)[: 8 * TOKENS].tolist()
    return torch.tensor([[token for token in ids if token not in special][:TOKENS]])


@contextmanager
def _calls_of_projections(model: PreTrainedModel) -> Iterator[dict[int, str]]:
    """Find the layers in which a wide projection of the mixer is called after the one that has the gate, and name it."""
    late: dict[int, str] = {}
    with ExitStack() as undo:
        for index, block in enumerate(find_blocks(model)):
            for name, part in block.wide:

                def note(module, args, out, index=index, name=name, is_last=part is block.mixer):
                    late.pop(index, None) if is_last else late.__setitem__(index, name)

                undo.callback(part.register_forward_hook(note).remove)
        yield late


@contextmanager
def _scaled_weights(model: PreTrainedModel, site: str, aus: dict[int, tuple[int, float]]) -> Iterator[None]:
    """Scale the columns or rows of one AU per layer in the weights, and put the very bits back."""
    kept: list[tuple[Tensor, Tensor]] = []
    for layer, into, out_of, linear in linear_maps(model):
        if site not in (into, out_of) or layer not in aus:
            continue
        dim, factor = aus[layer]
        weight = model.get_parameter(linear.weight)
        if site == into and weight.dim() == 3:  # an AU of one expert
            inner = weight.shape[linear.inputs]
            weight, dim = weight[dim // inner], dim % inner
        parts = [weight.select(linear.inputs if site == into else linear.outputs, dim)]
        if site == out_of and linear.bias is not None:
            parts.append(model.get_parameter(linear.bias)[..., dim])
        for part in parts:
            kept.append((part, part.clone()))
            part.mul_(factor)
    try:
        yield
    finally:
        for part, old in kept:
            part.copy_(old)


@contextmanager
def _plain_hooks(model: PreTrainedModel, site: str, aus: dict[int, tuple[int, float]]) -> Iterator[None]:
    """Multiply one AU per layer where the site is, by hooks that know nothing of gates."""

    def scaled(x: Tensor, dim: int, factor: float) -> Tensor:
        x = x.clone()
        x[..., dim] *= factor
        return x

    with ExitStack() as undo:
        for layer, block in enumerate(find_blocks(model)):
            if layer not in aus:
                continue
            if site in ("attention", "neuron"):
                module = block.mixer if site == "attention" else block.down
                hook = module.register_forward_pre_hook(
                    lambda m, args, au=aus[layer]: (scaled(args[0], *au), *args[1:])
                )
            else:
                module = block.layer if site == "layer" else block.down or block.experts

                hook = module.register_forward_hook(
                    lambda m, args, out, au=aus[layer]: with_hidden_states(out, lambda x: scaled(x, *au))
                )
            undo.callback(hook.remove)
        yield
