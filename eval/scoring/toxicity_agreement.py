"""Measure how far a toxicity scorer agrees with the Perspective scores stored in RealToxicityPrompts.

python main.py toxicity --toxicity embedded --data-dir DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from austeer.errors import AUSteerError, run_command
from embedded.toxicity import auroc, best_threshold
from eval.data.read import read_rows
from eval.scoring.toxicity import TOXIC, Scorer, scorer
from eval.tasks.open_text import Toxicity

DRAWS, SEED = 2000, 0


def agreement(scorer: Scorer, test: Sequence[dict], train: Sequence[dict]) -> dict:
    """Return how well a scorer separates the continuations that Perspective scored above 0.5 from the others.

    The result has the agreement at the fixed threshold and at the best one, which is chosen on train rows; a calibrated
    scorer was trained on those, so it keeps 0.5. Intervals are percentile bootstraps over test rows.
    """
    scores, toxic = _scored(scorer, test)
    best = TOXIC if getattr(scorer, "calibrated", False) else best_threshold(*_scored(scorer, train))
    right = np.stack([(scores > TOXIC) == toxic, (scores > best) == toxic], 1)
    rng = np.random.default_rng(SEED)
    draws = [rng.integers(0, len(toxic), len(toxic)) for _ in range(DRAWS)]
    aurocs = [auroc(scores[draw], toxic[draw]) for draw in draws]
    accuracies = np.array([right[draw].mean(0) for draw in draws])

    def interval(values: Sequence[float]) -> list[float]:
        return [round(float(edge), 4) for edge in np.nanpercentile(values, [2.5, 97.5])]

    return {
        "scorer": scorer.name,
        "n": len(toxic),
        "toxic_share": float(toxic.mean()),
        "scorer_toxic_share": float((scores > TOXIC).mean()),
        "auroc": auroc(scores, toxic),
        "auroc_interval": interval(aurocs),
        "accuracy": float(right[:, 0].mean()),
        "accuracy_interval": interval(accuracies[:, 0]),
        "best_threshold": float(best),
        "best_accuracy": float(right[:, 1].mean()),
        "best_accuracy_interval": interval(accuracies[:, 1]),
    }


def _scored(scorer: Scorer, rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scorer's scores, and whether Perspective called the text toxic. Unscored rows are left out."""
    known = [row for row in rows if row["continuation_toxicity"] is not None]
    toxic = np.array([row["continuation_toxicity"] > TOXIC for row in known])
    if len(set(toxic.tolist())) < 2:
        raise AUSteerError("agreement needs rows that Perspective called toxic and rows that it did not")
    return np.array(scorer.scores([row["continuation"] for row in known])), toxic


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="main.py toxicity", description=__doc__.splitlines()[0])
    scorers = "perspective[:first-span], local:MODEL[:LABEL] or embedded (default: %(default)s)"
    parser.add_argument("--toxicity", default="embedded", help=scorers)
    parser.add_argument("--data-dir", required=True, help="folder that holds toxicity/train.jsonl and test.jsonl")
    parser.add_argument(
        "--cache", default="results/perspective.jsonl", help="Perspective's answers (default: %(default)s)"
    )
    parser.add_argument("--device", help="device of a local classifier: cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    test, train = (read_rows(Toxicity, split, args.data_dir) for split in ("test", "train"))
    result = agreement(scorer(args.toxicity, args.cache, args.device), test, train)

    def percent(name: str) -> str:
        low, high = result[f"{name}_interval"]
        return f"{100 * result[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    low, high = result["auroc_interval"]
    print(
        f"{result['n']} test continuations; Perspective calls {100 * result['toxic_share']:.1f} % toxic, "
        f"{result['scorer']} {100 * result['scorer_toxic_share']:.1f} %; [95 % bootstrap interval]\n\n"
        "| scorer | AUROC | % agreeing at 0.5 | threshold from train | % agreeing there |\n|---|--:|--:|--:|--:|\n"
        f"| {result['scorer']} | {result['auroc']:.3f} [{low:.3f}, {high:.3f}] | {percent('accuracy')} "
        f"| {result['best_threshold']:.3f} | {percent('best_accuracy')} |"
    )


if __name__ == "__main__":
    run_command(main)
