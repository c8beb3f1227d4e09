"""The paper's figures that are more than a table of accuracies: one file per kind.

Each file says what it is asked and offers

    measure(setting, params, progress) -> dict     all that the picture needs, as JSON; the same every time
    draw(found, params, path)                      the picture, from that dict alone
"""

from __future__ import annotations

from types import ModuleType

from studies import convergence, dimension_sweep, overlap, rank_stability, score_map, top_tokens

STUDIES: dict[str, ModuleType] = {
    "dimension_sweep": dimension_sweep,  # Figures 2, 6, 7, 8
    "convergence": convergence,  # Figure 3
    "top_tokens": top_tokens,  # Figure 4
    "score_map": score_map,  # Figure 11
    "overlap": overlap,  # Figure 12
    "rank_stability": rank_stability,  # ours
}
