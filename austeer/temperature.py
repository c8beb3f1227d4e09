"""The temperature of the objective: how many nats of log-odds count as one.

The objective of causal momentum is the mean over pairs of log sigmoid((M - offset) / tau), where M is the log-odds of the
right answer over the wrong one. Real models have log-odds of many nats. At tau = 1 the objective then sees only pairs that
are wrong by much, and it can be raised by shrinking M instead of by getting more pairs right. So tau is fitted to the
pairs first, by maximum likelihood.

The offset removes what a model thinks of an answer whatever the question. It is b(right answer) - b(wrong answer), with one
b per answer text, and all b sum to zero. It is fitted only where every answer text occurs as right and as wrong: an answer
that is always right would get an offset of minus infinity. And it is fitted only where there are many pairs per answer, as
of "yes" and "no". COPA's mirrored pairs would get an offset for every two pairs, which leaves hardly anything to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from austeer.errors import AUSteerError
from austeer.pairs import Pair

FITTED = "fitted"
BOUNDS = (0.1, 100.0)  # of a fitted tau, in nats
PAIRS_PER_ANSWER = 5  # the fewest that offsets are fitted to


@dataclass(frozen=True)
class Temperature:
    """Hold tau and the offset b of each answer text (none where answers are not shared by pairs)."""

    tau: float
    answers: dict[str, float] = field(default_factory=dict)
    how: str = FITTED  # or "given", or which bound the fit ended at

    def standardised(self, log_odds: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """Return (M - offset) / tau of every pair, float64."""
        return (log_odds.double() - offsets(self.answers, pairs).to(log_odds.device)) / self.tau

    def objective(self, log_odds: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """Return log sigmoid((M - offset) / tau) of every pair: its mean is the objective."""
        return logsigmoid(self.standardised(log_odds, pairs))

    def slope(self, log_odds: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """Return the derivative of every pair's objective with respect to M."""
        return torch.sigmoid(-self.standardised(log_odds, pairs)) / self.tau

    def header(self) -> dict:
        """Return what the header of ranks says of the objective."""
        return {"tau": self.tau, "tau_by": self.how, "offsets": self.answers}

    @classmethod
    def of_header(cls, header: dict) -> Temperature:
        """Read it back. Ranks that were made before temperatures were fitted have a tau of 1."""
        return cls(header.get("tau", 1.0), header.get("offsets", {}), header.get("tau_by", "given"))


def temperature_of(wanted: str | float, log_odds: Tensor, pairs: Sequence[Pair]) -> Temperature:
    """Return the temperature that is wanted: `fitted`, or a number of nats without offsets."""
    if wanted == FITTED:
        return fit(log_odds, pairs)
    if isinstance(wanted, str | bool) or not 0 < wanted < float("inf"):
        raise AUSteerError(f"the temperature must be {FITTED!r} or a positive number, not {wanted!r}")
    return Temperature(float(wanted), how="given")


def offsets(answers: dict[str, float], pairs: Sequence[Pair]) -> Tensor:
    """Return b(right) - b(wrong) of every pair, float64."""
    return torch.tensor([answers.get(p.positive, 0.0) - answers.get(p.negative, 0.0) for p in pairs]).double()


def shared_answers(pairs: Sequence[Pair]) -> list[str]:
    """Return the answer texts, sorted, if they are few and each occurs as right and as wrong; otherwise none."""
    right, wrong = ({pair[column] for pair in pairs} for column in (1, 2))
    return sorted(right) if right == wrong and len(right) * PAIRS_PER_ANSWER <= len(pairs) else []


def fit(log_odds: Tensor, pairs: Sequence[Pair]) -> Temperature:
    """Maximise the mean of log sigmoid((M - offset) / tau): a logistic regression without an intercept, by Newton's method."""
    texts = shared_answers(pairs)
    index = {text: number for number, text in enumerate(texts)}
    # columns: M, whose coefficient is 1 / tau, and an answer each, whose coefficient is -b / tau; the first answer's b
    # is 0 here, and the mean is taken out at the end
    features = torch.zeros(len(pairs), max(1, len(texts)), dtype=torch.float64)
    scale = float(log_odds.double().square().mean().sqrt()) or 1.0
    features[:, 0] = log_odds.double().cpu() / scale
    for row, pair in enumerate(pairs if texts else ()):
        for text, sign in ((pair.positive, 1.0), (pair.negative, -1.0)):
            if index[text]:
                features[row, index[text]] += sign
    lowest, highest = scale / BOUNDS[1], scale / BOUNDS[0]
    coefficients = _newton(features, lowest, highest)
    inverse = min(max(float(coefficients[0]), lowest), highest)
    reached = {lowest: f"the bound of {BOUNDS[1]:g}", highest: f"the bound of {BOUNDS[0]:g}"}.get(inverse, FITTED)
    tau = scale / inverse
    values = torch.cat([torch.zeros(1, dtype=torch.float64), -coefficients[1:] * tau])
    values -= values.mean()
    # rounded, so that another order of the same pairs, whose last digits differ, gives the same temperature
    by_text = {text: round(value, 4) for text, value in zip(texts, values.tolist(), strict=True)} if texts else {}
    return Temperature(float(f"{tau:.5g}"), by_text, reached)


def _newton(features: Tensor, lowest: float, highest: float) -> Tensor:
    """Return the coefficients of most likelihood, the first of them within its bounds."""
    coefficients = torch.zeros(features.shape[1], dtype=torch.float64)
    coefficients[0] = min(max(1.0, lowest), highest)
    ridge = 1e-9 * len(features) * torch.eye(features.shape[1], dtype=torch.float64)  # for answers that never differ
    ridge[0, 0] = 1e-200  # of 1 / tau next to nothing: pairs that are all right send it to its bound

    def likelihood(at: Tensor) -> float:
        return float(logsigmoid(features @ at).sum() - at @ ridge @ at / 2)

    for _ in range(200):
        probability = torch.sigmoid(-(features @ coefficients))
        gradient = features.T @ probability - ridge @ coefficients
        curvature = features.T @ (features * (probability * (1 - probability))[:, None]) + ridge
        step = torch.linalg.solve(curvature, gradient)
        before, size = likelihood(coefficients), 1.0
        while size > 1e-6:
            moved = coefficients + size * step
            moved[0] = moved[0].clamp(lowest, highest)
            if likelihood(moved) > before:
                break
            size /= 2
        if size <= 1e-6 or float((moved - coefficients).abs().max()) < 1e-10:
            break
        coefficients = moved
    # pairs that are all right are likelier the larger 1 / tau is, and Newton's steps towards that bound are small
    at_bound = coefficients * (highest / coefficients[0])
    return at_bound if likelihood(at_bound) > likelihood(coefficients) else coefficients
