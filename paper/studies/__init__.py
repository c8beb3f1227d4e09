"""The paper's figures that are more than a table of accuracies: one file per kind.

Each file says what it is asked and offers

    measure(bench, params, progress) -> dict       all that the picture needs, as JSON; the same every time
    draw(found, params, path)                      the picture, from that dict alone
    note(found, params) -> str                     if there is something to say below it, from that dict too
"""

from __future__ import annotations

from types import ModuleType

from paper.studies import convergence, dimension_sweep, overhead, overlap, rank_stability, score_map, top_tokens

STUDIES: dict[str, ModuleType] = {
    "dimension_sweep": dimension_sweep,  # Figures 2, 6, 7, 8
    "convergence": convergence,  # Figure 3
    "top_tokens": top_tokens,  # Figure 4
    "score_map": score_map,  # Figure 11
    "overlap": overlap,  # Figure 12
    "overhead": overhead,  # Table 11, which has no picture
    "rank_stability": rank_stability,  # ours
}
