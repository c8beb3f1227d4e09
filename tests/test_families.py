"""Families by name: gates by structure on tiny random checkpoints of the true classes, and the proof against broken gates."""

import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import FAMILIES, PAIRS
from reference import log_odds
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import rmodels
from austeer.commands import models as command
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering.answerer import Generation
from eval.answering.live import LiveAnswerer
from eval.answering.sampling import Sampling, sampled
from MFU_screening import screen
from rmodels.proof import prove
from rmodels.structural import add_gates
from rmodels.tiny import CLASSES, tiny_config, tiny_model
from set_MFU import set_MFU

IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 88, 12, 254, 17], [1, *range(30, 41)]])
DENSE = ("attention", "ffn", "layer", "neuron")


class Places(NamedTuple):
    """Say by name where a family's sites are; of several paths, the first that a layer has."""

    layers: str
    mixer: str  # its input is site attention
    down: str  # its input is site neuron, its output site ffn
    mixture: str = ""  # its output is site ffn, where a layer has it


MODERN = Places("model.layers", "self_attn.o_proj", "mlp.down_proj")
MIXTURE = MODERN._replace(mixture="mlp")
FAMILY_PLACES = {
    "bloom": Places("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "deepseek_v2": MIXTURE,
    "deepseek_v3": MIXTURE,
    "falcon": Places("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "gemma": MODERN,
    "gemma2": MODERN,
    "gemma3": MODERN._replace(layers="model.language_model.layers"),
    "gemma3_text": MODERN,
    "gemma4": MODERN._replace(layers="model.language_model.layers"),
    "gemma4_text": MODERN,
    "glm4": MODERN,
    "gpt2": Places("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": Places("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "gpt_oss": MIXTURE,
    "granite": MODERN,
    "granitemoehybrid": Places("model.layers", "mamba.out_proj self_attn.o_proj", "", "block_sparse_moe"),
    "lfm2": Places("model.layers", "conv.out_proj self_attn.out_proj", "feed_forward.w2"),
    "mamba2": Places("backbone.layers", "mixer.out_proj", ""),
    "ministral3": MODERN,
    "mistral": MODERN,
    "mixtral": MIXTURE,
    "olmo2": MODERN,
    "olmo3": MODERN,
    "opt": Places("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "phi3": MODERN,
    "qwen2": MODERN,
    "qwen2_moe": MIXTURE,
    "qwen3": MODERN,
    "qwen3_5": MODERN._replace(layers="model.language_model.layers", mixer="linear_attn.out_proj self_attn.o_proj"),
    "qwen3_5_moe": MIXTURE._replace(layers="model.language_model.layers", mixer="linear_attn.out_proj self_attn.o_proj"),
    "qwen3_5_moe_text": MIXTURE._replace(mixer="linear_attn.out_proj self_attn.o_proj"),
    "qwen3_5_text": MODERN._replace(mixer="linear_attn.out_proj self_attn.o_proj"),
    "qwen3_moe": MIXTURE,
    "qwen3_next": MIXTURE._replace(mixer="linear_attn.out_proj self_attn.o_proj"),
    "smollm3": MODERN,
}  # fmt: skip
FAST = {
    "bloom",
    "falcon",
    "gemma4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "lfm2",
    "mamba2",
    "mixtral",
    "opt",
    "phi3",
    "qwen3_5",
}


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in sorted(FAMILY_PLACES)
])  # fmt: skip
def two(request, tmp_path_factory):
    """Return a family's name, its model loaded with gates, and upstream's model of the same checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = tiny_model(tiny_config(request.param))
    plain.save_pretrained(folder)
    model = rmodels.load(folder, dtype="float32", device="cpu")
    kernel = model.config._attn_implementation.removeprefix("au_")
    upstream = type(plain).from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel).eval()
    return request.param, model, upstream


def at(layer, paths):
    """Return the first of a layer's modules that these paths name, or None."""
    names = dict(layer.named_modules())
    return next((names[path] for path in paths.split() if path in names), None)


@contextmanager
def plain_hooks(upstream, places, site, plan):
    """Steer upstream's model where the table says that the site is."""

    def steered(layer, x):
        return x + x * plan.scale(site, layer)[: x.shape[-1]]

    def after(layer):
        def hook(module, args, out):
            return (steered(layer, out[0]), *out[1:]) if isinstance(out, tuple) else steered(layer, out)

        return hook

    def before(layer):
        return lambda module, args: (steered(layer, args[0]), *args[1:])

    with ExitStack() as undo:
        for index, layer in enumerate(upstream.get_submodule(places.layers)):
            block = at(layer, places.mixture) if places.mixture else None
            mixture = block if block and any("experts" in name for name, _ in block.named_modules()) else None
            if site == "attention":
                hook = at(layer, places.mixer).register_forward_pre_hook(before(index))
            elif site == "neuron":
                hook = at(layer, places.down).register_forward_pre_hook(before(index))
            elif site == "ffn":
                hook = (mixture or at(layer, places.down)).register_forward_hook(after(index))
            else:
                hook = layer.register_forward_hook(after(index))
            undo.callback(hook.remove)
        yield


def some_plan(model, site):
    scale = torch.zeros(rmodels.site_shape(model, site))
    scale[:, 3], scale[:, 10] = 1.5, -0.7
    return Plan({site: scale})


def generated(model):
    return model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0
    )


def test_a_family_has_its_sites(two):
    name, model, _ = two
    assert set(rmodels.sites(model)) == (
        set(DENSE) if FAMILY_PLACES[name].mixture or FAMILY_PLACES[name].down else {"attention", "layer"}
    )
    rmodels.check_gates(model)
    assert not [key for key in model.state_dict() if "au_" in key]


@torch.no_grad()
def test_an_idle_family_is_bit_equal_to_upstream(two):
    _, model, upstream = two
    assert torch.equal(model(input_ids=IDS).logits, upstream(input_ids=IDS).logits)
    assert torch.equal(generated(model), generated(upstream))


@torch.no_grad()
def test_a_steered_family_equals_plain_hooks(two):
    """Neurons of experts have no place where a plain hook could stand: tests/test_experts.py."""
    name, model, upstream = two
    places = FAMILY_PLACES[name]
    vanilla = model(input_ids=IDS).logits
    for site in rmodels.sites(model):
        if site == "neuron" and places.mixture:
            continue
        plan = some_plan(model, site)
        with steer(model, plan), plain_hooks(upstream, places, site, plan):
            logits = model(input_ids=IDS).logits
            assert torch.equal(logits, upstream(input_ids=IDS).logits), site
            assert torch.equal(generated(model), generated(upstream)), site
        assert (logits - vanilla).abs().max() > 1e-3 * vanilla.abs().max(), site
    assert torch.equal(model(input_ids=IDS).logits, vanilla)


def test_the_layers_of_another_tower_are_not_the_decoders():
    for name in ("git", "phi4_multimodal"):
        model = tiny_model(tiny_config(name))
        expected = model.git.encoder.layer if name == "git" else model.model.layers
        assert rmodels.decoder_layers(model) is expected


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("dbrx", ("attention", "ffn", "layer")),  # attention lies a level deeper
        ("xlstm", ("attention", "ffn", "layer", "neuron")),
        ("zamba", ("attention", "layer")),  # Mamba's weights of three axes are no experts, a lone projection is no MLP
        pytest.param("nemotron_h", DENSE, marks=pytest.mark.slow),  # a layer is a mixer or an MLP
        pytest.param("reformer", DENSE, marks=pytest.mark.slow),  # its layers return named tuples
        pytest.param("deepseek_v4", ("attention", "ffn", "neuron"), marks=pytest.mark.slow),  # several residual streams
    ],
)
def test_families_with_odd_layers(name, sites):
    model = rmodels.with_proven_gates(tiny_model(tiny_config(name)))
    assert rmodels.sites(model) == sites
    assert set(model.au_refused) == set(DENSE) - set(sites)


