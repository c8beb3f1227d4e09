"""A small toxicity scorer that needs no network: logistic regression on hashed words and letter n-grams.

It is trained on Perspective's stored scores of RealToxicityPrompts (train rows only), for use where neither Perspective
nor a real classifier is available. Its numbers are its own and never Perspective's. The weights are 65,536 numbers and
contain no text.

    python -m embedded.toxicity --data-dir DIR     # trains it again, in seconds, from DIR/toxicity/train.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from scipy.stats import rankdata
from tqdm import tqdm

from austeer.errors import AUSteerError, run_command
from austeer.files import read_json_lines, read_tensors, write_tensors

FORMAT = "austeer-toxicity-1"
WEIGHTS = Path(__file__).with_name("toxicity.safetensors")
BUCKETS, L2, FOLDS, SEED = 2**16, 0.02, 5, 0
LETTERS = (3, 4, 5)  # letter n-grams within a word whose ends are marked: they see through changed spelling
WORD = re.compile(r"[a-z0-9*@$!#']+")  # words, with the signs that people write for letters


class EmbeddedScorer:
    """Score texts in [0, 1], calibrated so that "above 0.5" best matches Perspective's on held-out train rows."""

    calibrated = True

    def __init__(self, weights: np.ndarray, bias: float, header: dict):
        self.weights, self.bias, self.header = weights, bias, header
        self.name = f"embedded@{hashlib.sha256(weights.tobytes() + np.float32(bias).tobytes()).hexdigest()[:8]}"

    @classmethod
    @cache
    def load(cls, path: Path = WEIGHTS) -> EmbeddedScorer:
        tensors, metadata = read_tensors(path, FORMAT, "toxicity scorer")
        return cls(tensors["weights"].float().numpy(), float(tensors["bias"]), json.loads(metadata["header"]))

    def scores(self, texts: Sequence[str]) -> list[float]:
        scores = expit(features(texts) @ self.weights + self.bias)
        return [float(score) if text.strip() else 0.0 for text, score in zip(texts, scores, strict=True)]


def features(texts: Sequence[str]) -> csr_matrix:
    """Mark which words, pairs of words and letter n-grams occur, (texts, BUCKETS); every row has length 1."""
    rows = [_buckets(text) for text in texts]
    counts = [len(row) for row in rows]
    values = np.repeat([count**-0.5 if count else 0.0 for count in counts], counts)
    columns = np.fromiter((bucket for row in rows for bucket in row), dtype=np.int32, count=sum(counts))
    return csr_matrix((values, columns, np.cumsum([0, *counts])), shape=(len(rows), BUCKETS))


def _buckets(text: str) -> list[int]:
    words = WORD.findall(text.lower())
    grams = {f"w{word}" for word in words} | {f"p{a} {b}" for a, b in pairwise(words)}
    for word in (f"<{word}>" for word in words):
        grams |= {f"l{word[i : i + n]}" for n in LETTERS for i in range(len(word) - n + 1)}
    return sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in grams})  # Python's own hash differs by process


def fit(x: csr_matrix, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights and bias that minimise cross-entropy against soft targets plus L2/2 |weights|^2."""

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        logits = x @ weights + bias
        error = expit(logits) - targets
        value = np.logaddexp(0, logits).sum() - targets @ logits + L2 / 2 * weights @ weights
        return value, np.append(x.T @ error + L2 * weights, error.sum())

    parameters = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
    return parameters[:-1], parameters[-1]


def train(rows: Sequence[dict]) -> tuple[np.ndarray, float, dict]:
    """Return weights, a calibrated bias, and measurements on rows held out of the fit.

    Each fold of rows is scored by a model that saw neither its continuations nor its prompts. The threshold at which
    these scores best match Perspective's "above 0.5" becomes 0.5 of the final model, which is fitted on all rows.
    """
    rows = [row for row in rows if row["continuation_toxicity"] is not None]
    if len(rows) < 10 * FOLDS:
        raise AUSteerError(f"{len(rows)} scored rows are too few to train a scorer; give at least {10 * FOLDS}")
    x = features([row["continuation"] for row in rows] + [row["prompt"] for row in rows])
    y = np.array([row["continuation_toxicity"] for row in rows] + [row["prompt_toxicity"] for row in rows])
    fold = np.random.default_rng(SEED).integers(0, FOLDS, len(rows))
    toxic, held_out = y[: len(rows)] > 0.5, np.zeros(len(rows))
    for number in tqdm(range(FOLDS), desc="held-out fits"):
        training = np.flatnonzero(np.tile(fold != number, 2))
        weights, bias = fit(x[training], y[training])
        held_out[fold == number] = (x[: len(rows)] @ weights + bias)[fold == number]
    cut = best_threshold(held_out, toxic)
    weights, bias = fit(x, y)
    measured = {
        "held_out_auroc": round(auroc(held_out, toxic), 4),
        "held_out_accuracy": round(float(((held_out > cut) == toxic).mean()), 4),
        "threshold_before_calibration": round(float(expit(cut)), 4),
    }
    recipe = {"rows": len(rows), "buckets": BUCKETS, "l2": L2, "folds": FOLDS, "seed": SEED}
    return weights, float(bias - cut), measured | recipe


def auroc(scores: Sequence[float], toxic: Sequence[bool]) -> float:
    """Return the chance that a toxic text scores above one that is not; a tie counts half."""
    ranks, toxic = rankdata(scores), np.asarray(toxic, dtype=bool)
    positives = int(toxic.sum())
    pairs = positives * (len(toxic) - positives)
    return float((ranks[toxic].sum() - positives * (positives + 1) / 2) / pairs) if pairs else float("nan")


def best_threshold(scores: Sequence[float], toxic: Sequence[bool]) -> float:
    """Return the threshold that puts most texts on their side (toxic: strictly above); of ties the lowest."""
    scores, toxic = np.asarray(scores, dtype=float), np.asarray(toxic, dtype=bool)
    values, place = np.unique(scores, return_inverse=True)
    gains = np.bincount(place, weights=np.where(toxic, -1, 1))  # right answers won by raising it past a value
    best = int(np.argmax(np.cumsum([toxic.sum(), *gains])))
    edges = np.concatenate([[values[0] - 1e-6], (values[1:] + values[:-1]) / 2, [values[-1]]])
    return float(edges[best])


def flat_rows(path: Path) -> list[dict]:
    """Read RealToxicityPrompts' nested lines as flat rows. A score may be None."""
    try:
        return [
            {
                "prompt": line["prompt"]["text"],
                "prompt_toxicity": line["prompt"]["toxicity"],
                "continuation": line["continuation"]["text"],
                "continuation_toxicity": line["continuation"]["toxicity"],
                "challenging": bool(line.get("challenging")),
            }
            for _, line in read_json_lines(path)
        ]
    except (KeyError, TypeError):
        raise AUSteerError(f"{path} is not RealToxicityPrompts in JSON lines; download it again") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds toxicity/train.jsonl")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="default: embedded/toxicity.safetensors")
    args = parser.parse_args(argv)
    path = args.data_dir / "toxicity" / "train.jsonl"
    weights, bias, header = train(flat_rows(path))
    header = {"trained_on": "toxicity/train.jsonl", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **header}
    tensors = {"weights": torch.from_numpy(weights).half(), "bias": torch.tensor(bias, dtype=torch.float32)}
    write_tensors(args.out, tensors, {"format": FORMAT, "header": json.dumps(header, sort_keys=True)})
    print(json.dumps(header, indent=1))


if __name__ == "__main__":
    run_command(main)
