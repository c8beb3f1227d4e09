"""Run a model from one decoder layer on: the layers before it return hidden states that an earlier run kept.

The model's own forward is called, so masks, position ids, rotary embeddings and sliding windows are its own. For the
length of a `with` the earlier layers are pass-throughs, which compute nothing. A cache would miss their keys and values,
so run without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from rmodels import decoder_layers
from rmodels.structural import with_hidden_states

LayerOutput = Tensor | tuple | list


@contextmanager
def keeping_before(model: PreTrainedModel, layer: int) -> Iterator[list[LayerOutput]]:
    """Keep what the layer before `layer` returns in each forward of the `with`; nothing for the first layer."""
    kept: list[LayerOutput] = []
    with ExitStack() as undo:
        for before in decoder_layers(model)[:layer][-1:]:
            undo.callback(before.register_forward_hook(lambda module, args, output: kept.append(output)).remove)
        yield kept


@contextmanager
def starting_at(model: PreTrainedModel, layer: int, kept: LayerOutput | None) -> Iterator[None]:
    """Start every forward of the `with` at `layer`, from what was kept before it; at the first layer if that is None."""
    with ExitStack() as undo:
        for before in decoder_layers(model)[:layer] if kept is not None else ():
            own = before.__dict__.get("forward")  # accelerate puts one there for layers that are offloaded
            undo.callback(setattr, before, "forward", own) if own else undo.callback(delattr, before, "forward")
            before.forward = lambda *args, **kwargs: kept
        yield


def repeated(kept: LayerOutput, times: int) -> LayerOutput:
    """Repeat the kept rows once for each change that runs in the same batch."""
    return with_hidden_states(kept, lambda states: states.repeat(times, *[1] * (states.dim() - 1)))
