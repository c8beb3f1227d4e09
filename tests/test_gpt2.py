"""GPT-2, which gets its gates by structure: every method that reads its modules, and NeuroSteer as its authors run it."""

import copy
import json
import sys
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON, PAIRS, byte_tokenizer, save_tiny
from tokenizers import pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Tokenizer

import rmodels
from austeer.code_identity import reachable
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods import neurosteer as method
from austeer.methods.choice import by_head
from austeer.methods.neurosteer import Neurons
from austeer.methods.restore_lcc import remaining_heads
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.sae import SAE, convert
from austeer.steering import steer
from experiments import neurosteer

WIDTH, LATENTS = 48, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = AutoConfig.for_model("gpt2", **COMMON, n_inner=80)
    return save_tiny(tmp_path_factory.mktemp("tiny") / "gpt2", config)


@pytest.fixture(scope="module")
def model(folder):
    return rmodels.load(folder, dtype="float32", device="cpu")


def test_deep_copies_steer_apart(model):
    ids, twin = torch.tensor([[1, 40, 77, 130, 9]]), copy.deepcopy(model)
    vanilla = model(ids).logits
    for site in rmodels.sites(model):
        scale = torch.zeros(rmodels.site_shape(model, site))
        scale[:, 3] = 1.5
        with steer(twin, Plan({site: scale}, {})):
            steered = twin(ids).logits
            assert torch.equal(model(ids).logits, vanilla) and not torch.equal(steered, vanilla)
        with steer(model, Plan({site: scale}, {})):
            assert torch.equal(model(ids).logits, steered) and torch.equal(twin(ids).logits, vanilla)


@pytest.mark.parametrize("site", rmodels.SITES)
def test_compiles_without_a_graph_break(model, site):
    ids, scale = torch.tensor([[1, 40, 77, 130, 9]]), torch.zeros(rmodels.site_shape(model, site))
    scale[:, 3] = 1.5
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with steer(model, Plan({site: scale}, {})):
        assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-4)
    torch.compiler.reset()


# methods that look into modules


def keep_last(rows, function, args, out):
    rows.append(out.reshape(-1, out.shape[-1])[-1])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi3"])
def test_activations_of_the_nonlinearity_are_what_the_activation_function_returns(family, tmp_path, tokenizer):
    special = dict(ffn_dim=80, word_embed_proj_dim=48) if family == "opt" else {}
    tiny = save_tiny(tmp_path, AutoConfig.for_model(family, **COMMON, **special))
    evidence = Evidence(
        rmodels.load(tiny, dtype="float32", device="cpu"), tokenizer, [Pair(*p) for p in PAIRS], "neuron"
    )
    right, wrong = evidence.activations("last", nonlinearity=True)
    upstream = AutoModelForCausalLM.from_pretrained(tiny).eval()
    names = ("act", "act_fn", "activation_fn")
    functions = [part for name, part in upstream.named_modules() if name.rpartition(".")[2] in names]
    assert len(functions) == 3
    for pair, actual in zip(evidence.pairs, zip(right, wrong, strict=True), strict=True):
        for answer, ours in zip(pair[1:], actual, strict=True):
            rows = []
            with ExitStack() as undo, torch.no_grad():
                for function in functions:
                    undo.callback(function.register_forward_hook(partial(keep_last, rows)).remove)
                upstream(torch.tensor([tokenizer(pair.prompt + answer)["input_ids"]]))
            assert torch.allclose(ours, torch.stack(rows), atol=1e-4)


def test_an_mlp_without_an_activation_function_is_refused(folder, tokenizer):
    model = rmodels.load(folder, dtype="float32", device="cpu")
    model.transformer.h[1].mlp.act = torch.nn.Identity()
    evidence = Evidence(model, tokenizer, [Pair(*p) for p in PAIRS], "neuron")
    with pytest.raises(
        AUSteerError, match="layer 1 of GPT2LMHeadModel has no modules that are the activation function"
    ):
        evidence.activations("last", nonlinearity=True)


def test_heads_of_a_layer_without_heads_are_refused():
    with pytest.raises(AUSteerError, match="the 50 AUs at site attention of gpt2 are not those of 4 attention heads"):
        by_head(torch.zeros(3, 50), AutoConfig.for_model("gpt2", **COMMON))
    with pytest.raises(AUSteerError, match="of mamba are not those of 0 attention heads"):
        by_head(torch.zeros(3, 48), AutoConfig.for_model("mamba"))


