"""Neurons of experts: site "neuron" of a mixture, where an AU is (layer, expert, dim)."""

import pytest
import torch
from conftest import PAIRS
from reference import activation_scores, hook_steering, log_odds
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer.errors import AUSteerError
from austeer.pairs import as_pairs
from austeer.plan import Plan
from austeer.steering import steer
from austeer.tokens import CLEAN, encode
from MFU_screening import CausalMomentum, screen
from set_MFU import set_MFU

IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 88, 12, 254, 17], [1, *range(30, 41)]])
EXPERTS, INNER = 4, 24


@pytest.fixture(scope="module")
def model(checkpoints):
    return rmodels.load(checkpoints["qwen3_moe"], dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def upstream(checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints["qwen3_moe"], dtype=torch.float32).eval()


def some_plan(tokens="all"):
    """Scale some neurons of each expert; the layer in the middle is dense and narrower."""
    scale = torch.zeros(3, EXPERTS * INNER)
    scale[0, 5::INNER], scale[1, 7], scale[2, 2::INNER], shift = 3.0, 4.0, -2.5, torch.zeros(3, EXPERTS * INNER)
    shift[0, 6::INNER] = 0.5
    return Plan({"neuron": scale}, {"neuron": shift}, tokens)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_steering_equals_a_loop_over_tokens(model, upstream, implementation):
    vanilla = model(IDS).logits
    model.set_experts_implementation(implementation)
    with steer(model, some_plan()):
        steered = model(IDS).logits
    model.set_experts_implementation("grouped_mm")
    with hook_steering(upstream, some_plan()):
        assert torch.allclose(steered, upstream(IDS).logits, atol=1e-4)
    assert (steered - vanilla).abs().max() > 0.1
    assert torch.equal(model(IDS).logits, vanilla)


def test_another_implementation_is_refused_and_not_ignored(model):
    model.set_experts_implementation("eager")
    with pytest.raises(AUSteerError, match=r"'eager'.*grouped_mm"), steer(model, some_plan()):
        model(IDS)
    model.set_experts_implementation("grouped_mm")


def test_each_row_has_its_plan(model):
    plan = some_plan()
    vanilla = model(IDS).logits
    with steer(model, plan):
        both = model(IDS).logits
    with steer(model, [None, plan]):
        one = model(IDS).logits
    assert torch.allclose(one[0], vanilla[0], atol=1e-5) and torch.allclose(one[1], both[1], atol=1e-5)


def test_token_scopes(model):
    with steer(model, some_plan("last"), prompt_end=8):
        late = model(IDS).logits
    vanilla = model(IDS).logits
    assert torch.allclose(late[:, :7], vanilla[:, :7], atol=1e-5)
    assert (late[:, 7:] - vanilla[:, 7:]).abs().max() > 0.1


def test_ranks_by_activation_equal_the_formula(model, upstream, tokenizer):
    ranks = screen(PAIRS, model, tokenizer, ["neuron"], progress=False)["neuron"]
    expected = activation_scores(upstream, tokenizer, PAIRS, "neuron")
    # where right and wrong text go to the same experts the loop may round a momentum of nearly zero otherwise
    assert (ranks.score != expected).float().mean() < 0.01
    assert ranks.header["widths.neuron"] == [EXPERTS * INNER, 80, EXPERTS * INNER]
    assert ranks.header["experts.neuron"] == [EXPERTS, 0, EXPERTS]


def test_pairs_that_reach_each_expert_are_counted(model, upstream, tokenizer):
    ranks = screen(PAIRS, model, tokenizer, ["neuron"], progress=False)["neuron"]
    chosen = {0: [], 2: []}
    for layer in chosen:
        upstream.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: chosen[layer].append(set(args[1][-1].tolist()))
        )
    for prompt, *answers in PAIRS:
        for answer in answers:
            upstream(torch.tensor([tokenizer(prompt + answer)["input_ids"]]))
    for layer, routes in chosen.items():
        of_pairs = [right | wrong for right, wrong in zip(routes[::2], routes[1::2], strict=True)]
        expected = [sum(expert in pair for pair in of_pairs) for expert in range(EXPERTS)]
        assert ranks.header["pairs_that_reach_each_expert"][layer] == expected
        moved = (ranks.stats["positive"] + ranks.stats["negative"])[layer].view(EXPERTS, INNER)
        assert (moved.amax(1) <= torch.tensor(expected)).all()


