"""The temperature of the objective, against a search over a fine grid and against plain loops."""

import math

import pytest
import torch

from austeer.errors import AUSteerError
from austeer.pairs import Pair
from austeer.temperature import Temperature, fit, shared_answers, temperature_of

OWN_ANSWERS = [Pair("p", f"right {i}", f"wrong {i}") for i in range(300)]
YES_NO = [Pair(f"q{i}", *(("yes", "no") if i % 3 else ("no", "yes"))) for i in range(300)]


def log_odds(seed: int, mean: float, spread: float) -> torch.Tensor:
    return mean + spread * torch.randn(300, generator=torch.Generator().manual_seed(seed))


def likelihood(values, tau: float, shifts) -> float:
    return sum(-math.log1p(math.exp(-(m - o) / tau)) for m, o in zip(values.tolist(), shifts, strict=True)) / len(
        values
    )


def test_tau_is_the_most_likely_one():
    values = log_odds(0, 2.0, 6.0)
    grid = [0.1 * 1000 ** (i / 3000) for i in range(3001)]
    best = max(grid, key=lambda tau: likelihood(values, tau, [0.0] * 300))
    found = fit(values, OWN_ANSWERS)
    assert found.tau == pytest.approx(best, rel=3e-3) and not found.answers and found.how == "fitted"


def test_shared_answers_get_offsets_that_no_other_offset_beats():
    values = log_odds(1, 1.0, 3.0) + torch.tensor([4.0 if pair.positive == "yes" else -4.0 for pair in YES_NO])
    found = fit(values, YES_NO)
    assert sum(found.answers.values()) == pytest.approx(0, abs=1e-3) and found.answers["yes"] > 0.1

    def at(tau, yes):
        return likelihood(values, tau, [2 * yes if pair.positive == "yes" else -2 * yes for pair in YES_NO])

    best = at(found.tau, found.answers["yes"])
    for factor in (0.9, 1.1):
        assert at(found.tau * factor, found.answers["yes"]) < best
        assert at(found.tau, found.answers["yes"] * factor) < best
    assert float(found.objective(values, YES_NO).mean()) == pytest.approx(best, rel=1e-6)


def test_an_answer_that_is_always_right_gets_no_offset():
    assert shared_answers(YES_NO) == ["no", "yes"]
    assert shared_answers([*YES_NO, Pair("q", "maybe", "no")]) == []
    twins = [Pair(f"q{i}", *(f"{'ab'[(i + side) % 2]} {i // 2}" for side in (0, 1))) for i in range(100)]
    assert shared_answers(twins) == [], "each answer is right once and wrong once: two pairs per offset"
    assert fit(log_odds(2, 1.0, 2.0), [*YES_NO[:-1], Pair("q", "maybe", "no")]).answers == {}


@pytest.mark.parametrize(("sign", "bound"), [(1.0, 0.1), (-1.0, 100.0)])
def test_a_reached_bound_is_said(sign, bound):
    found = fit(sign * (30 + torch.rand(300, generator=torch.Generator().manual_seed(3))), OWN_ANSWERS)
    assert found.tau == bound and found.how == f"the bound of {bound:g}"


def test_slope_is_the_derivative_of_the_objective():
    values = log_odds(4, 0.5, 3.0).double().requires_grad_()
    found = fit(values.detach(), YES_NO)
    (slope,) = torch.autograd.grad(found.objective(values, YES_NO).sum(), values)
    torch.testing.assert_close(found.slope(values.detach(), YES_NO), slope)


def test_a_header_gives_the_temperature_back():
    found = fit(log_odds(5, 0.5, 3.0), YES_NO)
    assert Temperature.of_header(found.header()) == found
    assert Temperature.of_header({}).tau == 1


@pytest.mark.parametrize("wrong", ["warm", 0, -1.0, float("nan"), float("inf"), True])
def test_a_wrong_temperature_is_refused(wrong):
    with pytest.raises(AUSteerError, match="temperature must be 'fitted' or a positive number"):
        temperature_of(wrong, torch.zeros(1), OWN_ANSWERS[:1])
