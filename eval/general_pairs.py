"""The paper's general recipe for contrastive pairs (appendix B.1; Table 5): the wrong answer is the most similar other one."""

from __future__ import annotations

from collections.abc import Sequence

from errors import AUSteerError
from eval.similar import Similarity
from pairs import Pair


def general_pairs(pairs: Sequence[Pair], encoder: str | None) -> tuple[list[Pair], str]:
    """Of pairs their prompts and right answers, with wrong answers out of the pool of right ones; and how."""
    similarity, answers = Similarity(encoder), [pair.positive for pair in pairs]
    found = [Pair(pair.prompt, pair.positive, answers[other])
             for pair, other in zip(pairs, different(similarity, answers), strict=True) if other is not None]  # fmt: skip
    if not found:
        raise AUSteerError("all right answers are the same: the general recipe finds no wrong one in the pool")
    return found, f"the most similar other answer, by {similarity.name}"


def different(similarity: Similarity, answers: Sequence[str]) -> list[int | None]:
    """Of each answer the most similar one in other words; white space and case are no words."""
    codes: dict[str, int] = {}
    same = [codes.setdefault(" ".join(text.lower().split()), len(codes)) for text in answers]
    return similarity.nearest_different(answers, same, 0.0)
