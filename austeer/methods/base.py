"""A method: evidence in, plans out. One file each beside this one, one line each in `registry.py`.

A method looks at the evidence once (`prepare`: the costly part, timed) and then turns settings of its grid into
plans. All methods get the same pairs and as many settings to choose from on validation. None sees a test item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.errors import AUSteerError
from austeer.forward import PairTexts
from austeer.momentum import tapped
from austeer.pairs import Pair, pairs_hash
from austeer.plan import Plan
from austeer.ranks import AURanks, model_header
from austeer.tokens import CLEAN, EncodedPair, encode
from MFU_screening import BATCH_TOKENS, batches
from rmodels import gates

Settings = dict[str, float]  # what the search chooses, such as {"k": 16, "alpha": 2.0}


class Method(ABC):
    name: ClassVar[str]
    label: ClassVar[str]  # in tables
    paper: ClassVar[str]  # where it is from
    edits: ClassVar[str]  # what it touches, in words
    sites: ClassVar[tuple[str, ...]]  # where it can act
    trains: ClassVar[bool] = False  # gradient descent on the pairs
    foldable: ClassVar[bool] = True  # the plan can go into the weights: no `layer` site, all positions
    draws: ClassVar[bool] = False  # a control with chance in it: repeated with other draws, shown as a band

    @abstractmethod
    def grid(self, kind: str) -> list[Settings]:
        """Settings to choose from; kind is "embedded" or "real", and sets how many: `BUDGET`."""

    @abstractmethod
    def prepare(self, evidence: Evidence) -> Any:
        """What all settings share, from the evidence."""

    @abstractmethod
    def plan(self, prepared: Any, settings: Settings, draw: int = 0) -> Plan: ...


# validation runs a method may spend, by kind of model: the size of AUSteer's own grid
BUDGET = {"embedded": 15, "real": 21}
READOUTS = ("last", "before-last", "answer")
# a method that acts at several sites at once has one name for them
TOGETHER = {"both": ("attention", "ffn")}


def sites_of(site: str) -> tuple[str, ...]:
    """The sites of the model behind the site of a cell."""
    return TOGETHER.get(site, (site,))


@dataclass
class Evidence:
    """A model and contrastive pairs, and what can be read off them at one site."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    site: str
    ranks: Callable[..., AURanks]  # by momentum; of this site, or of the one named after it
    seed: int = 0

    def encoded(self) -> list[EncodedPair]:
        """Pairs that differ in tokens, in order."""
        found, _ = encode(self.pairs, self.tokenizer, CLEAN, self.model.config.max_position_embeddings)
        if not found:
            raise AUSteerError("both answers of every pair are the same tokens: there is nothing to learn from")
        return found

    def header(self) -> dict:
        """What a plan says of its origin, so that another model refuses it."""
        made_on = {key: model_header(self.model)[key] for key in ("model", "family", "fingerprint", "precision")}
        return {**made_on, "pairs_hash": pairs_hash(self.pairs), "site": self.site}

    @torch.inference_mode()
    def activations(self, readout: str = "last", nonlinearity: bool = False) -> tuple[Tensor, Tensor]:
        """Of right and of wrong texts, (pairs, layers, width) float32 on the CPU, in the order of the pairs.

        readout: the answer's last token, its last but one (the letter of an answer like "(A)"), or the mean over the
        tokens that tell the two answers apart. nonlinearity: the output of the MLP's act_fn instead of the site's
        own values, which at site neuron are its product with up_proj.
        """
        if readout not in READOUTS:
            raise AUSteerError(f"readout {readout!r} is unknown; use one of {', '.join(READOUTS)}")
        found = self.encoded()
        if readout == "before-last" and min(min(len(pair.positive), len(pair.negative)) for pair in found) < 2:
            raise AUSteerError(
                "the last token but one is in the prompt of some pair, where right and wrong texts are equal: "
                "it is for answers like '(A)'; use readout last or answer"
            )
        place = {id(pair): index for index, pair in enumerate(found)}
        rows: dict[int, Tensor] = {}
        for batch in batches(found, None, BATCH_TOKENS.get(self.model.device.type, 8192)):
            both = self._read(batch, readout, nonlinearity)  # (2 * batch, layers, width)
            for index, pair in enumerate(batch):
                rows[place[id(pair)]] = both[2 * index : 2 * index + 2]
        together = torch.stack([rows[index] for index in range(len(found))])
        if not torch.isfinite(together).all():
            raise AUSteerError(
                f"activations are inf or nan in {self.model.dtype}; load the model in bfloat16 or float32"
            )
        return together[:, 0], together[:, 1]

    def _read(self, batch: list[EncodedPair], readout: str, nonlinearity: bool) -> Tensor:
        texts = PairTexts(self.model, batch, logits=False)
        tails = [tail for pair in batch for tail in (pair.positive, pair.negative)]
        seen: dict[int, list[Tensor]] = {}

        def keep(gate):
            def tap(x: Tensor) -> Tensor:
                last = texts.last.to(x.device)
                if readout != "answer":
                    read = x[torch.arange(len(last), device=x.device), last - int(readout == "before-last")]
                else:
                    own = torch.arange(x.shape[1], device=x.device) <= last[:, None]
                    read = (x.float() * own[..., None]).sum(1) / own.sum(1, keepdim=True)
                seen.setdefault(gate.layer, []).append(read.float().cpu())
                return x

            return tap

        with self._nonlinearities(keep) if nonlinearity else tapped(self.model, [self.site], keep):
            texts.run_tails(tails)
        return torch.stack([torch.cat(seen[layer]) for layer in sorted(seen)], dim=1)

    @contextmanager
    def _nonlinearities(self, keep: Callable) -> Iterator[None]:
        """As `tapped`, at a place that has no gate because nothing steers there."""
        handles = []
        try:
            for layer, gate in zip(self.model.base_model.layers, gates(self.model, "neuron"), strict=True):
                look = keep(gate)
                hook = layer.mlp.act_fn.register_forward_hook(lambda module, args, out, look=look: look(out))
                handles.append(hook)
            yield
        finally:
            for hook in handles:
                hook.remove()
