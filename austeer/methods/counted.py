"""Causal momentum counted as the paper counts: by the sign of every pair, not by a t statistic.

    r_i = the larger of the shares of pairs with c_ij > 0 and with c_ij < 0, signed;     x_i -> x_i (1 + alpha r_i)

with c of `austeer/momentum.py`. What is left between this and `published` is what is counted: effects, not differences.
"""

from __future__ import annotations

import torch

from austeer.errors import AUSteerError
from austeer.methods.austeer import Causal
from austeer.methods.base import Evidence
from austeer.momentum import CausalMomentum
from austeer.ranks import AURanks
from austeer.tokens import CLEAN
from MFU_screening import BATCH_TOKENS, batches


class CausalCounted(Causal):
    name, label = "causal-counted", "causal, pairs counted"
    paper = "ablation: t against counts"

    def prepare(self, evidence: Evidence) -> AURanks:
        counts = CausalCounts(evidence.model, [evidence.site], CLEAN)
        for batch in batches(evidence.encoded(), None, BATCH_TOKENS.get(evidence.model.device.type, 8192)):
            counts.add(batch)
        if counts.not_finite:
            raise AUSteerError(
                f"gradients are inf or nan in {evidence.model.dtype}; load the model in bfloat16 or float32"
            )
        stats = {name: values.cpu() for name, values in counts.stats(evidence.site).items()}
        # as the paper's: of all pairs, and a tie is positive
        share = torch.maximum(stats["positive"], stats["negative"]).float() / len(evidence.pairs)
        score = torch.where(stats["positive"] < stats["negative"], -share, share)
        header = evidence.header() | {"momentum": "causal, counted", "pairs": len(evidence.pairs)}
        return AURanks(evidence.site, score, score.clone(), stats, header)


class CausalCounts(CausalMomentum):
    SUMS = {"positive": torch.int32, "negative": torch.int32}

    def add(self, batch) -> None:
        for (site, layer), values in self.effects(batch).items():
            self._note_not_finite(values)
            self._accumulate(site, "positive", layer, (values > 0).sum(0))
            self._accumulate(site, "negative", layer, (values < 0).sum(0))
