"""CNA: against its formula as plain loops, with a neuron that is always on."""

import pytest
import torch
from conftest import PAIRS
from reference import last_activations
from test_rival_methods import evidence_of, upstream_of

from austeer.methods.base import BUDGET, MOST_POINTS
from austeer.methods.cna import ALWAYS, CNA, Contrast, counted, most_active


def test_the_neurons_are_those_of_plain_loops(llama, checkpoints, tokenizer):
    upstream = upstream_of(checkpoints["llama"])
    texts = [[last_activations(upstream, tokenizer, p + a, "neuron") for a in answers] for p, *answers in PAIRS]
    neurons = [(layer, dim) for layer in range(3) for dim in range(80)]
    delta = {au: sum(float(right[au] - wrong[au]) for right, wrong in texts) / len(texts) for au in neurons}
    everyone = [text for pair in texts for text in pair]
    on = dict.fromkeys(neurons, 0)
    for text in everyone:
        for au in sorted(neurons, key=lambda au: -abs(float(text[au])))[: counted(0.001, 240)]:
            on[au] += 1
    off = [au for au in neurons if on[au] / len(everyone) <= ALWAYS]
    prepared = CNA().prepare(evidence_of(llama, tokenizer, site="neuron"))
    assert {tuple(au) for au in prepared.always_on.nonzero().tolist()} == set(neurons) - set(off)
    for share, number in ((0.001, 1), (0.02, 5)):
        plan = CNA().plan(prepared, {"share": share, "m": 4.0})
        assert {au[1:3] for au in plan.aus()} == set(sorted(off, key=lambda au: -abs(delta[au]))[:number])
        assert {au[3:] for au in plan.aus()} == {(3.0, 0.0)} and plan.header["m"] == 4


def test_a_neuron_that_is_always_on_is_left_out():
    """Of 4 neurons the second differs most but is the most active one in 9 of 10 texts; at 8 of 10 it may stay."""
    texts = torch.tensor([[[0.0, 9.0, 1.0, 2.0]]] * 10)
    for quiet, left_out in ((1, True), (2, False)):
        now = texts.clone()
        now[:quiet, 0, 3] = -10.0
        always_on = most_active(now, 1).double().mean(0) > ALWAYS
        assert always_on.tolist() == [[False, left_out, False, False]]
        prepared = Contrast(torch.tensor([[0.1, -5.0, 0.3, 0.0]]), always_on, 4, {"site": "neuron"})
        plan = CNA().plan(prepared, {"share": 0.25, "m": 0.0})
        assert [au[1:4] for au in plan.aus()] == [(0, 2 if left_out else 1, -1.0)]
    everything = CNA().plan(prepared, {"share": 1.0, "m": 0.0})
    assert len(everything) == 3, "a neuron that does not differ is no part of the circuit"


@pytest.mark.parametrize("kind", BUDGET)
def test_the_grid_fits_the_budget_and_begins_gently(kind):
    grid = CNA().grid(kind)
    assert BUDGET[kind] <= len(grid) <= MOST_POINTS[kind] and {"share": 0.001, "m": 0.0} in grid
    assert grid[0]["share"] == min(point["share"] for point in grid) and all(point["m"] != 1 for point in grid)
    assert abs(grid[0]["m"] - 1) == min(abs(point["m"] - 1) for point in grid)