def test_heads_that_the_projection_still_reads(folder):
    model = rmodels.load(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[24:36] = 0  # a Conv1D: inputs are its rows
    assert remaining_heads(model).tolist() == [layer != 1 or head != 2 for layer in range(3) for head in range(4)]


def test_records_depend_on_the_code_that_places_gates_and_not_on_upstreams(model, llama):
    roots = rmodels.code_roots(type(model))
    reached = reachable(*roots)
    assert "rmodels.structural:add_gates" in reached and not any(name.startswith("transformers") for name in reached)
    assert "rmodels.structural:add_gates" not in reachable(*rmodels.code_roots(type(llama)))


# sparse autoencoders


def random_sae(layer: int, seed: int = 0) -> SAE:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (WIDTH, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    return SAE(**{name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, layer=layer)


def of_sae_lens(centered: bool, **metadata):
    """Return what sae-lens loads, as far as it is read here."""
    config = SimpleNamespace(
        architecture=lambda: "standard", normalize_activations="none", apply_b_dec_to_input=centered,
        metadata=SimpleNamespace(hook_name="blocks.2.hook_resid_pre", model_name="gpt2-small", **metadata),
    )  # fmt: skip
    return SimpleNamespace(cfg=config, **{key: value for key, value in random_sae(1)._tensors().items()})


@pytest.mark.parametrize("centered", [False, True])
def test_an_sae_of_a_centered_stream_takes_the_mean_out_itself(centered):
    h = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1)) + 2.0
    plain = convert(of_sae_lens(centered, model_from_pretrained_kwargs={}), "plain")
    ours = convert(of_sae_lens(centered, model_from_pretrained_kwargs={"center_writing_weights": True}), "jb")
    z = ours.encode(h)
    assert torch.allclose(z, plain.encode(h - h.mean(1, keepdim=True)), atol=1e-4) and ours.layer == 1
    assert not torch.allclose(z, plain.encode(h), atol=1e-2) and torch.equal(ours.W_dec, plain.W_dec)


@torch.no_grad()
def test_a_centered_stream_is_the_stream_without_its_mean_and_answers_alike(folder):
    """This is what the SAE may assume: all weights that write to the stream are centered, as TransformerLens does it."""
    plain, centered = (AutoModelForCausalLM.from_pretrained(folder).eval().transformer for _ in range(2))
    for name, weight in centered.named_parameters():
        if name.startswith(("wte", "wpe")) or "c_proj" in name:  # outputs are the last axis of a Conv1D
            weight -= weight.mean(-1, keepdim=True)
    ids = torch.tensor([[1, 40, 77, 130, 9, 200, 31]])
    theirs, ours = centered(ids, output_hidden_states=True), plain(ids, output_hidden_states=True)
    for h, free in zip(ours.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
        assert torch.allclose(h - h.mean(-1, keepdim=True), free, atol=1e-5) and not torch.allclose(h, free, atol=1e-2)
    assert torch.allclose(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5)


# NeuroSteer's own tasks


def own_tokenizer() -> GPT2Tokenizer:
    """Return a tokenizer that, like the published one, has a BOS, does not use it, and has no padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return GPT2Tokenizer(vocab={token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}, merges=[])


def counted_by_hand(folder, sae, texts):
    """Run upstream on each whole text after BOS, and count how often each neuron fires at the input of block 2."""
    upstream, tokenizer, rows = AutoModelForCausalLM.from_pretrained(folder).eval(), own_tokenizer(), []
    with torch.no_grad():
        upstream.transformer.h[2].register_forward_pre_hook(lambda block, args: rows.append(args[0][0]))
        for text in texts:
            upstream(torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]))
    return sum((sae.encode(h) > 0).sum(0) for h in rows)


def test_the_authors_setting_is_found_by_the_models_name(folder, tmp_path, monkeypatch, capsys):
    """Only the model is named: the SAE, which reads a centered stream, alpha, K and mode are the authors'."""
    own_tokenizer().save_pretrained(folder)
    theirs = of_sae_lens(True, model_from_pretrained_kwargs={"center_writing_weights": True})
    asked = []
    package = SimpleNamespace(SAE=SimpleNamespace(from_pretrained=lambda *name: asked.append(name) or theirs))
    monkeypatch.setitem(sys.modules, "sae_lens", package)
    monkeypatch.setitem(
        method.PRESETS, "stance", method.Preset(15.0, 10, "all")
    )  # the tiny SAE has 60 neurons, not 24,576
    rows = [{"text": f"text {i} that I {label}", "label": label} for i in range(20) for label in ("support", "oppose")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    neurosteer.main(["--task", "stance", "--model", str(folder), "--texts", str(tmp_path / "t.jsonl"), "--new-tokens", "4",
                     "--n-prompts", "3", "--device", "cpu", "--results", str(tmp_path), "--quick-proof"])  # fmt: skip
    assert asked == [("gpt2-small-res-jb", "blocks.6.hook_resid_pre")]
    output = capsys.readouterr().out
    assert "10 neurons of layer 1, alpha 15" in output and "steered tokens: prompt" in output
    (file,) = (tmp_path / "neurosteer").glob("*-neurons-*.safetensors")
    sae = convert(theirs, "jb")
    neurons = Neurons.load(file, sae.W_dec)
    held_out = neurosteer.material("stance", tmp_path / "t.jsonl", [], None, 1000, 3, "test")
    for counts, texts in zip(neurons.counts, (held_out.target, held_out.source), strict=True):
        assert torch.equal(counts, counted_by_hand(folder, sae, texts))
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "neurosteer").glob("*.json")]
    assert record["unsteered"] != record["steered"] and record["tokens"] == "prompt"


def test_bos_is_put_before_texts_once():
    theirs, ours = own_tokenizer(), byte_tokenizer()
    assert theirs("ab")["input_ids"][0] != theirs.bos_token_id
    plain = ours("ab")["input_ids"]
    assert neurosteer._with_bos(theirs)("ab")["input_ids"][0] == theirs.bos_token_id
    assert neurosteer._with_bos(ours)("ab")["input_ids"] == plain and plain.count(ours.bos_token_id) == 1
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    ours.backend_tokenizer.post_processor = ends  # which transformers would replace
    assert neurosteer._with_bos(ours)("ab")["input_ids"] == [*plain, 2]
