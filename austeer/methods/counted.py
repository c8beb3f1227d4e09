"""Causal momentum scored as the paper scores: by counting signs of pairs, not by a t statistic.

    r_i = the larger of the shares of pairs with c_ij > 0 and with c_ij < 0, signed;     x_i -> x_i (1 + alpha r_i)

with c of `MFU_screening.py`. This differs from `published` only in what is counted: effects, not differences.
"""

from __future__ import annotations

import torch

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.austeer import Causal
from austeer.ranks import AURanks
from austeer.tokens import CLEAN
from MFU_screening import CausalMomentum, signed_share


class CausalCounted(Causal):
    name, label = "causal-counted", "causal, pairs counted"
    paper = "ablation: t against counts"

    def prepare(self, evidence: Evidence) -> AURanks:
        counts = CausalCounts(evidence.model, [evidence.site], CLEAN)
        for batch in evidence.batches():
            counts.add(batch)
        if counts.not_finite:
            raise AUSteerError(f"gradients are inf or nan in {evidence.model.dtype}; load it in bfloat16 or float32")
        stats = counts.stats(evidence.site)
        header = evidence.header() | {"momentum": "causal, counted", "pairs": len(evidence.pairs)}
        return AURanks(evidence.site, *CausalCounts.score(stats, len(evidence.pairs)), stats, header)


class CausalCounts(CausalMomentum):
    SUMS = {"positive": torch.int32, "negative": torch.int32}
    score = staticmethod(signed_share)

    def add(self, batch) -> None:
        for (site, layer), values in self.effects(batch).items():
            self._note_not_finite(values)
            self._accumulate(site, layer, positive=(values > 0).sum(0), negative=(values < 0).sum(0))


METHODS = (CausalCounted(),)
