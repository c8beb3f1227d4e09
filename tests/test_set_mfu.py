"""From ranks to a plan to a steered model: selection, every variant, scopes, batches and clearing."""

import math
from collections import Counter

import pytest
import torch
import torch._dynamo.testing
from conftest import PAIRS
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutput

import rmodels
from austeer.errors import AUSteerError
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import apply, clear, steer
from MFU_screening import screen
from set_MFU import LOCATIONS, STRENGTHS, set_MFU

IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55], [1, 12, 99, 240, 8, 61, 70, 33]])


@pytest.fixture(scope="module")
def ranks(llama, tokenizer):
    return screen(PAIRS, llama, tokenizer, ["ffn"], progress=False)["ffn"]


@pytest.fixture(scope="module")
def causal(llama, tokenizer):
    return screen(PAIRS, llama, tokenizer, ["ffn"], momentum="causal", progress=False)["ffn"]


def worked_example():
    """Return the worked example: four pairs, two layers, three AUs, with the signed shares of the authors' code."""
    beta = torch.tensor([[0.75, 0.5, 1.0], [0.0, -1.0, 0.75]])
    return AURanks("ffn", beta, beta.clone(), {}, {"pairs": 4})


def units(plan):
    return {(layer, dim): scale for _, layer, dim, scale, _ in plan.aus()}


