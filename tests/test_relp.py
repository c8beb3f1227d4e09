"""RelP's rules against plain forwards with every constant detached by hand; the methods relp and integrated."""

import math

import pytest
import torch
from conftest import PAIRS
from reference import hook_steering, log_odds
from test_rival_methods import evidence_of, upstream_of
from tiny_families import save_family
from torch.nn.functional import gelu, silu
from transformers import AutoModelForCausalLM

import rmodels
from austeer.errors import AUSteerError
from austeer.methods.base import BUDGET, MOST_POINTS
from austeer.methods.integrated import Integrated
from austeer.methods.registry import with_options
from austeer.methods.relp import RelP
from austeer.objective import Objective, no_gates
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.relp import relp_rules

SOME = [Pair(*pair) for pair in PAIRS[:3]]
SITES = ("attention", "neuron", "ffn", "layer")


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt().detach() * weight


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach() * norm.weight + norm.bias


def attend(q, k, v):
    """(heads, tokens, dim) each; the probabilities are constants."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    hidden = torch.triu(torch.ones(scores.shape[-2:], dtype=torch.bool), 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).detach() @ v


def frozen(x, act):
    return x * (act(x) / x).detach()


def half_each(a, b):
    halves = (a * b.detach() + a.detach() * b) / 2
    return halves + (a * b - halves).detach()


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def like_llama(model, ids, gates):
    """Llama's forward, and Phi-3's, whose projections are fused."""
    config, eps = model.config, model.config.rms_norm_eps
    h = model.model.embed_tokens(ids)
    cos, sin = (t[0] for t in model.model.rotary_emb(h[None], torch.arange(len(ids))[None]))
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for number, layer in enumerate(model.model.layers):
        x = rms(h, layer.input_layernorm.weight, eps)
        attention, mlp = layer.self_attn, layer.mlp
        if hasattr(attention, "qkv_proj"):
            q, k, v = attention.qkv_proj(x).split([heads * dim, kv * dim, kv * dim], -1)
        else:
            q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        q, k, v = (one.view(len(ids), -1, dim).transpose(0, 1) for one in (q, k, v))
        k, v = (one.repeat_interleave(heads // kv, 0) for one in (turned(k, cos, sin), v))
        mixed = attend(turned(q, cos, sin), k, v).transpose(0, 1).flatten(1)
        h = h + attention.o_proj(mixed * (1 + gates["attention"][number]))
        x = rms(h, layer.post_attention_layernorm.weight, eps)
        gate, up = (
            mlp.gate_up_proj(x).chunk(2, -1) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj(x), mlp.up_proj(x))
        )
        inner = half_each(frozen(gate, silu), up) * (1 + gates["neuron"][number])
        h = h + mlp.down_proj(inner) * (1 + gates["ffn"][number])
        h = h * (1 + gates["layer"][number])
    return model.lm_head(rms(h, model.model.norm.weight, eps))


def like_gpt2(model, ids, gates):
    heads = model.config.n_head
    h = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(len(ids)))
    for number, layer in enumerate(model.transformer.h):
        x = layer_norm(h, layer.ln_1)
        q, k, v = (one.view(len(ids), heads, -1).transpose(0, 1) for one in layer.attn.c_attn(x).chunk(3, -1))
        mixed = attend(q, k, v).transpose(0, 1).flatten(1)
        h = h + layer.attn.c_proj(mixed * (1 + gates["attention"][number]))
        inner = frozen(layer.mlp.c_fc(layer_norm(h, layer.ln_2)), lambda x: gelu(x, approximate="tanh"))
        h = h + layer.mlp.c_proj(inner * (1 + gates["neuron"][number])) * (1 + gates["ffn"][number])
        h = h * (1 + gates["layer"][number])
    return model.lm_head(layer_norm(h, model.transformer.ln_f))


@pytest.mark.parametrize("family, forward", [("llama", like_llama), ("phi3", like_llama), ("gpt2", like_gpt2)])
def test_the_rules_against_a_plain_forward(family, forward, checkpoints, tokenizer, tmp_path):
    folder = checkpoints[family] if family in checkpoints else save_family(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    plain.requires_grad_(False)
    model = rmodels.load(folder, dtype="float32", device="cpu")
    objective, nothing = Objective(model, tokenizer, SOME, None), no_gates(model, SITES)
    gates = {site: values.double().requires_grad_() for site, values in nothing.items()}
    total = 0.0
    for pair in objective.encoded:
        for tail, sign in ((pair.positive, 1), (pair.negative, -1)):
            ids = torch.tensor(pair.prefix + tail)
            logp = forward(plain, ids, gates).log_softmax(-1)
            start = len(pair.prefix)
            torch.testing.assert_close(logp, plain(ids[None]).logits[0].log_softmax(-1), rtol=1e-4, atol=1e-4)
            total = total + sign * sum(logp[at - 1, ids[at]] for at in range(start, len(ids)))
    expected = torch.autograd.grad(total / len(objective), list(gates.values()))
    without, before = objective.gradient(nothing), objective.value(nothing)
    with relp_rules(model):
        found, within = objective.gradient(nothing), objective.value(nothing)
    assert within == before, "the rules change no forward"
    for (site, values), plain_values in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(values, plain_values, rtol=1e-3, atol=2e-5)
        assert not torch.allclose(values, without[site], rtol=0.05, atol=1e-4), site
    for site, values in objective.gradient(nothing).items():
        assert torch.equal(values, without[site]), "nothing stays behind"


def test_the_rules_hold_under_the_eager_kernel_as_well(checkpoints, tokenizer):
    found = []
    for kernel in ("sdpa", "eager"):
        model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu", attn_implementation=kernel)
        with relp_rules(model):
            found.append(Objective(model, tokenizer, SOME, None).gradient(no_gates(model, ["attention"]))["attention"])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_models_that_the_rules_do_not_cover_are_refused(checkpoints, tokenizer, tmp_path):
    with pytest.raises(AUSteerError, match="has experts"), relp_rules(rmodels.load(checkpoints["qwen3_moe"])):
        pass
    for family, reason in {"mamba2": "activation function|none that divides", "bloom": "activation function"}.items():
        model = rmodels.load(save_family(tmp_path / family, family), dtype="float32", device="cpu")
        objective = Objective(model, tokenizer, SOME, None)
        with pytest.raises(AUSteerError, match=reason), relp_rules(model):
            objective.gradient(no_gates(model, rmodels.sites(model)[:1]))


def test_attention_that_nothing_freezes_is_refused(llama, tokenizer, monkeypatch):
    monkeypatch.setattr("austeer.relp._FrozenAttention.__torch_function__", lambda self, f, types, args=(), kwargs=None: f(*args, **(kwargs or {})))  # fmt: skip
    objective = Objective(llama, tokenizer, SOME, None)
    with pytest.raises(AUSteerError, match=r"3 of the 3 layers .* attn_implementation='eager'"), relp_rules(llama):
        objective.gradient(no_gates(llama, ["attention"]))


# the methods


@pytest.fixture(scope="module")
def evidence(llama, tokenizer):
    return evidence_of(llama, tokenizer, PAIRS[:3], site="neuron")


@pytest.mark.parametrize("method", [RelP(), Integrated()], ids=lambda method: method.name)
def test_plans_scale_the_k_largest_by_their_signs(method, evidence, llama):
    for kind in BUDGET:
        grid = method.grid(kind)
        assert BUDGET[kind] <= len(grid) <= MOST_POINTS[kind] and grid[0]["alpha"] == min(p["alpha"] for p in grid)
    prepared = method.prepare(evidence)
    plan = method.plan(prepared, {"k": 5, "alpha": 0.5})
    scores = [(abs(float(v)), float(v), at) for at, v in enumerate(prepared.score.flatten())]
    expected = {divmod(at, 80): math.copysign(0.5, value) for _, value, at in sorted(scores, reverse=True)[:5]}
    assert {au[1:3]: au[3] for au in plan.aus()} == expected and not plan.shifts
    assert plan.header["fingerprint"] and plan.header["method"] == method.name
    with pytest.raises(AUSteerError, match="the same tokens"):
        method.prepare(evidence_of(llama, evidence.tokenizer, [("Is it?", " yes", " yes")] * 2))


def test_relp_is_the_mean_of_relevances(evidence, llama):
    with relp_rules(llama):
        one_by_one = [
            Objective(llama, evidence.tokenizer, [pair], None).gradient(no_gates(llama, ["neuron"])) for pair in SOME
        ]
    expected = sum(found["neuron"] for found in one_by_one) / len(SOME)
    torch.testing.assert_close(RelP().prepare(evidence).score.double(), expected, rtol=1e-4, atol=1e-7)


def test_integrated_gradients_against_a_plain_sum_of_differences(evidence, checkpoints, tokenizer):
    """Many small steps on the way, and at each a difference of log-odds on upstream's model, for a few AUs."""
    method = Integrated(gate=0.25)
    prepared, upstream, steps = method.prepare(evidence), upstream_of(checkpoints["llama"]), 20
    uniform = torch.full(prepared.score.shape, 0.25)

    def mean_log_odds(scale):
        with hook_steering(upstream, Plan({"neuron": scale})):
            return sum(log_odds(upstream, tokenizer, *pair) for pair in SOME) / len(SOME)

    for layer, dim in ((0, 3), (1, 70), (2, 41)):
        total = 0.0
        for step in range(steps):
            up, down = (uniform * (step + 0.5) / steps for _ in range(2))
            up[layer, dim] += 1e-3
            down[layer, dim] -= 1e-3
            total += (mean_log_odds(up) - mean_log_odds(down)) / 2e-3 / steps
        assert float(prepared.score[layer, dim]) == pytest.approx(total, rel=2e-2, abs=2e-5)
    gain = mean_log_odds(uniform) - mean_log_odds(uniform * 0)
    assert prepared.header["gain"] == pytest.approx(gain, rel=1e-3)
    assert prepared.header["shares_add_up_to"] == pytest.approx(gain, rel=1e-2), "complete"


def test_options_of_integrated():
    assert with_options("integrated", {"gate": "-0.5", "points": "3"}).gate == -0.5
    for wrong in ({"gate": "0"}, {"gate": "3"}, {"points": "0"}):
        with pytest.raises(AUSteerError, match=r"integrated.gate must be from -1 to 1"):
            with_options("integrated", wrong)