# --- the four families of the paper: their own files, and gates by structure on upstream's class


@pytest.mark.parametrize("name", FAMILIES)
def test_structure_equals_the_family_file(checkpoints, tokenizer, name):
    by_file = rmodels.load(checkpoints[name], dtype="float32", device="cpu")
    kernel = by_file.config._attn_implementation.removeprefix("au_")
    upstream = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32, attn_implementation=kernel)
    by_structure = rmodels.with_proven_gates(upstream.eval().requires_grad_(False))
    assert type(by_structure) is not type(by_file) and rmodels.sites(by_structure) == rmodels.sites(by_file)
    sites = list(rmodels.sites(by_file))
    ranks, again = (screen(PAIRS, model, tokenizer, sites, progress=False) for model in (by_file, by_structure))
    for site in sites:
        assert torch.equal(ranks[site].score, again[site].score)
        plan, other = set_MFU(ranks[site], 9, 2.0), set_MFU(again[site], 9, 2.0)
        with steer(by_file, other, check=True), steer(by_structure, plan, check=True):
            steered = by_file(IDS).logits
            assert torch.equal(steered, by_structure(IDS).logits), site
        assert not torch.equal(by_file(IDS).logits, steered)


# --- the proof: each fault is found, at its site and its layer, and nothing else is blamed


