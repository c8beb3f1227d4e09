"""Searches on validation: what they choose, what they cost, and plans in one batch against plans one at a time."""

import numpy as np
import pytest
import torch
from one_cell import computed

from austeer.methods.base import BUDGET
from austeer.methods.registry import METHODS
from austeer.plan import TOKENS, Plan
from austeer.steering import steer
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer
from eval.statistics import wilson
from experiments.records import unpack
from experiments.search import SEARCHES, full_grid, key_of, racing, sample, shuffled, worse
from paper import specs
from rmodels import gates

FINE = METHODS["published"].grid("full")
GRID = [{"k": k, "alpha": alpha} for k in (4, 16, 32) for alpha in (0.5, 1.0, 2.0, 4.0, 8.0)]
CASES = {  # chances of being right: of vanilla, and of every grid point; real methods have such regions
    "one good region": (0.6, [0.61, 0.62, 0.66, 0.74, 0.70, 0.62, 0.65, 0.76, 0.80, 0.45, 0.63, 0.70, 0.72, 0.5, 0.3]),
    "good at the end": (0.6, [0.6] * 12 + [0.62, 0.68, 0.75]),
    "no difference": (0.6, [0.6] * 15),
    "all harmful": (0.8, [0.79, 0.75, 0.7, 0.6, 0.5, 0.78, 0.7, 0.6, 0.5, 0.4, 0.7, 0.6, 0.5, 0.4, 0.2]),
}


def simulated(case: str, n: int, seed: int) -> tuple[list[float], dict[str, list[float]]]:
    """Simulate items that are easy or hard for all grid points alike, so that two points are right on much the same ones."""
    vanilla, chances = CASES[case]
    rng = np.random.default_rng(seed)
    hard, noise = rng.normal(size=n), rng.normal(size=(16, n))
    correlated = np.sqrt(0.8) * hard + np.sqrt(0.2) * noise
    limits = np.quantile(np.random.default_rng(1).normal(size=20000), [vanilla, *chances])
    outcomes = (correlated < limits[:, None]).tolist()
    return outcomes[0], {key_of(points): values for points, values in zip(GRID, outcomes[1:], strict=True)}


def ask_from(outcomes, log=None):
    def ask(subset, start, stop):
        if log is not None:
            log.extend((key_of(points), start, stop) for points in subset)
        return [outcomes[key_of(points)][start:stop] for points in subset]

    return ask


INSIDE = {"one good region": 56, "good at the end": 55, "no difference": 59, "all harmful": 59}  # of 60


@pytest.mark.parametrize("case", CASES)
def test_a_raced_setting_tests_inside_the_full_grids_interval_at_a_quarter_of_the_cost(case):
    """Test on 500 items, in 60 runs. A choice outside the interval is below it: a race can choose worse."""
    inside, above = 0, 0
    for seed in range(60):
        vanilla, outcomes = simulated(case, 200, seed)
        full, raced = (search(ask_from(outcomes), vanilla, GRID) for search in (full_grid, racing))
        assert full.n_evaluated == 3000 and raced.n_evaluated <= 750
        untouched, steered = simulated(case, 500, 1000 + seed)
        tested = [sum(steered[key_of(one.chosen)] if one.chosen else untouched) for one in (full, raced)]
        low, high = wilson(tested[0], 500)
        inside += low <= tested[1] / 500 <= high
        above += tested[1] / 500 > high
    assert inside >= INSIDE[case] and above == 0


@pytest.mark.parametrize("n", [1, 10, 57, 80, 140, 400])
@pytest.mark.parametrize("points", [1, 2, 7, 15, 21, 36, 120])
def test_a_race_costs_a_quarter_of_the_coarse_points_or_twenty_items_each(n, points):
    rng = np.random.default_rng(n)
    grid = FINE[:points]
    outcomes = {key_of(one): (rng.random(n) < 0.7).tolist() for one in grid}
    log = []
    result = racing(ask_from(outcomes, log), (rng.random(n) < 0.3).tolist(), grid)
    coarse = min(points, BUDGET["full"])
    assert result.n_evaluated == sum(stop - start for _, start, stop in log)
    assert result.n_evaluated <= max(coarse * n / 4, coarse * min(20, n))
    asked = {key: max(stop for one, _, stop in log if one == key) for key, *_ in log}
    assert min(asked.values()) >= min(20, n)  # nothing drops out before
    assert result.n_evaluated == sum(map(len, result.outcomes.values())) and result.n == n
    assert all(values == outcomes[key][: len(values)] for key, values in result.outcomes.items())


def peaked(k: float, alpha: float, n: int) -> dict[str, list[float]]:
    """Return outcomes of a task on which one grid point is best, and every other the worse the further it is away."""
    ks, alphas = (sorted({point[key] for point in FINE}) for key in ("k", "alpha"))
    away = {
        key_of(point): abs(ks.index(point["k"]) - ks.index(k)) + abs(alphas.index(point["alpha"]) - alphas.index(alpha))
        for point in FINE
    }
    return {key: [item % 20 >= distance for item in range(n)] for key, distance in away.items()}


