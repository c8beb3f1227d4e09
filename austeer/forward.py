"""Run the texts of pairs on a model: what each pair shares once, then the two tails behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from austeer.errors import AUSteerError
from austeer.tokens import EncodedPair


class PairTexts:
    """The texts of a batch of pairs: what each pair shares is run once, at once; then the tails on its cache.

    Rows of tails are right, wrong, right, wrong, ... Pairs that share nothing are run text by text.
    """

    def __init__(self, model: PreTrainedModel, batch: Sequence[EncodedPair], logits: bool):
        self.model, self.device, self.batch = model, input_device(model), batch
        self.lengths = torch.tensor([len(pair.prefix) for pair in batch])
        width = int(self.lengths.max())
        self.cache: DynamicCache | None = None
        if not width:
            return
        # without a config no layer forgets what left its sliding window, whose mask still applies: repeating rows is safe
        self.cache = DynamicCache()
        padded = [(0,) * (width - len(pair.prefix)) + pair.prefix for pair in batch]
        columns = torch.arange(width) - (width - self.lengths)[:, None]  # negative on padding
        self.mask = (columns >= 0).long() if (columns < 0).any() else None
        out = self._forward(padded, columns.clamp(min=0), self.mask, keep=1 if logits else None)
        self.prompt_logits = out.logits if logits else None  # (batch, 1, vocabulary)
        self.cache.batch_repeat_interleave(2)

    def run_tails(self, tails: list[tuple[int, ...]], keep: int | None = None):
        """Run the tails behind their prompts, right-padded."""
        if self.cache is None:
            for tail in tails:
                self.last = torch.tensor([len(tail) - 1])
                self._forward([tail], torch.arange(len(tail))[None], None, keep)
            return None
        self.last = torch.tensor([len(tail) - 1 for tail in tails])
        width = max(map(len, tails))
        padded = [tail + (0,) * (width - len(tail)) for tail in tails]
        positions = self.lengths.repeat_interleave(2)[:, None] + torch.arange(width)
        mask = None
        if self.mask is not None:
            mask = torch.cat([self.mask.repeat_interleave(2, 0), self.mask.new_ones(len(tails), width)], dim=1)
        return self._forward(padded, positions, mask, keep)

    def log_odds(self) -> Tensor:
        """log p(right | prompt) - log p(wrong | prompt), (pairs,)."""
        log_probability = self.log_probabilities()
        return log_probability[0::2] - log_probability[1::2]

    def log_probabilities(self) -> Tensor:
        """Of the tails behind their prompts: right, wrong, right, wrong, ...

        The last token of a tail is never run: for one-token answers the prompt is all there is.
        """
        if self.cache is None or not self.lengths.all():
            raise AUSteerError("the log-odds of a pair need a prompt: the two answers of some pair share no token")
        tails = [tail for pair in self.batch for tail in (pair.positive, pair.negative)]
        logits = self.prompt_logits.repeat_interleave(2, 0)
        if any(len(tail) > 1 for tail in tails):
            behind = self.run_tails([tail[:-1] or (0,) for tail in tails], keep=0)
            logits = torch.cat([logits, behind.logits], dim=1)
        width = max(map(len, tails))
        wanted = torch.tensor([list(tail) + [-1] * (width - len(tail)) for tail in tails], device=logits.device)
        chosen = logits[:, :width].float().log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])
        return (chosen[..., 0] * (wanted >= 0)).sum(1)

    def _forward(self, ids: list[tuple[int, ...]], positions: Tensor, mask: Tensor | None, keep: int | None):
        """keep: how many of the last positions get logits, 0 for all; None leaves the LM head out."""
        run, extra = (self.model.base_model, {}) if keep is None else (self.model, {"logits_to_keep": keep})
        return run(
            input_ids=torch.tensor(ids, device=self.device),
            position_ids=positions.to(self.device),
            attention_mask=None if mask is None else mask.to(self.device),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            **extra,
        )


def input_device(model: PreTrainedModel) -> torch.device:
    return model.get_input_embeddings().weight.device