def test_causal_momentum_equals_finite_differences(model, upstream, tokenizer):
    encoded, _ = encode(as_pairs(PAIRS, None), tokenizer, CLEAN, 256)
    effects = CausalMomentum(model, ["neuron"], CLEAN).effects(encoded[:1])
    pair, step = PAIRS[0], 1e-3
    for layer, dim in ((0, 5), (0, 30), (1, 7), (2, 60), (2, 95)):
        log_sigmoid = []
        for sign in (1, -1):
            scale = torch.zeros(3, EXPERTS * INNER)
            scale[layer, dim] = sign * step
            with hook_steering(upstream, Plan({"neuron": scale})):
                odds = torch.tensor(log_odds(upstream, tokenizer, *pair), dtype=torch.float64)
            log_sigmoid.append(float(torch.nn.functional.logsigmoid(odds)))
        slope = (log_sigmoid[0] - log_sigmoid[1]) / (2 * step)
        assert float(effects["neuron", layer][0, dim]) == pytest.approx(slope, abs=2e-3)
    assert effects["neuron", 0].abs().max() > 0.05


def test_an_expert_that_no_pair_reaches_has_momentum_zero(checkpoints, tokenizer):
    model = rmodels.load(checkpoints["qwen3_moe"], dtype="float32", device="cpu")
    model.model.layers[2].mlp.gate.weight[1] = 0
    model.model.layers[2].mlp.gate.weight[[0, 2, 3]] += 3 * model.model.layers[2].mlp.gate.weight[[0, 2, 3]].abs()
    for momentum in ("activation", "causal"):
        ranks = screen(PAIRS, model, tokenizer, ["neuron"], momentum=momentum, progress=False)["neuron"]
        counts = ranks.header["pairs_that_reach_each_expert"][2]
        scores = ranks.score[2].view(EXPERTS, INNER)
        for expert, count in enumerate(counts):
            stats = [ranks.stats[name][2].view(EXPERTS, INNER)[expert].any() for name in ranks.stats]
            assert any(stats) == (count > 0), (expert, count, scores[expert])


def test_only_atomic_units_that_exist_are_chosen(model, tokenizer):
    ranks = screen(PAIRS, model, tokenizer, ["neuron"], progress=False)["neuron"]
    exist = 2 * EXPERTS * INNER + 80
    for options in ({}, {"location": "random"}, {"location": "lowest"}, {"location": "difference"}):
        assert len(set_MFU(ranks, exist - 1, 1.0, **options)) <= exist - 1
        assert not (set_MFU(ranks, exist, 1.0, **options).scales["neuron"][1, 80:]).any()
    with pytest.raises(AUSteerError, match=f"from 1 to {exist}"):
        set_MFU(ranks, exist + 1, 1.0)


def test_plans_print_the_expert(model, tokenizer, tmp_path):
    ranks = screen(PAIRS, model, tokenizer, ["neuron"], progress=False)["neuron"]
    plan = set_MFU(ranks, 40, 2.0)
    plan.save(tmp_path / "plan.safetensors")
    text = str(Plan.load(tmp_path / "plan.safetensors"))
    dim, scale = next(au[2:4] for au in plan.aus() if au[1] == 0)
    assert f"{dim % INNER} of expert {dim // INNER}     {1 + scale:+.3f} x" in text
    assert "of expert" in str(plan + set_MFU(ranks, 3, 1.0))


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_structural_mixtures_have_neurons_too(family, tokenizer):
    """GPT-OSS: transposed weights with biases, interleaved gates. Nemotron-H: no gate projection."""
    tiny = dict(
        gpt_oss=dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2),
        nemotron_h=dict(
            layers_block_type=["moe", "attention"], n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24, head_dim=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=1,
            ssm_state_size=8,
        ),
    )  # fmt: skip
    shape = dict(hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2, vocab_size=320)
    tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    layers = {} if family == "nemotron_h" else dict(num_hidden_layers=2)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, **tokens, **layers, **tiny[family])
    model = rmodels.with_proven_gates(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    assert "neuron" in rmodels.sites(model)
    ranks = screen(PAIRS, model, tokenizer, ["neuron"], momentum="causal", progress=False)["neuron"]
    assert ranks.header["experts.neuron"][0] == 4
    vanilla = model(IDS).logits
    with steer(model, set_MFU(ranks, 10, 5.0)):
        assert not torch.allclose(model(IDS).logits, vanilla, atol=1e-5)
