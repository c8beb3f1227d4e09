"""The paper's general recipe for contrastive pairs (appendix B.1; Table 5): the wrong answer is the most similar other one."""

from __future__ import annotations

from collections.abc import Sequence

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from eval.data.similar import Similarity


def general_pairs(pairs: Sequence[Pair], encoder: str | None) -> tuple[list[Pair], str]:
    """Of pairs their prompts and right answers, with wrong answers out of the pool of right ones; and how. Where one
    answer is right for all, as a refusal is in detoxification, the task's wrong ones are in the pool, too."""
    similarity, pool, how = Similarity(encoder), [pair.positive for pair in pairs], "the most similar other answer"
    if len(set(map(_words, pool))) == 1:
        pool, how = pool + [pair.negative for pair in pairs], f"{how}, right ones being one"
    wrong = different(similarity, pool)[: len(pairs)]
    found = [Pair(pair.prompt, pair.positive, pool[other])
             for pair, other in zip(pairs, wrong, strict=True) if other is not None]  # fmt: skip
    if not found:
        raise AUSteerError("all answers are the same: the general recipe finds no wrong one in the pool")
    return found, f"{how}, by {similarity.name}"


def different(similarity: Similarity, answers: Sequence[str]) -> list[int | None]:
    """Of each answer the most similar one in other words; white space and case are no words."""
    codes: dict[str, int] = {}
    same = [codes.setdefault(_words(text), len(codes)) for text in answers]
    return similarity.nearest_different(answers, same, 0.0)


def _words(text: str) -> str:
    return " ".join(text.lower().split())
