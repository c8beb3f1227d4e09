"""Figure 12: how many of the k best AUs two tasks have in common, on one model.

params: momentum, k, tasks. Every embedded task has a model of its own, so there the pairs of all tasks are ranked on the
model of the bench's task, and the picture says so.

Two random choices of k among N AUs share k / N of each on average. AUs that tie at the cut are chosen lower layer first,
so ties let all tasks choose alike: the record and the picture say how many AUs tie.

printed: the paper's shares by site, row by row as in the record, written below ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.bench import Bench
from paper.studies import picture
from paper.studies.ranks import n_ranking_prompts, rank_sites


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    k, tasks, sites = params["k"], params["tasks"], list(picture.SITES)
    by_task = [rank_sites(bench, params["momentum"], sites, progress, task) for task in tasks]
    result: dict = {
        "tasks": tasks,
        "on": f"the embedded {bench.task_spec.name} model" if bench.model_spec.embedded else None,
        "sites": {},
    }
    for site in sites:
        best = [set(ranks[site].order[:k].tolist()) for ranks in by_task]
        result["sites"][site] = {
            "shared": [[len(one & other) / k for other in best[: i + 1]] for i, one in enumerate(best)],
            "by_chance": k / by_task[0][site].score.numel(),
            "ties_at_cut": [ranks[site].ties(k) for ranks in by_task],
        }
    return result


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return len(params["tasks"]) * n_ranking_prompts(params["momentum"], n_pairs)


def draw(result: dict, params: dict, path: Path, printed: dict) -> None:
    tasks = result["tasks"]
    figure, axes = picture.subplots(2, (6.2 + 1.1 * len(tasks), 2.6 + (0.8 if printed else 0.55) * len(tasks)))
    for axis, (site, site_result) in zip(axes, result["sites"].items(), strict=True):
        values = np.full((len(tasks), len(tasks)), np.nan)
        for i, row in enumerate(site_result["shared"]):
            values[i, : len(row)] = row
        image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        texts = [[f"{x:.2f}" for x in row] for row in site_result["shared"]]
        papers = [[f"paper\n{x:.1f}" for x in row] for row in printed.get(site, [])]
        picture.write_labels(axis, values, image, picture.with_printed(texts, papers))
        axis.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(tasks)), tasks)
        axis.spines[["top", "right"]].set_visible(False)
        ties = max(site_result["ties_at_cut"])
        note = f"\nup to {ties} more AUs tie with the last chosen" if ties else ""
        axis.set_title(f"{picture.SITES[site]}; by chance {site_result['by_chance']:.2g}{note}", fontsize=13)
    figure.colorbar(image, ax=axes, label=f"share of the {params['k']} best AUs", aspect=30)
    where = f", all on {result['on']}" if result["on"] else ""
    figure.suptitle(f"Shared by two tasks: {params['momentum']} momentum{where}", fontsize=14)
    picture.save(figure, path)
