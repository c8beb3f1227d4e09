"""Figure 11: the score of every AU by layer and dimension, at both sites, with the high ones marked.

params: momentum ("activation": the share of pairs, up to 1, as in the paper; "causal": |t|), threshold (scores above
    it are marked).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.bench import Bench
from paper.studies import picture
from paper.studies.counting import counted
from paper.studies.ranks import n_ranking_prompts, rank_sites

SCORE = {"activation": "score: share of pairs", "causal": "score: |t| over pairs"}


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    ranks_by_site = rank_sites(bench, params["momentum"], list(picture.SITES), progress)
    scores = {site: ranks.score.abs() for site, ranks in ranks_by_site.items()}
    return {
        "task": bench.task_spec.label,
        "pairs": next(iter(ranks_by_site.values())).header["pairs"],
        # one line of text per layer: as JSON lists, every number would take a line
        "scores": {
            site: [" ".join(f"{x:.4g}" for x in row) for row in score.tolist()] for site, score in scores.items()
        },
        "marked": {site: (score > params["threshold"]).sum(1).tolist() for site, score in scores.items()},
    }


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return n_ranking_prompts(params["momentum"], n_pairs)


def draw(result: dict, params: dict, path: Path, printed: object) -> None:
    threshold = params["threshold"]
    figure, axes = picture.subplots(4, (16, 5.2), width_ratios=(4, 1, 4, 1))
    for (site, rows), axis, beside in zip(result["scores"].items(), axes[::2], axes[1::2], strict=True):
        scores = np.array([[float(x) for x in row.split()] for row in rows])
        layers, width = scores.shape
        first, last = counted(0), counted(layers - 1)
        extent = (-0.5, width - 0.5, last + 0.5, first - 0.5)
        image = axis.imshow(scores, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
        layer, dim = (scores > threshold).nonzero()
        size = 22 if width <= 512 else 5
        axis.scatter(dim, counted(layer), size, color=picture.VERMILLION, edgecolors="white", linewidths=0.3)
        axis.set(xlabel="dimension", ylabel="layer")
        axis.set_title(f"{result['task']}, {picture.SITES[site]}, {params['momentum']} momentum", fontsize=13)
        figure.colorbar(image, ax=axis, label=SCORE[params["momentum"]], location="bottom", aspect=40)
        marked = result["marked"][site]
        beside.barh(range(first, last + 1), marked, color=picture.VERMILLION)
        beside.set(xlabel="AUs of the layer", xlim=(0, max(1, *marked) * 1.05), ylim=(last + 0.5, first - 0.5))
        beside.set_title(f"• > {threshold:g}", color=picture.VERMILLION)
        beside.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        for both in (axis, beside):
            if layers <= 12:
                both.set_yticks(range(first, last + 1))
    picture.save(figure, path)