def test_worked_example():
    ranks = worked_example()
    assert [(u // 3, u % 3) for u in ranks.order.tolist()] == [(0, 2), (1, 1), (0, 0), (1, 2), (0, 1), (1, 0)]
    assert units(set_MFU(ranks, 2, 1.0)) == {(0, 2): 1.0, (1, 1): -1.0}
    plan = set_MFU(ranks, 3, 2.0)
    assert torch.equal(
        torch.stack([plan.scale("ffn", 0), plan.scale("ffn", 1)]), torch.tensor([[1.5, 0, 2], [0, -2, 0]])
    )
    assert torch.equal(plan.shift("ffn", 1), torch.zeros(3))
    gate = rmodels.AUGate("ffn", 1, 3)
    gate.set(plan.scale("ffn", 1), None, like=torch.zeros(1))
    assert torch.equal(gate(torch.tensor([[[4.0, -1.0, 3.0]]])), torch.tensor([[[4.0, 1.0, 3.0]]]))  # -1 changed sign


def test_half_precision_rounds_gamma_as_theirs():
    gate = rmodels.AUGate("ffn", 0, 1)
    gate.set(torch.tensor([15 * 0.915]), None, like=torch.zeros(1, dtype=torch.float16))
    assert float(gate(torch.tensor([[[0.3333]]], dtype=torch.float16))) == 4.90625  # 4.90784 in float32


def test_the_authors_k_rule(llama):
    lists = list(worked_example())
    config = torch.zeros(rmodels.site_shape(llama, "ffn"))
    config[0, :3], config[1, :3] = worked_example().score
    ranks = AURanks("ffn", config, config.clone())
    for k, count in ((0, 1), (-3, 1), (1, 1), (2, 2), (2.5, 3), (6, 5), (10**6, 5)):  # zeros never count
        assert len(set_MFU(*ranks, k, 1.0, llama, "ffn")) == count
    clear(llama)
    with pytest.raises(AUSteerError, match="2 layers of 3 AUs; this model has 3 of 48"):
        set_MFU(*lists, 2, 1.0, llama, "ffn")


def test_a_second_authors_call_replaces_one_site_only(llama, ranks):
    set_MFU(*ranks, 4, 1.0, llama, "ffn")
    set_MFU(*AURanks("layer", ranks.score, ranks.gain), 5, 1.0, llama, "layer")
    set_MFU(*ranks, 2, 1.0, llama, "ffn")
    count = {
        site: sum(int((g.scale != 0).sum()) for g in rmodels.gates(llama, site) if g.scale is not None)
        for site in rmodels.SITES
    }
    assert count == {"attention": 0, "ffn": 2, "layer": 5, "neuron": 0}
    clear(llama)


def test_every_option_changes_the_plan(ranks):
    paper = units(set_MFU(ranks, 10, 0.5))
    seen = [paper]
    for options in [
        *({"location": name} for name in LOCATIONS if name != "score"),
        *({"strength": name} for name in STRENGTHS if name not in ("adaptive", "vector")),
    ]:
        plan = units(set_MFU(ranks, 10, 0.5, **options))
        assert plan not in seen, options
        seen.append(plan)
    for name in ("location", "strength"):
        drawn = [
            units(set_MFU(ranks, 10, 0.5, **{name: "random" if name == "location" else "flipped"}, seed=s))
            for s in (1, 2, 1)
        ]
        assert drawn[0] == drawn[2] != drawn[1]


def test_locations(ranks):
    top = set(units(set_MFU(ranks, 10, 1.0)))
    assert top == {(layer, dim) for layer, dim, _ in ranks.top(10)}
    bottom = set(units(set_MFU(ranks, ranks.score.numel() - 10, 0.5, location="lowest", strength="suppress")))
    assert top.isdisjoint(bottom) and len(bottom) == ranks.score.numel() - 10
    difference = ranks.stats["sum_momentum"].abs()
    by_difference = units(set_MFU(ranks, 3, 1.0, location="difference"))
    assert min(difference[au] for au in by_difference) >= difference.flatten().topk(3).values[-1]


def test_strengths(ranks):
    def gamma(strength, alpha=2.0):
        plan = set_MFU(ranks, 8, alpha, strength=strength)
        return units(plan)

    paper, fixed, aware, flipped = (gamma(s) for s in ("adaptive", "fixed", "sign-aware", "flipped"))
    for au, value in paper.items():
        assert value == pytest.approx(2 * float(ranks.score[au]))
        assert fixed[au] == math.copysign(2.0, value)
        assert aware[au] == pytest.approx(value * math.copysign(1, ranks.stats["sum_activation"][au]))
        assert abs(flipped[au]) == abs(value)
    assert flipped != paper
    assert list(gamma("suppress", 0.3).values()) == pytest.approx([-0.7] * 8)
    vector = set_MFU(ranks, 8, 2.0, strength="vector")
    assert {u[1:3] for u in vector.aus()} == set(paper)
    for _, layer, dim, scale, shift in vector.aus():
        assert scale == 0 and shift == pytest.approx(2 * float(ranks.stats["sum_momentum"][layer, dim]) / len(PAIRS))


def test_causal_plans_scale_by_the_direction(causal):
    plan = set_MFU(causal, 6, 0.5)
    assert {abs(scale) for scale in units(plan).values()} == {0.5}
    assert all(math.copysign(1, scale) == math.copysign(1, causal.score[au]) for au, scale in units(plan).items())
    with pytest.raises(AUSteerError, match="needs sum_activation, which these ranks lack"):
        set_MFU(causal, 6, 0.5, strength="sign-aware")


@pytest.mark.parametrize("k", [0, -1, 145, 2.5, True, None])
def test_bad_k(ranks, k):
    with pytest.raises(AUSteerError, match="k must be a whole number from 1 to 144"):
        set_MFU(ranks, k, 1.0)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_bad_alpha(ranks, alpha):
    with pytest.raises(AUSteerError, match="alpha must be a finite number"):
        set_MFU(ranks, 3, alpha)


def test_bad_options(ranks):
    for options, message in (
        (dict(location="top"), "location 'top' is unknown"),
        (dict(strength="big"), "strength 'big'"),
        (dict(tokens="some"), "token scope 'some'"),
        (dict(strength="suppress"), "below 1"),
    ):
        with pytest.raises(AUSteerError, match=message):
            set_MFU(ranks, 3, 2.0, **options)


def test_ranks_of_another_model_or_site(llama, checkpoints, ranks, tokenizer):
    attention = screen(PAIRS, llama, tokenizer, ["attention"], progress=False)["attention"]
    other_site = AURanks("ffn", attention.score, attention.gain, {}, attention.header)
    with (
        pytest.raises(AUSteerError, match="3 layers of 64 AUs; this model has 3 of 48"),
        steer(llama, set_MFU(other_site, 3, 1.0)),
    ):
        pass
    qwen = rmodels.load(checkpoints["qwen3"], dtype="float32", device="cpu")  # same shapes, other family
    tuned = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    for model, message in (
        (qwen, "made for a llama model .*this one is qwen3"),
        (tuned, "made on other weights .*check=False"),
    ):
        with pytest.raises(AUSteerError, match=message), steer(model, set_MFU(ranks, 3, 1.0)):
            pass
        with steer(model, set_MFU(ranks, 3, 1.0), check=False):
            pass


def test_the_model_is_cleared_even_after_an_error(llama, ranks):
    vanilla = llama(IDS).logits
    with pytest.raises(ZeroDivisionError), steer(llama, set_MFU(ranks, 5, 3.0)):
        assert not torch.equal(llama(IDS).logits, vanilla)
        raise ZeroDivisionError
    assert torch.equal(llama(IDS).logits, vanilla)
    assert not llama.model._forward_hooks and not llama.model._forward_pre_hooks


def test_set_and_cleared_by_hand(llama, ranks):
    vanilla = llama(IDS).logits
    steering = apply(llama, set_MFU(ranks, 5, 3.0))
    steered = llama(IDS).logits
    assert not torch.equal(steered, vanilla)
    apply(llama, set_MFU(ranks, 2, 1.0))  # replaces, does not add
    with steer_fresh(llama, set_MFU(ranks, 2, 1.0)) as expected:
        assert torch.equal(llama(IDS).logits, expected)
    clear(llama)
    steering.check()
    assert torch.equal(llama(IDS).logits, vanilla)


class steer_fresh:
    """Yield the logits of a plan on a copy that was never steered before."""

    def __init__(self, model, plan):
        import copy

        self.model, self.plan = copy.deepcopy(model), plan

    def __enter__(self):
        clear(self.model)
        with steer(self.model, self.plan):
            return self.model(IDS).logits

    def __exit__(self, *_):
        pass


def test_a_replaced_steering_clears_nothing_of_the_new_one(llama, ranks):
    first = apply(llama, set_MFU(ranks, 5, 3.0))
    apply(llama, set_MFU(ranks, 2, 1.0))
    steered = llama(IDS).logits
    first.clear()
    assert torch.equal(llama(IDS).logits, steered)
    clear(llama)


def test_replacing_one_site_leaves_the_others(llama, ranks):
    both = set_MFU(ranks, 3, 1.0) + Plan({"layer": torch.full((3, 48), 0.1)})
    apply(llama, both)
    apply(llama, set_MFU(ranks, 5, 2.0))
    count = {site: sum(g.scale is not None for g in rmodels.gates(llama, site)) for site in rmodels.SITES}
    assert count["layer"] == 3 and count["ffn"] >= 1
    clear(llama)
    assert not llama.model._forward_hooks


def test_scopes_that_cannot_be_known_are_refused(llama, ranks):
    plan = set_MFU(ranks, 5, 2.0, tokens="generated")
    ones = torch.ones_like(IDS)
    for call in (
        lambda: llama(IDS, use_cache=False),
        lambda: llama.generate(IDS, attention_mask=ones, use_cache=False, max_new_tokens=2, do_sample=False),
    ):
        with pytest.raises(AUSteerError, match="pass prompt_end"), steer(llama, plan):
            call()
    cache = llama(IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(AUSteerError, match="pass prompt_end"), steer(llama, plan):
        llama(IDS[:, 4:], past_key_values=cache)


def test_the_authors_call_by_keyword(llama, ranks):
    scores, layers, indices = ranks
    plan = set_MFU(
        all_scores=scores, all_layer=layers, all_indices=indices, k=3, alpha=1.0, model=llama, applied_module="ffn"
    )
    assert len(plan) == 3
    clear(llama)


def test_steering_twice_is_refused(llama, ranks):
    plan = set_MFU(ranks, 2, 1.0)
    with steer(llama, plan), pytest.raises(AUSteerError, match="already steered"), steer(llama, plan):
        pass


def test_each_row_of_a_batch_by_its_own_plan(llama, ranks):
    plans = [set_MFU(ranks, 4, 3.0), None, set_MFU(ranks, 9, -1.0, strength="fixed")]
    batch = IDS[:1].expand(3, -1)
    with steer(llama, plans):
        rows = llama(batch).logits
        tokens = llama.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=5, do_sample=False)
    for row, plan in enumerate(plans):
        with steer(llama, Plan({}) if plan is None else plan):
            assert torch.allclose(llama(IDS[:1]).logits[0], rows[row], atol=1e-4)
            alone = llama.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=5, do_sample=False)
            assert torch.equal(alone[0], tokens[row])
    with (
        pytest.raises(AUSteerError, match="3 plans were set, one per row, but the batch has 2 rows"),
        steer(llama, plans),
    ):
        llama(IDS)


@pytest.mark.parametrize("tokens", ["prompt", "generated", "last"])
def test_token_scopes_touch_their_tokens_cached_or_not(llama, ranks, tokens):
    """A whole forward with prompt_end, and prefill plus cached steps, must be the same computation."""
    prompt, answer = IDS[:, :5], IDS[:, 5:]
    plan = set_MFU(ranks, 12, 3.0, tokens=tokens)
    with steer(llama, plan, prompt_end=5):
        whole = llama(IDS).logits
    with steer(llama, plan):
        out = llama(prompt, use_cache=True)
        parts = [out.logits]
        for t in range(3):
            out = llama(answer[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    vanilla = llama(IDS).logits
    first = {"prompt": 0, "generated": 5, "last": 4}[tokens]
    assert torch.equal(whole[:, :first], vanilla[:, :first])
    assert not torch.allclose(whole[:, first], vanilla[:, first], atol=1e-3)
    with steer(llama, set_MFU(ranks, 12, 3.0)):
        assert not torch.allclose(whole, llama(IDS).logits, atol=1e-3)


def test_overflow_is_reported(checkpoints, ranks):
    model = rmodels.load(checkpoints["llama"], dtype="float16", device="cpu")
    with pytest.raises(AUSteerError, match=r"overflowed.*float16.*lower alpha"), steer(model, set_MFU(ranks, 100, 6e4)):
        model(IDS)
    with steer(model, set_MFU(ranks, 3, 1.0)):
        model(IDS)


def test_alpha_zero_is_vanilla_bit_for_bit(llama, ranks, causal):
    vanilla = llama(IDS).logits
    for made in (ranks, causal):
        with steer(llama, set_MFU(made, 100, 0.0)):
            assert torch.equal(llama(IDS).logits, vanilla)


def test_gradients_flow_through_a_steered_model(llama, ranks):
    embeds = llama.get_input_embeddings()(IDS).detach().requires_grad_()
    with steer(llama, set_MFU(ranks, 5, 2.0)):
        llama(inputs_embeds=embeds).logits.sum().backward()
    assert torch.isfinite(embeds.grad).all() and embeds.grad.abs().sum() > 0


@pytest.mark.parametrize(("tokens", "positions"), [("all", 16 + 4), ("prompt", 16), ("generated", 4), ("last", 6)])
def test_receipt_counts_what_was_steered(llama, ranks, tokens, positions):
    plan = set_MFU(ranks, 7, 1.0, tokens=tokens)
    with steer(llama, plan) as steering:
        assert steering.receipt() == {"aus": 7, "positions": 0}
        llama.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)  # the last is not read
    assert steering.receipt() == {"aus": 7, "positions": positions}
    with steer(llama, [None, plan]) as steering:
        llama.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert steering.receipt() == {"aus": 7, "positions": positions // 2}


def test_receipt_of_nothing(llama):
    with steer(llama, [None, None]) as steering:
        llama(IDS)
    assert steering.receipt() == {"aus": 0, "positions": 0}


@pytest.mark.slow
def test_receipt_of_compiled_forwards(llama, ranks):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(llama, fullgraph=True, backend=counter)
    both = Plan({"ffn": set_MFU(ranks, 3, 1.0).scales["ffn"]}, {"ffn": set_MFU(ranks, 5, 1.0).scales["ffn"]})
    with steer(llama, both) as steering:
        for _ in range(3):
            compiled(IDS)
    torch.compiler.reset()
    assert steering.receipt() == {"aus": 5, "positions": 3 * IDS.numel()} and counter.frame_count == 1


@pytest.mark.parametrize("part", ["hook", *(pytest.param(one, marks=pytest.mark.slow) for one in ("base", "model"))])
def test_cuda_graphs_may_change_the_receipt_in_place(llama, ranks, part):
    """torch.compile(mode="reduce-overhead") skips every graph that changes inputs at addresses not known to stay."""
    stays = []

    def look(graph, inputs):
        known = torch._guards.TracingContext.get().fw_metadata
        stays.extend(i in known.static_input_indices for i, info in enumerate(known.input_info) if info.mutates_data)
        return make_boxed_func(graph.forward)

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look))

    states = BaseModelOutput(torch.ones(*IDS.shape, 48))
    for _ in range(2):  # the second steering's numbers are other tensors
        with torch.no_grad(), steer(llama, set_MFU(ranks, 3, 1.0)) as steering:
            if part == "hook":
                compiled(steering._note)(llama.model, (), states)
            else:
                compiled(llama if part == "model" else llama.model)(IDS, use_cache=False)
    torch.compiler.reset()
    assert stays and all(stays)
    assert steering.receipt() == {"aus": 3, "positions": IDS.numel()}


class Operators(TorchDispatchMode):
    """Return the names of the operations of a forward."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_steered_forward_waits_for_no_value(llama, ranks):
    """A steered forward only adds arithmetic: a CUDA graph can capture it, and the CPU runs ahead of the GPU."""
    plan = set_MFU(ranks, 7, 1.0)
    plan = Plan(plan.scales, plan.scales)
    with Operators() as idle:
        llama(IDS)
    for one in (plan, [plan, None]):
        with steer(llama, one) as steering:
            places = [state.data_ptr() for state in (steering._steered, steering._not_finite)]
            with Operators() as steered:
                llama(IDS)
            assert places == [state.data_ptr() for state in (steering._steered, steering._not_finite)]
        more = Counter(steered.names) - Counter(idle.names)
        assert set(more) <= {"mul", "add", "view", "ne", "eq", "abs", "all", "bitwise_not", "logical_or_", "add_"}
        assert more["add"] == 2 * sum(bool(row.any()) for row in plan.scales["ffn"])


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad])
def test_a_plan_outlives_the_mode_it_was_set_in(llama, ranks, made):
    with made():
        steering = apply(llama, set_MFU(ranks, 3, 1.0))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            llama(IDS)
    clear(llama)
    assert steering.receipt() == {"aus": 3, "positions": 3 * IDS.numel()}


@pytest.mark.gpu
def test_captured_and_replayed_graphs_steer_and_count(checkpoints, ranks):
    model, ids = rmodels.load(checkpoints["llama"], dtype="float32", device="cuda"), IDS.cuda()
    captured, counters = torch.cuda.CUDAGraph(), torch._dynamo.utils.counters["inductor"]
    with torch.no_grad(), steer(model, set_MFU(ranks, 7, 1.0)) as steering:
        expected = model(ids, use_cache=False).logits.clone()  # a warm-up, since this may not be captured
        with torch.cuda.graph(captured):
            logits = model(ids, use_cache=False).logits
        before = steering.receipt()["positions"]
        for _ in range(3):
            captured.replay()
        assert torch.allclose(logits, expected, atol=1e-3)
        assert steering.receipt()["positions"] == before + 3 * ids.numel()
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        before, skipped = steering.receipt()["positions"], counters["cudagraph_skips"]
        for _ in range(4):  # runs, records, replays
            logits = compiled(ids, use_cache=False).logits
        assert torch.allclose(logits, expected, atol=1e-3) and counters["cudagraph_skips"] == skipped
        assert steering.receipt()["positions"] == before + 4 * ids.numel()
    torch.compiler.reset()
