"""Steer AUs one at a time, and compare the measured effect with what four scores predict. (Not in the paper.)

params: site, strengths (values of g), top (the best by each score), random (further AUs, drawn from the whole site), n
    (at most this many held-out pairs), seed.

A held-out pair is a validation item with its right and its wrong answer; no score has seen it. For one AU at a time x
becomes x (1 + g), then x (1 - g), at every position. Half the difference between the two is the measured change: of the
mean log-odds M = log p(right) - log p(wrong), and of the mean log sigmoid(M), whose slope causal momentum is.

In half precision the change by a small g drowns in rounding; then the two halves of the held-out pairs disagree about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from austeer.batching import pair_batches
from austeer.errors import AUSteerError
from austeer.forward import PairTexts
from austeer.plan import Plan
from austeer.steering import steer
from austeer.tokens import CLEAN, EncodedPair, encode
from eval.statistics import spearman, wilson
from experiments.bench import Bench
from paper.studies import picture
from paper.studies.answers import held_out_pairs
from paper.studies.ranks import MOMENTA, n_ranking_prompts, rank_sites
from rmodels import context_length, site_shape

SCORES = {  # name -> how the picture calls it
    "activation": "activation momentum",
    "difference": "mean difference",
    "causal mean": "causal momentum (mean)",
    "causal t": "causal momentum (t)",
}
MEASURES = {"M": lambda log_odds: log_odds, "log sigmoid(M)": logsigmoid}
BATCH = 16  # pairs at once


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    site, strengths = params["site"], params["strengths"]
    layers, width = site_shape(bench.model, site)
    scores = _scores(bench, site, progress)
    best, drawn = _sample(scores, params)
    aus = sorted({*drawn, *(au for chosen in best.values() for au in chosen)})
    pairs = _held_out(bench, params["n"])
    changes = {f"{g:g}": {name: [] for name in MEASURES} for g in strengths}  # an entry per AU: (held-out pairs,)
    for au in tqdm(aus, desc=f"{bench.task.name}, {site}", unit=" AUs", disable=not progress):
        for g in strengths:
            up, down = (_log_odds(bench, pairs, _plan(site, (layers, width), au, signed)) for signed in (g, -g))
            for name, of in MEASURES.items():
                changes[f"{g:g}"][name].append((of(up) - of(down)) / 2)
    result = {
        "task": bench.task_spec.label,
        "site": site,
        "aus_of_site": layers * width,
        "pairs": len(pairs),
        "layers": [au // width for au in aus],
        "dims": [au % width for au in aus],
        "best": {name: [aus.index(au) for au in chosen] for name, chosen in best.items()},  # places in these lists
        "drawn": [aus.index(au) for au in drawn],
        "scores": {name: score[aus].tolist() for name, score in scores.items()},
        "changes": {},
        "agreement": {},
    }
    for g, by_measure in changes.items():
        per_pair = {name: torch.stack(rows).numpy() for name, rows in by_measure.items()}
        result["changes"][g] = {name: values.mean(1).tolist() for name, values in per_pair.items()}
        result["agreement"][g] = {
            name: {
                "halves": list(spearman(values[:, ::2].mean(1), values[:, 1::2].mean(1))),
                "scores": {score: _agreement(result, g, name, score) for score in SCORES},
            }
            for name, values in per_pair.items()
        }
    return result


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    n_aus = len(SCORES) * params["top"] + params["random"]
    n_ranked = sum(n_ranking_prompts(momentum, n_pairs) for momentum in MOMENTA)
    return n_ranked + n_aus * len(params["strengths"]) * 2 * min(params["n"], n_validation)


def _scores(bench: Bench, site: str, progress: bool) -> dict[str, np.ndarray]:
    """Return the four scores of every AU of the site, signed: each says whether to raise or to lower the AU."""
    activation, causal = (rank_sites(bench, momentum, [site], progress)[site] for momentum in ("activation", "causal"))
    n = causal.header["pairs"]
    scores = {
        "activation": activation.score,
        "difference": activation.stats["sum_momentum"] / n,
        "causal mean": causal.stats["sum"] / n,
        "causal t": causal.score,
    }
    return {name: score.flatten().double().numpy() for name, score in scores.items()}


def _sample(scores: dict[str, np.ndarray], params: dict) -> tuple[dict[str, list[int]], list[int]]:
    """Return the best AUs by each score, and a random draw from all."""
    best = {name: np.argsort(-abs(score), kind="stable")[: params["top"]].tolist() for name, score in scores.items()}
    n_aus = len(next(iter(scores.values())))
    draw = np.random.default_rng(params["seed"]).choice(n_aus, min(params["random"], n_aus), replace=False)
    return best, draw.tolist()


def _held_out(bench: Bench, n: int) -> list[EncodedPair]:
    pairs = held_out_pairs(bench, n)
    longest = context_length(bench.model)
    encoded = encode(pairs, bench.tokenizer, CLEAN, longest)[0] if pairs else []
    if len(encoded) < 2:
        raise AUSteerError(
            f"{bench.task.name}: at least 2 held-out pairs of different answers are needed, not {len(encoded)}"
        )
    return encoded


def _plan(site: str, shape: tuple[int, int], au: int, g: float) -> Plan:
    scale = torch.zeros(shape)
    scale.view(-1)[au] = g
    return Plan({site: scale})


@torch.inference_mode()
def _log_odds(bench: Bench, pairs: Sequence[EncodedPair], plan: Plan) -> Tensor:
    """Return M of every pair under the plan, (pairs,) float64, always in the same order."""
    with steer(bench.model, plan):
        batches = pair_batches(pairs, bench.model.device, BATCH)
        return torch.cat([PairTexts(bench.model, batch, logits=True).log_odds() for batch in batches]).double().cpu()


def _agreement(result: dict, g: str, measure: str, score: str) -> dict:
    """Compare one score with the measured change: in order, in size, in direction."""
    predicted, change = np.array(result["scores"][score]), np.array(result["changes"][g][measure])
    same_way, drawn, best = np.sign(predicted) == np.sign(change), result["drawn"], result["best"][score]
    return {
        "signed": list(spearman(predicted, change)),
        "sizes": list(spearman(abs(predicted), abs(change))),
        "drawn": list(spearman(predicted[drawn], change[drawn])),
        "same_way": int(same_way.sum()),
        "same_way_of_best": int(same_way[best].sum()),
    }


def draw(result: dict, params: dict, path: Path, printed: object) -> None:
    """Draw the change at the first strength against each score: a column per score, a row per measure."""
    g, n = next(iter(result["changes"])), len(result["dims"])
    figure, axes = picture.subplots(len(SCORES), (16, 10.4), rows=len(MEASURES))
    drawn = np.isin(np.arange(n), result["drawn"])
    for measure, row in zip(MEASURES, axes, strict=True):
        change = np.array(result["changes"][g][measure])
        for score, axis in zip(SCORES, row, strict=True):
            x, best = np.array(result["scores"][score]), result["best"][score]
            axis.axhline(0, color=picture.GREY, lw=0.8)
            axis.axvline(0, color=picture.GREY, lw=0.8)
            axis.scatter(x[~drawn], change[~drawn], 26, color=picture.SKY, label="among the best by some score")
            axis.scatter(x[drawn], change[drawn], 26, color=picture.BLUE, label="drawn at random")
            ring = {"facecolors": "none", "edgecolors": picture.VERMILLION, "linewidths": 1.2}
            axis.scatter(x[best], change[best], 60, label=f"the {len(best)} best by this score", **ring)
            axis.set_yscale("symlog", linthresh=_linear(change), linscale=2)
            axis.set_title("\n".join([SCORES[score], *facts(result, g, measure, score)]), fontsize=12)
            axis.set_xlabel("score")
            axis.grid(alpha=0.25)
        row[0].set_ylabel(f"change of {measure} in nats, g = {g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    site = picture.SITES.get(result["site"], result["site"])
    figure.suptitle(
        f"{result['task']}, {site}: {n} of {result['aus_of_site']} AUs, each steered alone on {result['pairs']} held-out pairs",
        fontsize=15,
    )
    picture.save(figure, path)


def _linear(change: np.ndarray) -> float:
    """Return where the axis turns from linear to logarithmic: a few AUs have far larger effects than all others."""
    return max(float(np.median(abs(change))), float(abs(change).max()) / 100) or 1.0


def facts(result: dict, g: str, measure: str, score: str) -> list[str]:
    """Say how well a score predicts a measure: in order, in size, in direction."""
    found, n = result["agreement"][g][measure]["scores"][score], len(result["dims"])
    low, high = wilson(found["same_way"], n)
    return [
        f"ρ {_interval(found['signed'])}",
        f"ρ of sizes {_interval(found['sizes'])}",
        f"direction {100 * found['same_way'] / n:.0f} % [{100 * low:.0f}, {100 * high:.0f}]; "
        f"best {found['same_way_of_best']} of {len(result['best'][score])}",
    ]


def note(result: dict, params: dict) -> str:
    """Count for each score the intervals of ρ on either side of 0, and say how much of the change is noise."""
    agreement = result["agreement"]
    first, *others = agreement
    cases = [(first, "signed"), (first, "drawn"), *((g, "signed") for g in others)]
    sentences = []
    for measure in MEASURES:
        counts = []
        for score, label in SCORES.items():
            intervals = [agreement[g][measure]["scores"][score][which][1:] for g, which in cases]
            above, below = sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)
            counts.append(f"{label} {above}" + (f" (and {below} below 0)" if below else ""))
        sentences.append(f"Intervals of ρ with {measure} that lie above 0, of {len(cases)}: {', '.join(counts)}.")
    names = [f"all AUs at g = {first}", f"the {len(result['drawn'])} drawn at random alone"]
    names += [f"all AUs at g = {g}" for g in others]
    halves = ", ".join(f"{found['halves'][0]:+.2f} for {measure}" for measure, found in agreement[first].items())
    sentences += [
        f"The {len(cases)} intervals are those of {', '.join(names)}.",
        f"The changes on two halves of the held-out pairs correlate with ρ {halves}.",
    ]
    return " ".join(sentences)


def _interval(rho: Sequence[float]) -> str:
    value, low, high = rho
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
