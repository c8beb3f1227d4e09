"""Measurements behind the paper's figures that are more than accuracies: one file per kind.

Each file documents its params, and `printed` where the paper prints numbers; both come from the spec. It offers

    measure(bench, params, progress) -> dict       everything that the picture shows, as JSON; repeatable
    depends_on(bench, params) -> dict              optional: what the result depends on beside the bench, for the record's name
    n_prompts(params, n_pairs, n_validation)       about how many prompts it runs, for `--estimate`
    n_answers(params) -> int                       optional: how many answers of full length it generates, one at a time
    draw(result, params, path, printed)            draws the picture from that dict, and the paper's numbers beside it
    note(result, params) -> str                    optional: the text below the picture, from that dict alone
"""

from __future__ import annotations

from types import ModuleType

from paper.studies import (
    convergence,
    dimension_sweep,
    effect,
    overhead,
    overlap,
    rank_stability,
    score_map,
    side_effects,
    strengths,
    top_tokens,
)

STUDIES: dict[str, ModuleType] = {
    "dimension_sweep": dimension_sweep,  # Figures 2, 6, 7, 8
    "convergence": convergence,  # Figure 3
    "top_tokens": top_tokens,  # Figure 4
    "score_map": score_map,  # Figure 11
    "overlap": overlap,  # Figure 12
    "overhead": overhead,  # Table 11, which has no picture
    "rank_stability": rank_stability,  # ours
    "effect": effect,  # ours
    "side_effects": side_effects,  # ours
    "strengths": strengths,  # ours
}