@pytest.fixture
def gated():
    """Return a small model with gates by structure that nobody has proven yet."""
    model = tiny_model(tiny_config("qwen2"))
    add_gates(model)
    return model


def gate_of(model, site, layer):
    return next(gate for gate in rmodels.gates(model, site) if gate.layer == layer)


def without_effect(model):
    gate_of(model, "attention", 2).forward = lambda x: (
        gate_of(model, "attention", 2).tap(x) if gate_of(model, "attention", 2).tap else x
    )


def never_called(model):
    model.model.layers[2].self_attn.o_proj._forward_pre_hooks.clear()


def on_the_wrong_projection(model):
    never_called(model)
    gate = gate_of(model, "attention", 2)
    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda module, args: (gate(args[0]),))


def at_the_neighbouring_layer(model):
    for layer in model.model.layers:  # the same unit is the strongest everywhere, which must not hide the exchange
        layer.self_attn.v_proj.weight[5] *= 50
        layer.self_attn.q_proj.weight.zero_()
    one, other = (model.model.layers[index].self_attn.o_proj for index in (2, 3))
    one._forward_pre_hooks, other._forward_pre_hooks = other._forward_pre_hooks, one._forward_pre_hooks


def called_twice(model):
    gate = gate_of(model, "attention", 2)
    model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (gate(args[0]),))


def on_the_wrong_dimension(model):
    gate = gate_of(model, "attention", 2)
    forward = type(gate).forward
    gate.forward = lambda x: forward(gate, x.roll(1, -1)).roll(-1, -1)


def on_a_part_of_the_tokens(model):
    gate = gate_of(model, "attention", 2)
    forward = type(gate).forward
    gate.forward = lambda x: torch.cat([x[:, :2], forward(gate, x)[:, 2:]], 1)


