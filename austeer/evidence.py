"""Evidence: a model, contrastive pairs and one site. Methods read activations from it and make their plans from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from austeer.batching import pair_batches
from austeer.errors import AUSteerError
from austeer.fisher import Fisher
from austeer.forward import PairTexts, read_at, stack_layers
from austeer.identity import model_header, site_header
from austeer.kl import KLMeter
from austeer.neutral import NeutralText
from austeer.pairs import Pair, pairs_hash
from austeer.ranks import AURanks
from austeer.tokens import CLEAN, EncodedPair, encode
from rmodels import context_length, gates, site_shape
from rmodels.experts import ExpertGate
from rmodels.structural import activation_functions

READOUTS = ("last", "before-last", "answer")


def no_ranks(momentum: str, site: str | None = None) -> AURanks:
    """Fail, for evidence that comes without ranks."""
    raise AssertionError(f"{momentum} ranks were asked of evidence that has none")


@dataclass(frozen=True)
class Costs:
    """Provide what is needed to price and measure a change. Each part is made on first use, and kept."""

    neutral: Callable[[], NeutralText]
    fisher: Callable[[Sequence[str]], Fisher]  # of these sites
    meter: Callable[[], KLMeter]  # on the neutral text


@dataclass
class Evidence:
    """Hold a model, its tokenizer, pairs and a site; `ranks(momentum)` ranks it, `ranks(momentum, site)` another.

    costs: None where the evidence comes without neutral text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    site: str
    ranks: Callable[..., AURanks] = no_ranks
    seed: int = 0
    costs: Costs | None = None

    def encoded(self) -> list[EncodedPair]:
        """Return the pairs that differ in tokens, in order."""
        encoded, _ = encode(self.pairs, self.tokenizer, CLEAN, context_length(self.model))
        if not encoded:
            raise AUSteerError("both answers of every pair are the same tokens: there is nothing to learn from")
        return encoded

    def batches(self) -> list[list[EncodedPair]]:
        return pair_batches(self.encoded(), self.model.device)

    def header(self) -> dict:
        """Return the origin that a plan keeps in its header, so that it refuses any other model."""
        own = {"pairs_hash": pairs_hash(self.pairs), "site": self.site}
        return model_header(self.model) | own | site_header(self.model, self.site)

    @torch.inference_mode()
    def activations(self, readout: str = "last", nonlinearity: bool = False) -> tuple[Tensor, Tensor]:
        """Return activations on right and on wrong texts, each (pairs, layers, width) float32 on the CPU.

        readout: at the answer's last token, at its last but one (the letter of an answer like "(A)"), or the mean over
        the tokens that the two texts do not share. nonlinearity: read the output of the MLP's activation function; the
        values at site neuron are that, or its product with up_proj.
        """
        if readout not in READOUTS:
            raise AUSteerError(f"readout {readout!r} is unknown; use one of {', '.join(READOUTS)}")
        if readout == "before-last" and min(min(len(p.positive), len(p.negative)) for p in self.encoded()) < 2:
            raise AUSteerError(
                "the last token but one of some pair is in its prompt, where right and wrong texts are equal: this "
                "readout is for answers like '(A)'; use readout last or answer"
            )
        if nonlinearity and any(isinstance(gate, ExpertGate) for gate in gates(self.model, "neuron")):
            raise AUSteerError(
                f"{type(self.model).__name__} has experts, whose nonlinearities cannot be read one by one; use site "
                "attention or layer"
            )
        both = self.per_pair(lambda batch: self._read(batch, readout, nonlinearity), "activations")
        return both[:, 0], both[:, 1]

    def per_pair(self, measure: Callable[[list[EncodedPair]], Tensor], what: str) -> Tensor:
        """Stack `measure(batch)`, whose rows are the batch's pairs, in the order of the pairs; refuse inf and nan."""
        encoded = self.encoded()
        place = {id(pair): index for index, pair in enumerate(encoded)}
        rows: dict[int, Tensor] = {}
        for batch in pair_batches(encoded, self.model.device):
            rows |= {place[id(pair)]: row for pair, row in zip(batch, measure(batch), strict=True)}
        ordered = torch.stack([rows[index] for index in range(len(encoded))])
        if not torch.isfinite(ordered).all():
            raise AUSteerError(f"{what} are inf or nan in {self.model.dtype}; load the model in bfloat16 or float32")
        return ordered

    def _read(self, batch: list[EncodedPair], readout: str, nonlinearity: bool) -> Tensor:
        """Return (pairs, 2, layers, width): the right text's activations of each pair, then the wrong text's."""
        texts = PairTexts(self.model, batch, logits=False)

        def read(x: Tensor) -> Tensor:
            last = texts.last.to(x.device)
            x = x.reshape(len(last), -1, x.shape[-1])  # inside OPT's MLP all tokens of a batch are one long row
            if readout != "answer":
                return x[torch.arange(len(last), device=x.device), last - int(readout == "before-last")].float().cpu()
            column = torch.arange(x.shape[1], device=x.device)
            answer = (column >= texts.first.to(x.device)[:, None]) & (column <= last[:, None])
            return ((x.float() * answer[..., None]).sum(1) / answer.sum(1, keepdim=True)).cpu()

        reading = self._nonlinearities(read) if nonlinearity else read_at(self.model, [self.site], read)
        with reading as collected:
            texts.run_tails([tail for pair in batch for tail in (pair.positive, pair.negative)])
        by_layer = {layer: torch.cat(rows) for (_, layer), rows in collected.items()}
        layers = stack_layers(by_layer, site_shape(self.model, self.site)[0], dim=1)
        return layers.unflatten(0, (len(batch), 2))

    @contextmanager
    def _nonlinearities(self, read: Callable[[Tensor], Tensor]) -> Iterator[dict[tuple[str, int], list[Tensor]]]:
        """Do as `read_at` does, at a place without a gate, since nothing steers there."""
        collected: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        functions = activation_functions(self.model)
        with ExitStack() as undo:
            for layer, function in enumerate(functions):
                rows = collected["nonlinearity", layer]
                undo.callback(
                    function.register_forward_hook(lambda function, x, out, rows=rows: rows.append(read(out))).remove
                )
            yield collected
