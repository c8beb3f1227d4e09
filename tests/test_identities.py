"""Identities of the method: folding, and the dependence of the published sign on the basis (docs/sign.md)."""

import copy

import pytest
import torch
from conftest import FAMILIES, PAIRS
from transformers import AutoModelForCausalLM

import rmodels
from austeer.steering import steer
from MFU_screening import screen
from set_MFU import set_MFU

IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 99, 240, 8, 61, 70, 33]])


@pytest.mark.parametrize("site", ["attention", "ffn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_folded_by_hand_equal_live_steering(checkpoints, tokenizer, name, site):
    model = rmodels.load(checkpoints[name], dtype="float32", device="cpu")
    plan = set_MFU(screen(PAIRS, model, tokenizer, [site], progress=False)[site], 20, 2.0)
    with steer(model, plan):
        live = model(IDS).logits
    kernel = model.config._attn_implementation.removeprefix("au_")
    folded = AutoModelForCausalLM.from_pretrained(
        checkpoints[name], dtype=torch.float32, attn_implementation=kernel
    ).eval()
    with torch.no_grad():
        for layer, block in enumerate(folded.model.layers):
            factor = 1 + plan.scale(site, layer)
            if site == "attention":
                block.self_attn.o_proj.weight *= factor  # columns
            elif hasattr(block.mlp, "down_proj"):
                block.mlp.down_proj.weight *= factor[:, None]  # rows
            else:
                block.mlp.experts.down_proj *= factor[:, None]  # the same rows of every expert
        assert (folded(IDS).logits - live).abs().max() < 1e-4 * live.abs().max()
        assert (live - model(IDS).logits).abs().max() > 0.1  # the plan does something


@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_sign_is_a_matter_of_basis_and_the_causal_one_is_not(checkpoints, tokenizer, name):
    """Flip row i of v_proj and the matching columns of o_proj: the function stays the same, and the sign changes."""
    model = rmodels.load(checkpoints[name], dtype="float32", device="cpu")
    flipped = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    signs = []
    with torch.no_grad():
        for layer in flipped.model.layers:
            sign = (
                torch.randint(0, 2, (model.config.num_key_value_heads, model.config.head_dim), generator=generator)
                * 2.0
                - 1
            )
            layer.self_attn.v_proj.weight *= sign.flatten()[:, None]
            # with grouped heads one value row feeds every query head of its group
            signs.append(sign.repeat_interleave(group, 0).flatten())
            layer.self_attn.o_proj.weight *= signs[-1]
    sign = torch.stack(signs)
    assert torch.equal(model(IDS).logits, flipped(IDS).logits)

    def both(momentum):
        result = [
            screen(PAIRS, m, tokenizer, ["attention"], momentum=momentum, progress=False) for m in (model, flipped)
        ]
        return [ranks["attention"] for ranks in result]

    ours, theirs = both("activation")
    assert torch.equal(theirs.stats["positive"], torch.where(sign > 0, ours.stats["positive"], ours.stats["negative"]))
    assert torch.equal(theirs.stats["negative"], torch.where(sign > 0, ours.stats["negative"], ours.stats["positive"]))
    assert torch.equal(theirs.score.abs(), ours.score.abs()) and torch.equal(theirs.order, ours.order)
    published = [set_MFU(ranks, 30, 2.0) for ranks in (ours, theirs)]
    assert not torch.equal(published[0].scales["attention"], published[1].scales["attention"])
    with steer(model, published[0]), steer(flipped, published[1]):
        assert not torch.allclose(model(IDS).logits, flipped(IDS).logits, atol=1e-2)

    ours, theirs = both("causal")
    assert torch.allclose(theirs.score, ours.score, rtol=1e-4, atol=1e-4)  # a backward pass may round otherwise
    causal = [set_MFU(ranks, 30, 2.0) for ranks in (ours, theirs)]
    assert torch.equal(causal[0].scales["attention"], causal[1].scales["attention"])
    with steer(model, causal[0]), steer(flipped, causal[1]):
        assert torch.equal(model(IDS).logits, flipped(IDS).logits)  # equal plans: the same function


def test_sign_aware_strength_does_not_depend_on_the_basis_either(checkpoints, tokenizer):
    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        for layer in flipped.model.layers:
            layer.self_attn.v_proj.weight *= -1
            layer.self_attn.o_proj.weight *= -1
    plans = []
    for one in (model, flipped):
        ranks = screen(PAIRS, one, tokenizer, ["attention"], progress=False)["attention"]
        untied = ranks.stats["positive"] != ranks.stats["negative"]  # a tie counts as positive in either basis
        plan = set_MFU(ranks, 30, 2.0, strength="sign-aware")
        plans.append(plan.scales["attention"] * untied)
    assert torch.equal(*plans)
