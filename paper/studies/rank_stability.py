"""Ours: would other pairs of the same kind choose the same AUs? Compare the k best AUs of resampled pairs (bootstrap).

params: ks, draws (resamples), seed.

Every draw takes as many pairs as there are, with replacement, which gives a count per pair. One pass over the pairs adds
each pair's momentum, times its count, to the sums of all draws, so memory is that of `draws` ranks for any number of
pairs. Then every draw is ranked by the rules of MFU_screening.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import MFU_screening
from austeer.errors import AUSteerError
from austeer.ranks import AURanks
from austeer.tokens import PROTOCOLS, encode
from experiments.bench import Bench
from paper.studies import picture
from paper.studies.ranks import MOMENTA, n_ranking_prompts
from rmodels import context_length

COLORS = {"activation": picture.BLUE, "causal": picture.VERMILLION}


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    momenta = list(MOMENTA) if bench.task_spec.protocol == "clean" else ["activation"]
    result: dict = {"task": bench.task_spec.label, "pairs": 0, "sites": {}}
    for momentum in momenta:
        scores, n = resampled(bench, momentum, params["draws"], params["seed"], progress)
        result["pairs"] = n
        for site, scores_by_draw in scores.items():
            full, *others = [AURanks(site, score, score).order for score in scores_by_draw]
            number = len(full)
            ks = [k for k in params["ks"] if k <= number]
            shares = {k: [len(set(full[:k].tolist()) & set(order[:k].tolist())) / k for order in others] for k in ks}
            site_result = result["sites"].setdefault(site, {"by_chance": [k / number for k in ks], "ks": ks})
            site_result[momentum] = {
                "mean": [float(np.mean(shares[k])) for k in ks],
                "low": [float(np.percentile(shares[k], 2.5)) for k in ks],
                "high": [float(np.percentile(shares[k], 97.5)) for k in ks],
                "ties_at_cut": [AURanks(site, scores_by_draw[0], scores_by_draw[0]).ties(k) for k in ks],
            }
    return result


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return sum(n_ranking_prompts(momentum, n_pairs) for momentum in MOMENTA)


def resampled(bench: Bench, momentum: str, draws: int, seed: int, progress: bool) -> tuple[dict[str, Tensor], int]:
    """Return |score| by site, (1 + draws, layers, width), of all pairs once and of each draw; and the number of pairs."""
    model, tokenizer, task = bench.model, bench.tokenizer, bench.task
    kind = MFU_screening.MOMENTA[momentum]
    rules, sites = PROTOCOLS[bench.task_spec.protocol], list(picture.SITES)
    pairs = task.pairs[: rules.first_pairs]
    encoded, _ = encode(pairs, tokenizer, rules, rules.cut_at or context_length(model))
    counts = _counts(len(pairs), draws, seed)
    # pairs of equal tokens add nothing but are drawn like all others: the last counts are theirs
    bar = tqdm(encoded, desc=f"{task.name}, {momentum}", unit=" pairs", disable=not progress)
    sums: dict[tuple[str, str, int], Tensor] = {}
    for count, pair in zip(counts, bar, strict=False):
        own = kind(model, sites, rules)  # the sums of one pair are its own values
        own.add([pair])
        for (site, name), rows in own.sums.items():
            for layer, values in enumerate(rows):
                values = values.double()
                total = sums.setdefault((site, name, layer), values.new_zeros(draws + 1, len(values)))
                total.addr_(count.to(values.device), values)
    scores = {}
    for site in sites:
        stacked = {
            name: torch.stack([s.cpu() for key, s in sums.items() if key[:2] == (site, name)], 1) for name in kind.SUMS
        }
        scores[site] = kind.score(stacked, len(pairs))[0].abs()
        if not torch.isfinite(scores[site]).all():
            raise AUSteerError(f"momentum is inf or nan in {model.dtype}: load the model in bfloat16 or float32")
    return scores, len(pairs)


def _counts(n: int, draws: int, seed: int) -> Tensor:
    """Return how often each pair occurs, (n, 1 + draws): once in the full set, then its count in each draw."""
    draw_indices = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.ones(n), *(row.bincount(minlength=n) for row in draw_indices)], 1).double()


def draw(result: dict, params: dict, path: Path, printed: object) -> None:
    figure, axes = picture.subplots(len(result["sites"]), (12.5, 5.2), sharey=True)
    for axis, (site, site_result) in zip(axes, result["sites"].items(), strict=True):
        ks = site_result["ks"]
        for momentum, color in COLORS.items():
            if momentum in site_result:
                bands = site_result[momentum]
                axis.fill_between(ks, bands["low"], bands["high"], color=color, alpha=0.2, lw=0)
                axis.plot(ks, bands["mean"], "-o", color=color, label=f"{momentum} momentum")
        axis.plot(ks, site_result["by_chance"], "--", color=picture.GREY, label="by chance")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.set(xlabel="k", ylim=(0, 1.03), title=f"{result['task']}, {picture.SITES[site]}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("share of the k best that stays")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"{params['draws']} resamples of {result['pairs']} pairs: mean, and 95 % of the resamples", fontsize=14
    )
    picture.save(figure, path)