FAULTS = {
    without_effect: "no atomic unit of layer 2 moves the logits",
    never_called: "layer 2 passes it 0 times",
    on_the_wrong_projection: "layer 2 does something else than scaling its weight",
    at_the_neighbouring_layer: "layer 2 does something else than scaling its weight",
    called_twice: "layer 2 passes it 2 times",
    on_the_wrong_dimension: "layer 2 does something else than scaling its weight",
    on_a_part_of_the_tokens: "layer 2 does something else than scaling its weight",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_proof_finds_a_broken_gate(gated, fault):
    fault(gated)
    refused, _ = prove(gated, rmodels.gates(gated))
    assert list(refused) == ["attention"] and FAULTS[fault] in refused["attention"]


def test_the_proof_finds_an_mlp_hook_on_the_wrong_dimension(gated):
    gate = gate_of(gated, "ffn", 1)
    forward = type(gate).forward
    gate.forward = lambda x: forward(gate, x.roll(1, -1)).roll(-1, -1)
    refused, _ = prove(gated, rmodels.gates(gated))
    assert list(refused) == ["ffn"] and "gate of layer 1 does something else" in refused["ffn"]


def test_sound_gates_pass_the_proof_and_leave_no_trace(gated):
    before = {name: weight.clone() for name, weight in gated.state_dict().items()}
    refused, errors = prove(gated, rmodels.gates(gated))
    assert not refused and set(errors) == set(DENSE) and max(errors.values()) <= 1e-5
    assert all(torch.equal(weight, before[name]) for name, weight in gated.state_dict().items())
    assert all(gate.idle for gate in rmodels.gates(gated))


def test_a_family_file_with_a_broken_gate_is_refused(checkpoints):
    upstream = AutoConfig.from_pretrained(checkpoints["llama"])
    model = tiny_model(upstream)
    gate = gate_of(model, "ffn", 1)
    forward = type(gate).forward
    gate.forward = lambda x: forward(gate, x.roll(1, -1)).roll(-1, -1)
    with pytest.raises(
        AUSteerError, match=r"fail their proof .site ffn: the gate of layer 1 .*mend .*modeling_llama.py"
    ):
        rmodels.with_proven_gates(model)


def test_a_family_file_may_leave_out_a_site(checkpoints):
    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    model.SITES = ("attention", "ffn", "layer")
    assert rmodels.sites(rmodels.with_proven_gates(model)) == model.SITES


def test_where_nothing_moves_nothing_is_proven():
    model = tiny_model(tiny_config("qwen2"))
    model.model.layers[2].self_attn.o_proj.weight.zero_()
    rmodels.with_proven_gates(model)
    assert "attention" not in rmodels.sites(model) and {"ffn", "layer", "neuron"} <= set(rmodels.sites(model))
    with pytest.raises(AUSteerError, match=r"no site 'attention': no atomic unit of layer 2 moves .*docs/porting.md"):
        rmodels.site_shape(model, "attention")
    model = tiny_model(tiny_config("qwen2"))
    model.lm_head.weight.zero_()
    with pytest.raises(AUSteerError, match=r"gates of Qwen2ForCausalLM fail their proof.*write .*modeling_qwen2.py"):
        rmodels.with_proven_gates(model)


@pytest.mark.parametrize(("layer", "is_seen"), [(0, True), (1, False), (2, True), (3, True)])
def test_the_quick_proof_tries_three_layers(gated, layer, is_seen):
    """The first, the middle and the last of four; the full proof tries all."""
    gated.model.layers[layer].self_attn.o_proj._forward_pre_hooks.clear()
    quick, _ = prove(gated, rmodels.gates(gated), quick=True)
    full, _ = prove(gated, rmodels.gates(gated))
    assert ("attention" in quick) == is_seen and "attention" in full


def test_the_quick_proof_finds_sites_that_few_layers_have():
    config = tiny_config("nemotron_h")
    config.layers_block_type = ["full_attention", "mlp", "full_attention", "full_attention"]
    model = rmodels.with_proven_gates(tiny_model(config), quick=True)
    assert rmodels.sites(model) == rmodels.SITES, model.au_refused


def test_the_quick_proof_is_an_option_of_loading(tmp_path, monkeypatch):
    tiny_model(tiny_config("qwen2")).save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(rmodels, "prove", lambda model, gates, quick: seen.append(quick) or ({}, {}))
    rmodels.load(tmp_path, device="cpu", quick_proof=True)
    rmodels.load(tmp_path, device="cpu")
    assert seen == [True, False]


# --- screening: recurrent layers, position biases and sliding windows are read as whole texts are


READ_OTHERWISE = [
    "bloom",
    "mamba2",
    "qwen3_next",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon", "gemma3_text", "gemma4_text", "lfm2")),
]


@contextmanager
def hooked_inputs(upstream, places, change):
    """Call change(layer, x) with what upstream's mixers project last; what it returns takes the place of x."""
    with ExitStack() as undo:
        for index, layer in enumerate(upstream.get_submodule(places.layers)):
            projection = at(layer, places.mixer)
            undo.callback(projection.register_forward_pre_hook(lambda m, args, i=index: (change(i, args[0]),)).remove)
        yield


@pytest.mark.parametrize("name", READ_OTHERWISE)
@torch.no_grad()
def test_screening_by_activation_equals_a_loop_over_whole_texts(name, tokenizer):
    model, upstream = (tiny_model(tiny_config(name)) for _ in range(2))
    ranks = screen(PAIRS, rmodels.with_proven_gates(model), tokenizer, ["attention"], progress=False)["attention"]
    last = {}
    momenta = []
    for prompt, *answers in PAIRS:
        rows = []
        for answer in answers:
            with hooked_inputs(upstream, FAMILY_PLACES[name], lambda i, x: last.__setitem__(i, x[0, -1]) or x):
                upstream(input_ids=torch.tensor([tokenizer(prompt + answer)["input_ids"]]))
            rows.append([last[layer] for layer in sorted(last)])
        momenta.append([right - wrong for right, wrong in zip(*rows, strict=True)])
    for layer, by_pair in enumerate(zip(*momenta, strict=True)):
        rows = torch.stack(by_pair)
        sure = (rows.abs() > 1e-5).all(0)  # the sign of a rounding error is anybody's
        more, less = (rows > 0).float().mean(0), (rows < 0).float().mean(0)
        expected = torch.where(more < less, -less, torch.maximum(more, less))
        assert sure.float().mean() > 0.8, layer
        assert torch.allclose(ranks.score[layer, : rows.shape[1]][sure].float(), expected[sure]), layer


@pytest.mark.parametrize("name", READ_OTHERWISE)
def test_causal_momentum_equals_finite_differences_on_whole_texts(name, tokenizer):
    model, upstream = (tiny_model(tiny_config(name)) for _ in range(2))
    pair, step, upstream = Pair(*PAIRS[3]), 1e-3, upstream.double()
    upstream.set_experts_implementation("eager")  # grouped_mm has no float64
    ranks = screen(
        [pair, pair], rmodels.with_proven_gates(model), tokenizer, ["attention"], momentum="causal", progress=False
    )
    total = ranks["attention"].stats["sum"]
    for layer, dim in [divmod(int(au), total.shape[1]) for au in total.flatten().abs().topk(3).indices]:
        log_sigmoid = []
        for change in (-step, step):

            def nudge(i, x, layer=layer, dim=dim, change=change):
                factor = torch.ones(x.shape[-1], dtype=x.dtype)
                factor[dim] += change if i == layer else 0.0
                return x * factor

            with hooked_inputs(upstream, FAMILY_PLACES[name], nudge):
                odds = torch.tensor(log_odds(upstream, tokenizer, *PAIRS[3]), dtype=torch.float64)
            log_sigmoid.append(float(torch.nn.functional.logsigmoid(odds)))
        expected = (log_sigmoid[1] - log_sigmoid[0]) / (2 * step)
        assert float(total[layer, dim]) / 2 == pytest.approx(expected, rel=2e-2), (layer, dim)


# --- models that are no decoders: one line each


def encoder():
    return AutoModelForMaskedLM.from_config(tiny_config("bert"))


def encoder_with_a_causal_head():
    return tiny_model(tiny_config("bert"))


def encoder_decoder():
    small = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=320)
    return AutoModel.from_config(AutoConfig.for_model("t5", **small))