@pytest.mark.parametrize("n", [140, 400])  # SVAMP has the fewest validation items of the paper's tasks, 140
def test_a_race_reaches_all_settings_that_the_paper_prints(n):
    alphas, ks = (spec.printed for spec in specs.read("paper", ["table8", "table9"]))
    settings = [(k, alphas[model]["austeer"][task]) for model in ks for task, k in ks[model]["austeer"].items()]
    assert len(settings) == 21
    for k, alpha in settings:
        result = racing(ask_from(peaked(k, alpha, n)), [False] * n, FINE)
        assert result.chosen == {"k": k, "alpha": alpha} and result.n_evaluated <= 21 * n / 4


@pytest.mark.slow
@pytest.mark.slow
def test_on_an_embedded_model_a_race_over_a_fine_grid_chooses_as_well_as_the_whole_grid(tmp_path, capsys):
    """Print the validation scores of both choices. benchmarks/search.py does so at more places, and tests the choices."""
    flat = {"task": "svamp", "method": "published", "site": "attention", "limit": 100}
    flat |= {
        "ks": tuple({point["k"]: 0 for point in FINE})[::2],
        "alphas": tuple({point["alpha"]: 0 for point in FINE}),
    }
    full, raced = (computed(tmp_path, **flat, search=kind) for kind in ("grid", "racing"))
    of_full, of_raced = (full["grid_outcomes"][record["chosen"]] for record in (full, raced))  # on all items
    with capsys.disabled():
        print(
            f"\nvalidation items right, of 100: vanilla {sum(unpack(full['grid_vanilla']))}, grid {sum(unpack(of_full))} in "
            f"{full['asked']} item-runs, racing {sum(unpack(of_raced))} in {raced['asked']}"
        )
    assert not worse(unpack(of_raced), unpack(of_full))
    assert sum(unpack(of_raced)) > sum(unpack(full["grid_vanilla"])) and raced["asked"] * 10 < full["asked"]


def test_a_clear_winner_ends_the_race_early():
    vanilla, best = [False] * 200, key_of(GRID[9])
    outcomes = {key_of(one): [key_of(one) == best] * 200 for one in GRID}
    result = racing(ask_from(outcomes), vanilla, GRID)
    assert result.chosen == GRID[9] and result.n_evaluated <= 300
    # where all are clearly worse than vanilla, the race ends at once without a choice
    result = racing(ask_from({key: [False] * 200 for key in outcomes}), [True] * 200, GRID)
    assert result.chosen is None and result.n_evaluated <= 300  # twenty items each


@pytest.mark.parametrize("search", SEARCHES.values())
def test_ties_and_nothing_better(search):
    same = {key_of(one): [True, False] * 50 for one in GRID}
    assert search(ask_from(same), [True, False] * 50, GRID).chosen is None
    two = GRID[:2]
    assert search(ask_from({key_of(one): [True] * 100 for one in two}), [False] * 100, two).chosen == GRID[0]


def test_the_sample_is_the_first_hundred():
    vanilla, outcomes = simulated("one good region", 200, 0)
    result = sample(ask_from(outcomes), vanilla, GRID)
    assert result.n_evaluated == 1500 and all(values == outcomes[key][:100] for key, values in result.outcomes.items())
    assert result == full_grid(ask_from(outcomes), vanilla[:100], GRID)


def test_the_order_of_items_is_fixed():
    assert sorted(shuffled(50)) == list(range(50)) and shuffled(50) == shuffled(50) != list(range(50))


def test_worse_is_the_exact_sign_test():
    assert worse([False] * 5, [True] * 5) and not worse([False] * 4, [True] * 4)  # 1/32, 1/16
    assert not worse([1.0] * 9, [1.0] * 9) and worse([0.1] * 9, [0.2] * 9)
    assert not worse([True] * 5, [False] * 5)


@pytest.mark.parametrize("site", ["attention", "ffn"])
@pytest.mark.parametrize("new_tokens", [1, 12])
@pytest.mark.parametrize("tokens", TOKENS)
def test_plans_in_one_batch_answer_as_one_at_a_time(llama, tokenizer, site, new_tokens, tokens):
    shape = (3, next(gates(llama, site)).width)
    generator = torch.Generator().manual_seed(5)
    plans = [
        Plan({site: torch.randn(shape, generator=generator) * size}, tokens=tokens) for size in (0.0, 0.5, 1.0, 3.0)
    ]
    plans.append(Plan({}, {site: torch.randn(shape, generator=generator)}, tokens=tokens))
    prompts = [f"Say: {text}" for text in ("one cat", "dogs ran", "3 + 4 =", "it is", "a very long way north of here")]
    question = Generation(new_tokens, stop="[a-e]")  # answers end at different times, and rows leave
    alone = []
    for plan in plans:
        with steer(llama, plan):
            alone.append([answer.text for answer in LiveAnswerer(llama, tokenizer).answer(prompts, question)])
    plans_of_rows = [plan for plan in plans for _ in prompts]
    answers = LiveAnswerer(llama, tokenizer, plans_of_rows).answer(prompts * len(plans), question)
    together = [answer.text for answer in answers]
    assert together == [text for row in alone for text in row]
    assert new_tokens == 1 or len({tuple(row) for row in alone}) > 2  # the plans tell answers apart
