"""Ours: what the paper's strengths cost, as KL on neutral text.

params: k, alphas, sites. The published rule's plans at these strengths are measured, not searched. A strength at which the
model overflows has no KL.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from austeer.errors import Overflow
from experiments.bench import Bench
from experiments.costs import meter_of, neutral_of
from experiments.report import SITES
from paper.studies import picture
from paper.studies.ranks import n_ranking_prompts, rank_sites
from set_MFU import set_MFU

COLORS = (picture.BLUE, picture.VERMILLION, picture.GREEN)
LEVELS = (0.01, 0.1, 1.0)  # nats, drawn as lines to read the curves by


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    """Return the KL of the published rule's plan at every site and strength; None where the model overflows."""
    ranks = rank_sites(bench, "activation", params["sites"], progress)
    found: dict = {"task": bench.task_spec.label, "text": neutral_of(bench).name, "alphas": params["alphas"], "kl": {}}
    with tqdm(total=len(ranks) * len(params["alphas"]), desc="strengths", disable=not progress) as bar:
        for site in params["sites"]:
            for alpha in params["alphas"]:
                plan = set_MFU(ranks[site], k=params["k"], alpha=alpha)
                try:
                    kl = meter_of(bench, "measure")(plan)
                except Overflow:
                    kl = None
                found["kl"].setdefault(site, []).append(kl)
                bar.update()
    return found


def depends_on(bench: Bench, params: dict) -> dict:
    return {"neutral": neutral_of(bench).hash}


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return n_ranking_prompts("activation", n_pairs)


def draw(result: dict, params: dict, path: Path, printed: object) -> None:
    figure, axis = picture.subplots(size=(8.2, 5.0))
    for (site, values), color in zip(result["kl"].items(), COLORS, strict=False):
        points = [(alpha, kl) for alpha, kl in zip(result["alphas"], values, strict=True) if kl is not None]
        axis.plot(*zip(*points, strict=True), "o-", color=color, label=SITES[site])
    for level in LEVELS:
        axis.axhline(level, color=picture.GREY, lw=1, ls=":")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(result["alphas"], [f"{alpha:g}" for alpha in result["alphas"]])
    axis.xaxis.minorticks_off()
    axis.set(
        xlabel=f"strength α of AUSteer as published, k = {params['k']}",
        ylabel="KL, nats per token of neutral text",
        title=result["task"],
    )
    axis.grid(alpha=0.3)
    axis.legend()
    picture.save(figure, path)


def note(result: dict, params: dict) -> str:
    """Say what each strength costs, site by site."""
    sentences = []
    for site, values in result["kl"].items():
        costs = [
            f"{alpha:g}: {'overflow' if kl is None else f'{kl:.2g}'}"
            for alpha, kl in zip(result["alphas"], values, strict=True)
        ]
        sentences.append(f"{SITES[site]}: {', '.join(costs)}.")
    return f"KL of the unsteered to the steered model, nats per token of {result['text']}, by strength. {' '.join(sentences)}"