def not_a_language_model():
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return AutoModel.from_config(
        AutoConfig.for_model("clip", text_config=tower | dict(vocab_size=320), vision_config=tower)
    )


def needs_an_image():
    return tiny_model(tiny_config("blip"))


REFUSED = {
    encoder: "BertForMaskedLM is an encoder, which does not continue texts",
    encoder_with_a_causal_head: "BertLMHeadModel is no causal language model: its first tokens see the last one",
    encoder_decoder: "T5Model is an encoder-decoder: AUSteer steers decoders alone",
    not_a_language_model: "CLIPModel has no language-model head",
    needs_an_image: "BlipForConditionalGeneration does not run on text alone",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_is_no_decoder_is_refused_in_one_line(make, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(AUSteerError, match=REFUSED[make]) as error:
        rmodels.load(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "mixers"),
    [
        ("mamba2", ["mixer.out_proj"] * 4),
        ("granitemoehybrid", ["mamba.out_proj", "self_attn.o_proj"] * 2),
        ("qwen3_next", ["linear_attn.out_proj", "self_attn.o_proj"] * 2),
        ("gpt2", None),
    ],
)
def test_headers_say_where_the_mixer_is_not_attention(name, mixers, tokenizer):
    model = rmodels.with_proven_gates(tiny_model(tiny_config(name)))
    ranks = screen(PAIRS, model, tokenizer, ["attention"], progress=False)["attention"]
    evidence = Evidence(model, tokenizer, [Pair(*pair) for pair in PAIRS], "attention")
    for header in (ranks.header, set_MFU(ranks, 5, 1.0).header, evidence.header()):
        assert header.get("mixers.attention") == mixers


# --- generation


@pytest.mark.parametrize("name", ["mamba2", "recurrent_gemma"])
def test_a_cache_that_counts_no_tokens_leaves_token_scopes_without_meaning(name):
    model = rmodels.with_proven_gates(tiny_model(tiny_config(name)))
    plan = Plan({"layer": torch.ones(rmodels.site_shape(model, "layer"))}, tokens="generated")
    with pytest.raises(AUSteerError, match="does not count tokens"), steer(model, plan):
        model.generate(IDS, max_new_tokens=2, do_sample=False)


def test_generated_tokens_of_a_decoder_with_a_head_of_its_own_are_counted():
    model = rmodels.with_proven_gates(tiny_model(tiny_config("llama4")))
    plan = Plan({"layer": torch.ones(rmodels.site_shape(model, "layer"))}, tokens="generated")
    with steer(model, plan) as steering:
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert steering.receipt()["positions"] == 4  # the last tokens of two rows are not run


@pytest.mark.parametrize("name", ["mamba2", "rwkv"])
def test_recurrent_families_answer_together_as_alone(name, tokenizer):
    """RWKV: transformers mixes the rows of a batch up when it generates on its cache."""
    model = rmodels.with_proven_gates(tiny_model(tiny_config(name)))
    prompts = ["The old dog sat there", "Some men in town ran", "A", "North of Paris it rained in May"]
    how = Sampling(new_tokens=6, samples=1, top_p=1e-6)
    for answers in (
        lambda texts: [row.text for row in LiveAnswerer(model, tokenizer).answer(texts, Generation(6))],
        lambda texts: [row[0] for row in sampled(model, tokenizer, texts, how)],
    ):
        assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


# --- compiled, quantised and offloaded models


@pytest.mark.parametrize("name", ["gpt2", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_structural_gates_compile_without_a_graph_break(name):
    config = tiny_config(name)
    config.num_hidden_layers = 2
    model = rmodels.with_proven_gates(tiny_model(config))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    idle = model(IDS).logits
    assert torch.allclose(compiled(IDS).logits, idle, atol=1e-4)
    everywhere = Plan({site: some_plan(model, site).scales[site] for site in rmodels.sites(model)})
    with steer(model, everywhere):
        steered = model(IDS).logits
        assert torch.allclose(compiled(IDS).logits, steered, atol=1e-4)
    assert not torch.allclose(idle, steered, atol=1e-2)
    torch.compiler.reset()


@pytest.mark.parametrize(("bits", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_quantised_layers_stay_and_are_proven_by_plain_hooks(bits, kind, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in requirements2.txt")
    tiny_model(tiny_config("qwen2")).save_pretrained(tmp_path)
    monkeypatch.setattr("rmodels.proof._scaled_weights", None)  # quantised weights cannot be scaled
    model = rmodels.load(tmp_path, dtype="float32", device="cpu", quantization=bits)
    assert set(rmodels.sites(model)) == set(DENSE)
    for layer in model.model.layers:
        assert {type(layer.self_attn.o_proj).__name__, type(layer.mlp.down_proj).__name__} == {kind}
    vanilla = model(IDS).logits
    for site in DENSE:
        with steer(model, some_plan(model, site)):
            assert not torch.allclose(model(IDS).logits, vanilla, atol=1e-3), site
    assert torch.equal(model(IDS).logits, vanilla)


def test_a_layer_on_disk_is_proven_and_steered_alike(tmp_path):
    from accelerate import disk_offload

    whole = rmodels.with_proven_gates(tiny_model(tiny_config("qwen2")))
    offloaded = tiny_model(tiny_config("qwen2"))
    disk_offload(offloaded.model.layers[1], tmp_path)
    assert offloaded.model.layers[1].mlp.down_proj.weight.is_meta
    rmodels.with_proven_gates(offloaded)
    assert rmodels.sites(offloaded) == rmodels.sites(whole)
    for site in DENSE:
        with steer(whole, some_plan(whole, site)), steer(offloaded, some_plan(whole, site)):
            assert torch.equal(whole(IDS).logits, offloaded(IDS).logits), site


def test_a_model_wholly_on_disk_is_proven(tmp_path):
    from accelerate import disk_offload

    offloaded = disk_offload(tiny_model(tiny_config("qwen2")), tmp_path)
    assert offloaded.get_input_embeddings().weight.is_meta
    assert rmodels.sites(rmodels.with_proven_gates(offloaded)) == rmodels.SITES


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_bfloat16_is_proven_where_single_units_move_little(name):
    model = rmodels.with_proven_gates(tiny_model(tiny_config(name)).to(torch.bfloat16))
    assert rmodels.sites(model) == rmodels.SITES


def test_bfloat16_is_proven_too(tmp_path):
    tiny_model(tiny_config("qwen2")).save_pretrained(tmp_path)
    assert set(rmodels.sites(rmodels.load(tmp_path, dtype="bfloat16", device="cpu"))) == set(DENSE)


# --- tiny models, and the command that tries all families


def test_tiny_models_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one, other = (tiny_model(tiny_config("gpt2")).state_dict() for _ in range(2))
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(bias.any() for name, bias in one.items() if name.endswith("bias"))


def test_tiny_configs_keep_every_kind_of_layer():
    config = tiny_config("qwen3_5").get_text_config()
    assert config.layer_types == ["linear_attention", "full_attention"] * 2
    assert tiny_config("jamba").layer_types.count("full_attention") == 2


def test_the_command_tries_families_and_writes_what_it_saw(tmp_path, capsys):
    out = tmp_path / "models.md"
    command.main(["--only", "llama", "mamba2", "bert", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1/3 llama: sites attention ffn neuron layer, proof ")
    assert "LoRA yes" in lines[0]
    assert lines[2].startswith("3/3 bert: sites -, proof -") and "no causal language model" in lines[2]
    text = out.read_text()
    assert "Of 3 model types, 2 can be steered" in text and f"--only llama mamba2 bert --out {out}" in text
    assert re.search(r"^\| attention \| 2 \|", text, re.M) and re.search(r"^\| ffn \| 1 \|", text, re.M)
    assert re.search(r"^\| mamba2 \| Mamba2ForCausalLM \| attention layer \|", text, re.M)
    assert re.search(r"^\| bert \| BertLMHeadModel \| BertLMHeadModel is no causal", text, re.M)


def test_one_family_that_fails_is_a_row(monkeypatch, capsys):
    build = command.tiny_model
    monkeypatch.setattr(command, "tiny_model", lambda config: 1 / 0 if config.model_type == "gpt2" else build(config))
    command.main(["--only", "gpt2", "qwen2"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert (
        "cannot be built small: ZeroDivisionError: division by zero" in first
        and "qwen2: sites attention ffn neuron layer" in second
    )


def test_a_fold_that_differs_is_no_fold(monkeypatch):
    fold = command._folded
    monkeypatch.setattr(command, "_folded", lambda model, plan, ids: fold(model, plan, ids) * 1.001)
    family = command.try_family("llama")
    assert (
        not family.fold
        and "differs by 1e-03" in family.reasons["fold ffn"]
        and set(family.lora) == {"attention", "ffn", "neuron"}
    )


def test_an_unknown_type_is_one_line():
    with pytest.raises(AUSteerError, match="no language model of type 'nonesuch'"):
        command.main(["--only", "nonesuch"])


@pytest.mark.slow
def test_every_family_is_as_the_document_says():
    """A new release of transformers changes rows: look at them, then `python main.py models --out docs/models.md`."""
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    sites = dict(re.findall(r"^\| (\S+) \| \w+ \| ((?:attention|ffn|neuron|layer)[a-z ]*) \|", text, re.M))
    families = [command.try_family(name) for name in sorted(CLASSES)]
    assert {family.model_type: " ".join(family.proof) for family in families if family.proof} == sites
    for site, at_least in (("attention", 190), ("ffn", 180), ("neuron", 180)):
        assert sum(site in family.proof for family in families) >= at_least, site
        assert sum(site in family.fold for family in families) >= at_least, site
    assert sum("layer" in family.proof for family in families) >= 185
    assert all(bool(family.proof) != ("" in family.reasons) for family in families)  # what is steered ran to the end
