"""Gains taken apart into skill, bias and format: on made-up answers whose parts are known."""

import math
import random

import pytest
from scipy.stats import mannwhitneyu

from eval.decomposition import (
    PARTS,
    Readings,
    auc,
    cross_fitted,
    fitted_offset,
    is_right,
    likelihood_taken_apart,
    taken_apart,
)

N = 400
FIRST = [number % 3 > 0 for number in range(N)]  # the first option is right in two of three items


def knowing(noise: float, offset: float = 0.0, seed: int = 0) -> list[float]:
    """Log-odds that know the answer up to noise, and prefer the first option by a constant."""
    draw = random.Random(seed)
    return [(1 if first else -1) + offset + draw.gauss(0, noise) for first in FIRST]


def readings(log_odds: list[float], spoken: float = 1.0, seed: int = 1) -> Readings:
    """An answer is the likelier option in a share of the items, and something else in the others."""
    draw = random.Random(seed)
    likelier = is_right(log_odds, FIRST, 0.0)
    exact = [right and draw.random() < spoken for right in likelier]
    return Readings(exact, likelier, is_right(log_odds, FIRST, fitted_offset(log_odds, FIRST)))


def gains(before: Readings, after: Readings) -> dict[str, float]:
    parts = taken_apart(before, after)
    assert [part.name for part in parts] == list(PARTS)
    exact = 100 * (sum(after.exact) - sum(before.exact)) / N
    assert sum(part.gain for part in parts) == pytest.approx(exact), "the parts add up"
    assert all(part.low <= part.gain <= part.high for part in parts)
    return {part.name: part.gain for part in parts}


def test_a_constant_answer_is_bias():
    """A model that knows nothing and learns to say the option that is right more often."""
    nothing = knowing(1e6)
    always = [1e9 + value for value in nothing]
    found = gains(readings(nothing), readings(always))
    exact = 100 * sum(FIRST) / N
    assert found["bias"] > 10 and abs(found["format"]) < 1e-9
    assert abs(found["skill"]) < 4 and sum(found.values()) == pytest.approx(
        exact - 100 * sum(is_right(nothing, FIRST, 0)) / N
    )


def test_answers_that_become_options_are_format():
    same = knowing(1.0)
    found = gains(readings(same, 0.2), readings(same, 1.0))
    assert found["skill"] == found["bias"] == 0 and found["format"] > 50


def test_knowing_more_is_skill():
    found = gains(readings(knowing(2.0)), readings(knowing(0.7)))
    assert found["skill"] > 20 > 8 > abs(found["bias"]) and found["format"] == 0
    (skill, bias, _) = taken_apart(readings(knowing(2.0)), readings(knowing(0.7)))
    assert skill.p < 1e-6 and skill.low > 0 and bias.p is None


def test_a_preference_that_goes_away_is_bias():
    """The log-odds know as much as before, but no longer lean to one side."""
    found = gains(readings(knowing(0.3, offset=1.5)), readings(knowing(0.3)))
    assert found["bias"] > 20 and abs(found["skill"]) < 1.5


def test_the_offset_is_the_best_one_and_the_nearest_to_nothing():
    log_odds = knowing(1.0, offset=2.0)
    offset = fitted_offset(log_odds, FIRST)
    right = sum(is_right(log_odds, FIRST, offset))
    for other in [step / 100 for step in range(-600, 600)]:
        others = sum(is_right(log_odds, FIRST, other))
        assert others < right or (others == right and abs(other) >= abs(offset) - 0.01)
    assert fitted_offset([3.0, -3.0], [True, False]) == 0.0, "what is right already needs no constant"
    assert fitted_offset([5.0, 5.0], [False, False]) > 5.0 and fitted_offset([-5.0], [True]) < -5.0


def test_where_nothing_else_is_there_the_offset_is_that_of_other_folds():
    log_odds = knowing(0.5, offset=1.5)
    for fold in range(5):
        rest = [i for i in range(N) if i % 5 != fold]
        offset = fitted_offset([log_odds[i] for i in rest], [FIRST[i] for i in rest])
        held = [i for i in range(N) if i % 5 == fold]
        expected = is_right([log_odds[i] for i in held], [FIRST[i] for i in held], offset)
        assert [cross_fitted(log_odds, FIRST)[i] for i in held] == expected
    noise = knowing(1e6)
    assert sum(cross_fitted(noise, FIRST)) <= sum(is_right(noise, FIRST, fitted_offset(noise, FIRST)))


def test_auc_is_that_of_mann_and_whitney():
    log_odds = [round(value, 1) for value in knowing(2.0)]  # with ties
    ours = auc(log_odds, FIRST)
    right = [value for value, first in zip(log_odds, FIRST, strict=True) if first]
    wrong = [value for value, first in zip(log_odds, FIRST, strict=True) if not first]
    assert ours == pytest.approx(mannwhitneyu(right, wrong).statistic / len(right) / len(wrong))
    assert ours == auc([value + 7 for value in log_odds], FIRST), "a constant changes nothing"
    assert auc([1.0, 2.0], [True, True]) is None, "only one option is ever right"


def test_a_likelihood_gains_by_skill_or_by_calibration():
    """Halving all log-odds is calibration alone; knowing more is skill, at any scale."""
    draw = random.Random(0)
    before = [6 * (1 + draw.gauss(0, 2)) for _ in range(N)]
    skill, calibration = likelihood_taken_apart(before, [[value / 4 for value in before]])
    assert abs(skill.gain) < 1e-4 and calibration.gain > 0.5 and calibration.low > 0

    def likelihood(values, tau=1.0):
        return sum(-math.log1p(math.exp(-value / tau)) for value in values) / N

    more = [value + 4 for value in before]
    skill, calibration = likelihood_taken_apart(before, [more])
    best = [max(likelihood(values, step / 10) for step in range(5, 400)) for values in (before, more)]
    assert skill.gain == pytest.approx(best[1] - best[0], abs=1e-3) and skill.low > 0 and skill.p < 0.01
    assert skill.gain + calibration.gain == pytest.approx(likelihood(more) - likelihood(before))
    both, _ = likelihood_taken_apart(before, [more, before])
    assert both.gain == pytest.approx(skill.gain / 2), "the mean of two draws"
