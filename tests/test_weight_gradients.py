"""The gates' gradients against the weights': d log-odds / d g of an AU is the sum of W * d log-odds / dW over its weights.

No gate and no hook is involved in the second, so this is an oracle for causal momentum on any family. (Where no gate
reaches, it would also be a way to rank.)
"""

from collections import defaultdict

import pytest
import torch
from conftest import PAIRS

import rmodels
from austeer.forward import PairTexts, log_odds_and_gradients
from austeer.pairs import as_pairs
from austeer.tokens import CLEAN, encode
from rmodels.structural import linear_maps
from rmodels.tiny import tiny_config, tiny_model

FAMILIES = ("gpt2", "opt", "mamba2", "phi3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_next", "gemma4_text", "lfm2")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_gates_equal_those_of_weights(family, tokenizer):
    model = rmodels.with_proven_gates(tiny_model(tiny_config(family)))
    pair = encode(as_pairs(PAIRS, None), tokenizer, CLEAN, 256)[0][1]
    sites = [site for site in rmodels.sites(model) if site != "layer"]
    _, at_gates = log_odds_and_gradients(model, sites, [pair], lambda x, g: x + x * g)

    maps = list(linear_maps(model))
    weights = {name: model.get_parameter(name) for *_, linear in maps for name in (linear.weight, linear.bias) if name}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(PairTexts(model, [pair], logits=True).log_odds().sum(), list(weights.values()))
    effects = {name: (weights[name] * g).detach() for name, g in zip(weights, gradients, strict=True)}

    by_weights = defaultdict(float)
    for layer, inside, outside, linear in maps:
        effect = effects[linear.weight]
        if inside is not None:
            by_weights[inside, layer] = effect.sum(linear.outputs).flatten()  # of experts: (experts, inner)
        if outside is not None:
            bias = 0 if linear.bias is None else effects[linear.bias].reshape(-1, effect.shape[linear.outputs]).sum(0)
            rows = effect.sum(linear.inputs).reshape(-1, effect.shape[linear.outputs]).sum(0)
            by_weights[outside, layer] = by_weights[outside, layer] + rows + bias
    assert {place for place in by_weights if place[0] in sites} == set(at_gates)
    for place, gradient in at_gates.items():
        largest = float(gradient.abs().max())
        assert largest > 1e-6
        assert torch.allclose(gradient[0], by_weights[place], atol=1e-4 * largest), place
