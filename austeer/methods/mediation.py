"""Heads chosen by causal mediation: each head is patched in turn, and the change of the log-odds is measured.

After Sankaranarayanan et al., "Generative Causal Mediation", arXiv 2602.16080: the indirect effect of a head is how
far its activation alone, taken from the contrasting run, moves the log-odds of the two answers. They contrast two
prompts. Here both texts have one prompt, so the patch adds the pair's own difference d = x(right text) - x(wrong text)
of the last token, at all positions, as the steering will:

    effect_hj = M_j(head h shifted by d_hj) - M_j,     score_h = mean over pairs

The k heads with the largest positive effects are shifted by alpha times their mean difference. This is exact where
`attribution.py` is first-order, but costs a forward per head and pair, so it uses at most `most_pairs` pairs, evenly
spread. Heads are rows of a batch: every row runs the same pair with another head patched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import PairTexts, tapped
from austeer.methods.attribution import AttributionHeads
from austeer.methods.choice import by_head
from austeer.tokens import EncodedPair

ROW_TOKENS = {"cpu": 1024, "cuda": 32768}  # how many tokens run at once, over all rows


class Mediation(AttributionHeads):
    name, label = "mediation", "heads by causal mediation"
    paper = "after Sankaranarayanan et al., arXiv 2602.16080"

    def __init__(self, most_pairs: int = 64):
        self.most_pairs = most_pairs

    def scores(self, evidence: Evidence, difference: Tensor) -> Tensor:
        pairs = evidence.encoded()
        count = min(self.most_pairs, len(pairs))
        sample = [i * len(pairs) // count for i in range(count)]
        total = sum(effects(evidence, pairs[i], difference[i]).double() for i in sample)
        if not torch.isfinite(total).all():
            raise AUSteerError(f"log-odds are inf or nan in {evidence.model.dtype}; load it in bfloat16 or float32")
        return (total / count).float()


@torch.inference_mode()
def effects(evidence: Evidence, pair: EncodedPair, difference: Tensor) -> Tensor:
    """Return every head's indirect effect on one pair, (layers, heads). difference: the pair's, (layers, width)."""
    model = evidence.model
    heads = by_head(difference, model.config)  # (layers, heads, head_dim)
    layers, per_layer = heads.shape[:2]
    # one more row than heads, with nothing patched: what is compared comes from the same batch
    rows = torch.arange(layers * per_layer)
    at_once = max(1, ROW_TOKENS.get(model.device.type, 32768) // pair.cost - 1)
    changes = []
    for part in rows.split(at_once):
        log_odds = _patched(evidence, pair, heads, part)
        changes.append(log_odds[:-1] - log_odds[-1])
    return torch.cat(changes).view(layers, per_layer)


def _patched(evidence: Evidence, pair: EncodedPair, heads: Tensor, part: Tensor) -> Tensor:
    """Return log-odds with each head of `part` (layer * heads + head) patched, and at the end with none."""
    per_layer = heads.shape[1]

    def patch(gate):
        row, head = torch.where(part // per_layer == gate.layer)[0], part[part // per_layer == gate.layer] % per_layer
        shift = torch.zeros(len(part) + 1, *heads.shape[1:])
        shift[row, head] = heads[gate.layer, head]
        shift = shift.flatten(1)[:, None]

        def tap(x: Tensor) -> Tensor:
            rows_per_pair = len(x) // len(shift)  # 1 for the prompts, 2 for the right and wrong answers after them
            return x + shift.to(x).repeat_interleave(rows_per_pair, 0)

        return tap

    with tapped(evidence.model, [evidence.site], patch):
        return PairTexts(evidence.model, [pair] * (len(part) + 1), logits=True).log_odds().float().cpu()


METHODS = (Mediation(),)
