"""The measured cost of a change of a model: KL(unsteered || steered) per token of text, in nats.

The first half of a text counts as its prompt, and the mean is over the predictions of the tokens of its second half, for
every method alike: some steer only from the end of a prompt on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.batching import TOKENS_AT_ONCE
from austeer.change import Adapter, Change, applied
from austeer.errors import AUSteerError
from austeer.forward import input_device


class KLMeter:
    """Measure changes of one model on one set of texts. The unsteered predictions are computed once and kept."""

    def __init__(self, model: PreTrainedModel, texts: Sequence[Tensor]):
        """texts: token ids, (tokens,) each; texts of one length run together."""
        self.model = model
        if any(len(text) < 2 for text in texts) or not len(texts):
            raise AUSteerError("KL is measured on texts of at least two tokens; give longer ones")
        at_once = TOKENS_AT_ONCE.get(input_device(model).type, 8192)
        self.batches: list[Tensor] = []
        for length in sorted({len(text) for text in texts}):
            alike = torch.stack([torch.as_tensor(text) for text in texts if len(text) == length])
            self.batches += alike.split(max(1, at_once // length))
        self._unsteered: list[Tensor] | None = None
        self.passes = 0  # over all texts, the unsteered one included

    def __call__(self, change: Change) -> float:
        return self.with_error(change)[0]

    def with_error(self, change: Change) -> tuple[float, float]:
        """Return the KL under a change, and its standard error over the texts.

        A change of something that costs exactly nothing is a mistake, and refused.
        """

        def changed(batch: Tensor) -> Tensor:
            with applied(self.model, change, prompt_end=batch.shape[1] // 2):
                return self._log_p(batch)

        kl, error = self._mean(changed)
        size = change.nonzero if isinstance(change, Adapter) else len(change)
        if kl == 0 and size:
            raise AUSteerError(f"{size} numbers were changed and the KL is exactly 0: they did not reach the model")
        return kl, error

    def of_front(self, front: Sequence[int], lead: int) -> float:
        """Return the KL of putting tokens in front of every text, behind its own first `lead` tokens, such as a BOS.

        The same predictions are compared: those of the tokens of the second half of the text as it was.
        """

        def prefixed(batch: Tensor) -> Tensor:
            rows = torch.tensor(list(front), dtype=batch.dtype).expand(len(batch), -1)
            longer = torch.cat([batch[:, :lead], rows, batch[:, lead:]], 1)
            return self._log_p(longer, batch.shape[1] - batch.shape[1] // 2)

        return self._mean(prefixed)[0]

    def _mean(self, changed: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        if self._unsteered is None:
            self._unsteered = [self._log_p(batch) for batch in self.batches]
            self.passes += 1
        totals, tokens = [], []
        self.passes += 1
        for batch, before in zip(self.batches, self._unsteered, strict=True):
            totals += (before.exp() * (before - changed(batch))).sum((1, 2)).tolist()
            tokens += [before.shape[1]] * before.shape[0]
        mean = sum(totals) / sum(tokens)
        n, off = len(totals), sum((total - mean * count) ** 2 for total, count in zip(totals, tokens, strict=True))
        return mean, math.sqrt(off * n / max(1, n - 1)) / sum(tokens)

    @torch.inference_mode()
    def _log_p(self, ids: Tensor, count: int | None = None) -> Tensor:
        """Return the log-probabilities that predict the last `count` tokens, by default the second half: (texts, tokens, vocabulary)."""
        count = ids.shape[1] - ids.shape[1] // 2 if count is None else count
        ids = ids.to(input_device(self.model))
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits
        return logits[:, -count - 1 : -1].float().log_softmax(-1)
