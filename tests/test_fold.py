"""Folding: the folded checkpoint is the steered model, undoing brings back the very bits, refusals leave nothing."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import COMMON, FAMILIES, SPECIAL, byte_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import BY_STRUCTURE, WITH_VISION, foldable_sites, plan_in_every_layer, save_family
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Concatenate

import rmodels
from austeer.errors import AUSteerError
from austeer.export import command
from austeer.export.checkpoint import Checkpoint
from austeer.export.fold import CERTIFICATE, PLAN, UNDO, fold, unfold
from austeer.export.gguf_lora import save_gguf_lora
from austeer.export.hot_patch import folded
from austeer.export.ia3 import save_ia3
from austeer.export.lora import save_lora
from austeer.export.weights import DIMENSIONS, Edit, find_edits
from austeer.files import sha256
from austeer.identity import model_header
from austeer.plan import Plan
from austeer.ranks import AURanks
from austeer.steering import steer
from rmodels import LinearMap

ROOT = Path(__file__).parents[1]
IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 88, 12, 254, 17, 99, 43, 66, 71, 20], list(range(30, 47))])
SITES = list(itertools.product(FAMILIES, ("attention", "ffn", "neuron")))
GRID = [(name, site, "float32") for name, site in SITES] + [
    pytest.param(name, site, "bfloat16", marks=[pytest.mark.slow] if site != "ffn" else []) for name, site in SITES
]
GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(IDS))


def make(folder, name, dtype="float32", shard="100KB", **changes):
    """Save a tiny checkpoint in several shards, without zero weights or biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**COMMON, **SPECIAL[name], **changes}))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias"):
                weight.normal_(std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder, dtype="float32"):
    return rmodels.load(folder, dtype=dtype, device="cpu")


def load_quantised(folder, quantization):
    return rmodels.load(folder, dtype="float32", device="cpu", quantization=quantization)


def some_plan(model, *sites, shift=0.0):
    scales = {site: torch.zeros(rmodels.site_shape(model, site)) for site in sites}
    for site, scale in scales.items():
        scale[:, 3] = 1.5
        for gate in list(rmodels.gates(model, site))[1:]:
            scale[gate.layer, gate.width - 2] = -0.6
    shifts = {site: torch.zeros(scale.shape) for site, scale in scales.items()} if shift else {}
    for values in shifts.values():
        values[:, 3], values[:, 7] = shift, -shift
    return Plan(scales, shifts, header=model_header(model))


def bits(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "source", "llama")


@pytest.fixture
def plan(source):
    return some_plan(load(source), "attention", "ffn")


@pytest.mark.parametrize(("name", "site", "dtype"), GRID)
def test_folded_is_live_and_undone_bit_for_bit(tmp_path, name, site, dtype):
    source = make(tmp_path / "source", name, dtype)
    plan = some_plan(load(source, dtype), site)
    fold(source, plan, tmp_path / "out", certificate=False)
    live, ours = load(source), load(tmp_path / "out")  # in float32 arithmetic only the rounding of the weights is left
    vanilla = live(IDS).logits
    with steer(live, plan):  # the plan was made in dtype, whose bits differ from float32, so only shapes are compared
        expected, text = live(IDS).logits, live.generate(IDS, **GREEDY)
    difference = (ours(IDS).logits - expected).abs().max()
    assert (expected - vanilla).abs().max() > 0.5
    assert difference < (1e-4 if dtype == "float32" else 2e-2 * expected.abs().max())
    if dtype == "float32":
        assert torch.equal(ours.generate(IDS, **GREEDY), text)
    else:
        assert (ours(IDS).logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97
    unfold(tmp_path / "out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source) != bits(tmp_path / "out")
    with folded(load(source, dtype), plan) as patched:
        there = load(tmp_path / "out", dtype).state_dict()
        assert all(torch.equal(weight, there[key]) for key, weight in patched.state_dict().items())


@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_experts_one_by_one_and_fused(tmp_path, layout):
    source = make(tmp_path / "source", "qwen3_moe", shard="1GB")
    model = load(source)
    if layout == "fused":
        fused = {key: weight.contiguous() for key, weight in model.state_dict().items()}
        save_file(fused, source / "model.safetensors", {"format": "pt"})
    names = list(load_file(source / "model.safetensors"))
    assert ("model.layers.0.mlp.experts.down_proj" in names) == (layout == "fused")
    plan = some_plan(model, "ffn")
    fold(source, plan, tmp_path / "out", certificate=False)
    with steer(model, plan):
        assert (load(tmp_path / "out")(IDS).logits - model(IDS).logits).abs().max() < 1e-4
    unfold(tmp_path / "out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("gpt2", "bloom", "gpt_oss", "mixtral", "qwen3_next") else pytest.mark.slow
        )
        for name in [*BY_STRUCTURE, *WITH_VISION]
    ],
)
def test_any_decoder_is_folded_by_structure(tmp_path, name):
    """Conv1D, fused and transposed experts, layers of different width, names and prefixes that only files have."""
    source = save_family(tmp_path / "source", name)
    model = load(source)
    plan = plan_in_every_layer(model, foldable_sites(model))
    fold(source, plan, tmp_path / "out", certificate=False)
    vanilla = model(IDS).logits
    with steer(model, plan):
        expected = model(IDS).logits
    with folded(model, plan):
        assert (model(IDS).logits - expected).abs().max() < 1e-4
    assert torch.equal(model(IDS).logits, vanilla)
    assert (load(tmp_path / "out")(IDS).logits - expected).abs().max() < 1e-4 < 0.5 < (expected - vanilla).abs().max()
    unfold(tmp_path / "out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source) != bits(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("gpt_oss", "mixtral") else pytest.mark.slow)
        for name in [*BY_STRUCTURE, *WITH_VISION]
    ],
)
def test_certificates_of_any_decoder(tmp_path, name):
    source = save_family(tmp_path / "source", name)
    model = load(source)
    parity = fold(source, plan_in_every_layer(model, foldable_sites(model)), tmp_path / "out")
    moves = parity["steering_moves_logits_by"]
    assert parity["algebra"]["max_logit_difference"] < 1e-4 * moves and moves > 0.5
    assert parity["rounding"]["max_logit_difference"] < 1e-4 * moves
    assert parity["file"]["tensors_compared"] == len(Checkpoint(source).places)
    assert parity["unchanged_by_rounding"] == {}


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_shifts_of_any_decoder_become_biases(tmp_path, name):
    source = save_family(tmp_path / "source", name)
    model = load(source)
    sites = [site for site in foldable_sites(model) if (name, site) != ("gpt_oss", "ffn")]
    plan = plan_in_every_layer(model, sites, shift=0.7)
    fold(source, plan, tmp_path / "out", certificate=False)
    plain = Plan(plan.scales)
    with steer(model, plain):
        unshifted = model(IDS).logits
    with steer(model, plan):
        expected = model(IDS).logits
    assert (load(tmp_path / "out")(IDS).logits - expected).abs().max() < 1e-4 < (expected - unshifted).abs().max()


@pytest.mark.parametrize("transposed", [False, True])
def test_neurons_of_fused_experts(transposed):
    """Each expert has inputs of its own; its slice does the same to its own weight, where experts are stored apart."""
    torch.manual_seed(0)
    experts, inputs, outputs = 3, 5, 4
    axes = (-2, -1) if transposed else (-1, -2)
    shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
    weight, bias, x = torch.randn(shape), torch.randn(experts, outputs), torch.randn(experts, inputs)
    scale, shift = torch.randn(experts, inputs), torch.randn(experts, inputs)
    scale[:, 2] = 0
    out_scale = torch.tensor([0.0, 2.0, 0.0, -0.5])
    edit = Edit(0, "neuron", LinearMap("weight", "bias", *axes), scale, shift, out_scale, torch.zeros(outputs))

    def forward(weight, bias, x):
        return torch.einsum("eio,ei->eo" if transposed else "eoi,ei->eo", weight, x) + bias

    def edited(edit, weight, bias):
        tensors = {edit.weight: weight.clone(), edit.bias: bias.clone()}
        for change in edit.changes(weight, bias):
            tensors[change.tensor].index_copy_(DIMENSIONS[change.part], change.index, change.new)
        return tensors.values()

    expected = forward(weight, bias, x * (1 + scale) + shift) * (1 + out_scale)
    assert torch.allclose(forward(*edited(edit, weight, bias), x), expected, atol=1e-5)
    pieces = [edited(edit.of_expert(e, edit.map), weight[e], bias[e]) for e in range(experts)]
    assert torch.allclose(forward(*map(torch.stack, zip(*pieces, strict=True)), x), expected, atol=1e-5)


def test_aus_that_a_layer_lacks_are_refused_by_name(tmp_path):
    source = save_family(tmp_path / "source", "qwen3_next")  # layer 0 has 32 AUs at site attention, layer 1 has 80
    checkpoint = Checkpoint(source)
    plan = Plan({"attention": torch.zeros(4, 80)})
    plan.scales["attention"][1, 40] = 1.0
    assert [edit.weight for edit in checkpoint.edits(plan)] == ["model.layers.1.self_attn.o_proj.weight"]
    plan.scales["attention"][0, 40] = 1.0
    with pytest.raises(AUSteerError, match="AU 40 at site attention of layer 0, which has only 32"):
        fold(source, plan, tmp_path / "out", certificate=False)
    with pytest.raises(AUSteerError, match="layer 0 of this mamba2 model has no weight at site ffn"):
        find_edits(Plan({"ffn": torch.ones(4, 64)}), Checkpoint(save_family(tmp_path / "mamba", "mamba2")).skeleton)


def test_shifts_of_mixtures_are_refused(tmp_path):
    """A router weighs its experts, and would weigh a shift that is in their biases."""
    shift = Plan({}, {"ffn": torch.ones(4, 64)})
    for name, reason in (("gpt_oss", "which weighs many experts"), ("qwen2_moe", "experts have no biases")):
        with pytest.raises(AUSteerError, match=reason):
            fold(save_family(tmp_path / name, name), shift, tmp_path / "out", certificate=False)


def test_shifts_of_experts_in_modules_of_their_own_are_refused(tmp_path, monkeypatch):
    model = load(make(tmp_path / "source", "llama", mlp_bias=True))
    linears = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    experts = [(0, None, "ffn", LinearMap(f"{name}.weight", f"{name}.bias", -1, -2)) for name in linears]
    monkeypatch.setattr("austeer.export.weights.linear_maps", lambda model: experts)
    with pytest.raises(AUSteerError, match="which weighs many experts"):
        find_edits(Plan({}, {"ffn": torch.ones(1, 48)}), model)


def test_every_expert_and_the_shared_one(tmp_path):
    checkpoint = Checkpoint(save_family(tmp_path / "source", "qwen2_moe"))
    plan = Plan({"ffn": torch.zeros(4, 64)})
    plan.scales["ffn"][0, 2] = 1.0
    edits = [piece for edit in checkpoint.edits(plan) for piece in checkpoint.in_files(edit)]
    parts = ("experts.0", "experts.1", "experts.2", "experts.3", "shared_expert")
    assert [edit.weight for edit in edits] == [f"model.layers.0.mlp.{part}.down_proj.weight" for part in parts]
    assert all(edit.parts()["rows"].tolist() == [2] and list(edit.parts()) == ["rows"] for edit in edits)


def test_tensors_that_cannot_be_changed_in_place_are_refused(tmp_path):
    source = save_family(tmp_path / "source", "mixtral")
    plan = plan_in_every_layer(load(source), ["ffn"])
    checkpoint = Checkpoint(source)
    edit, name = checkpoint.edits(plan)[0], "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    checkpoint.shapes[name] = (96, 64)
    with pytest.raises(AUSteerError, match=rf"{name} has shape \(96, 64\), the model's .*down_proj wants \(64, 96\)"):
        checkpoint.in_files(edit)
    checkpoint.origins[edit.weight].converter.operations.append(Concatenate(dim=1))
    with pytest.raises(
        AUSteerError, match=r"experts.0.w2.weight is one of several tensors that .*down_proj is computed"
    ):
        checkpoint.in_files(edit)


def test_shifts_become_biases_where_there_are_any(tmp_path):
    source = make(tmp_path / "source", "llama", attention_bias=True, mlp_bias=True, shard="20KB")
    model = load(source)
    plan = some_plan(model, "attention", "ffn", "neuron", shift=0.7)
    fold(source, plan, tmp_path / "out", certificate=False)
    vanilla = model(IDS).logits
    with steer(model, plan):
        expected = model(IDS).logits
    assert (load(tmp_path / "out")(IDS).logits - expected).abs().max() < 1e-4 < (expected - vanilla).abs().max()
    unfold(tmp_path / "out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)
    with folded(model, plan):
        assert (model(IDS).logits - expected).abs().max() < 1e-4
    assert torch.equal(model(IDS).logits, vanilla)


def test_tied_weights_and_what_no_plan_names_stay(tmp_path):
    source = make(tmp_path / "source", "gemma2", shard="1GB")
    fold(source, some_plan(load(source), "ffn"), tmp_path / "out", certificate=False)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in before and load(tmp_path / "out").config.tie_word_embeddings
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)
    }


def test_certificate_and_what_lies_in_the_folder(source, plan, tmp_path):
    (source / "pytorch_model.bin").write_text("a pickle")
    (source / "modeling.py").write_text("code")
    parity = fold(source, plan, tmp_path / "out")
    assert parity == json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert parity["algebra"]["max_logit_difference"] <= 1e-4 < parity["steering_moves_logits_by"]
    assert parity["rounding"]["max_logit_difference"] <= 1e-4 and parity["rounding"]["greedy_agreement"] == 1.0
    assert parity["weights"] == "float32" and parity["unchanged_by_rounding"] == {}
    assert parity["fingerprint"] == plan.header["fingerprint"]
    assert parity["file"]["tensors_compared"] == len(Checkpoint(source).places)
    assert parity["sha256"] == {
        "plan": sha256(tmp_path / "out" / PLAN),
        **{
            which: {name: sha256(folder / name) for name in Checkpoint(source).files}
            for which, folder in (("original", source), ("folded", tmp_path / "out"))
        },
    }
    assert parity["receipt"]["aus"] == len(plan) and parity["receipt"]["positions"] > parity["positions"]
    assert Plan.load(tmp_path / "out" / PLAN).aus() == plan.aus()
    theirs, ours = ({path.name for path in folder.iterdir()} for folder in (source, tmp_path / "out"))
    assert theirs - ours == {"pytorch_model.bin", "modeling.py"} and ours - theirs == {"austeer"}
    assert (
        len(list((tmp_path / "out").glob("*.safetensors"))) == len(Checkpoint(source).files) > 1
    )  # engines load these
    assert rmodels.load_tokenizer(tmp_path / "out")("a").input_ids == byte_tokenizer()("a").input_ids


FEW = [
    ("llama", "float32", 1),
    ("qwen3_moe", "bfloat16", 20),
    ("gemma2", "float16", 0.001),
    ("llama", "bfloat16", 0.001),
]


@pytest.mark.parametrize(
    ("name", "dtype", "strength"),
    [
        pytest.param(*case, marks=[] if case in FEW else pytest.mark.slow)
        for case in itertools.product(FAMILIES, ("float32", "bfloat16", "float16"), (0.001, 1, 20))
    ],
)
def test_certificates_whatever_the_dtype_and_the_strength(tmp_path, name, dtype, strength):
    """Only what rounding erases is refused: 1.001 is 1 in bfloat16. With experts, rounding sends tokens elsewhere."""
    source = make(tmp_path / "source", name, dtype)
    plan = some_plan(load(source, dtype), "attention", "ffn")
    for scale in plan.scales.values():
        scale *= strength
    if (dtype, strength) == ("bfloat16", 0.001):
        with pytest.raises(AUSteerError, match="bfloat16 cannot hold this plan"):
            fold(source, plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    parity = fold(source, plan, tmp_path / "out")
    assert parity["algebra"]["max_logit_difference"] < 5e-4
    assert parity["weights"] == dtype and parity["unchanged_by_rounding"] == {}
    assert parity["rounding"]["max_logit_difference"] < 0.2 * parity["steering_moves_logits_by"]


def test_rounding_that_drowns_the_plan_is_refused(tmp_path):
    """In bfloat16, 1.0022 changes only some numbers of a column."""
    source = make(tmp_path / "source", "llama", "bfloat16")
    plan = some_plan(load(source, "bfloat16"), "attention")
    for values in plan.scales.values():
        values[values != 0] = 0.0022
    with pytest.raises(AUSteerError, match="bfloat16 cannot hold this plan: rounding its weights moves logits by"):
        fold(source, plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_rounding_erases_is_refused_or_named(tmp_path):
    source = make(tmp_path / "source", "llama", "bfloat16")
    model = load(source, "bfloat16")
    plan = some_plan(model, "attention", "ffn")
    weak = Plan({site: 0.001 * (scale != 0) for site, scale in plan.scales.items()}, header=plan.header)
    with pytest.raises(AUSteerError, match="every row and column it scales is what it was"):
        fold(source, weak, tmp_path / "out", certificate=False)
    with pytest.raises(AUSteerError, match="cannot hold this plan"), folded(model, weak):
        pass
    plan.scales["ffn"][0, 3] = 0.001
    assert fold(source, plan, tmp_path / "out")["unchanged_by_rounding"] == {
        "rows of model.layers.0.mlp.down_proj.weight": [3]
    }


def wrong_file(monkeypatch):
    """Change one number of each tensor by one step."""
    write = Checkpoint.write

    def near(self, name, tensor):
        tensor = tensor.clone()
        tensor[0, 0] = torch.nextafter(tensor[0, 0], torch.tensor(9.0))
        write(self, name, tensor)

    monkeypatch.setattr(Checkpoint, "write", near)


def wrong_algebra(monkeypatch):
    changes = Edit.changes
    monkeypatch.setattr(Edit, "changes", lambda self, *weights: changes(self, *weights)[:1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda patch: patch.setattr(Checkpoint, "write", lambda *_: None), "is not the steered model: .* differs"),
        (wrong_file, "is not the steered model: .* differs"),
        (wrong_algebra, "is not the plan live: in float32 logits differ by"),
    ],
)
def test_a_wrong_fold_has_no_certificate(tmp_path, monkeypatch, spoil, message):
    source = make(tmp_path / "source", "llama")
    plan = some_plan(load(source), "ffn", "neuron")
    spoil(monkeypatch)
    monkeypatch.setattr("austeer.export.fold.save_readable", lambda tensors, path, metadata: None)
    with pytest.raises(AUSteerError, match=message):
        fold(source, plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def scope(plan):
    plan.tokens = "generated"


def other_weights(plan):
    plan.header["fingerprint"] = "0" * 64


def other_family(plan):
    plan.header["family"] = "qwen3"


def fewer_layers(plan):
    plan.scales["ffn"] = plan.scales["ffn"][:2]


def residual(plan):
    plan.scales["layer"] = plan.scales.pop("ffn")


def shifted(plan):
    plan.shifts["ffn"] = plan.scales["ffn"]


def nothing(plan):
    plan.scales = {"ffn": torch.zeros(3, 48)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (residual, "site layer cannot go into weights: the residual stream runs past"),
        (scope, "acts on every token, but the plan steers only 'generated'"),
        (shifted, r"a shift becomes a bias, but model.layers.0.mlp.down_proj.weight has none"),
        (nothing, "the plan touches no AU"),
        (other_weights, "made on other weights"),
        (other_family, "made for a qwen3 model"),
        (fewer_layers, "2 layers of 48 AUs; this model has 3 of 48"),
    ],
)
def test_plans_that_are_refused_leave_nothing(source, plan, tmp_path, spoil, message):
    spoil(plan)
    with pytest.raises(AUSteerError, match=message):
        fold(source, plan, tmp_path / "out", certificate=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_plan_made_in_another_precision_is_compared_too(source, tmp_path):
    plan = some_plan(load(source, "bfloat16"), "ffn")
    fold(source, plan, tmp_path / "out", certificate=False)
    with pytest.raises(AUSteerError, match="made on other weights"):
        fold(
            make(tmp_path / "else", "llama", rope_theta=5e5, attention_bias=True),
            plan,
            tmp_path / "no",
            certificate=False,
        )


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_fingerprints_of_files_are_those_of_models(tmp_path, name):
    """With tied heads, and experts stored one by one, the tensors on disk are not those in memory."""
    source = make(tmp_path / "source", name)
    Checkpoint(source).check_plan(some_plan(load(source), "ffn"))


def test_fingerprints_of_models_that_keep_a_part_in_float32(tmp_path):
    source = save_family(tmp_path / "source", "gpt_oss")
    model = load(source, "float16")
    assert {weight.dtype for weight in model.parameters()} == {torch.float16, torch.float32}
    plan = plan_in_every_layer(model, ["ffn"])
    assert plan.header["precision"] == "float16"
    Checkpoint(source).check_plan(plan)


def test_checkpoints_that_are_refused_leave_nothing(source, plan, tmp_path):
    def refused(message):
        with pytest.raises(AUSteerError, match=message):
            fold(source, plan, tmp_path / "out", certificate=False)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    shard = max(source.glob("model-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    refused("missing or damaged")
    shard.unlink()
    refused("missing or damaged")
    shard.write_bytes(whole)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    refused("is quantised")
    (source / "config.json").write_text(json.dumps(config))
    index = source / "model.safetensors.index.json"
    kept = index.read_text()
    index.write_text(kept.replace("model-00001", "../model-00001"))
    refused("outside its folder")
    index.unlink()
    refused("only safetensors checkpoints")
    with pytest.raises(AUSteerError, match="is not a folder, and the hub does not offer it"):
        fold("nobody/nothing", plan, tmp_path / "out")
    index.write_text(kept)
    with pytest.raises(AUSteerError, match="exists already"):
        fold(source, plan, source)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("fold", 1024),
        ("fold", 30_000),
        ("lora", 1024),
        ("lora", 4000),
        ("ia3", 1024),
        ("ia3", 512),
        ("gguf", 512),
        ("gguf", 1024),
        ("gguf", 4000),
    ],
)
def test_a_full_disk_leaves_nothing(source, plan, tmp_path, kind, size):
    """A limit on the size of files stands in for a full disk: the kernel refuses the write."""
    save = {"fold": partial(fold, certificate=False), "lora": save_lora, "ia3": save_ia3, "gguf": save_gguf_lora}[kind]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(AUSteerError, match=r"cannot write .*: .*(File too large|incomplete)"):
            save(source, plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupt_leaves_nothing(source, plan, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fold(source, plan, tmp_path / "out", certificate=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_overflow_is_refused(tmp_path):
    source = make(tmp_path / "source", "llama", "float16")
    plan = some_plan(load(source, "float16"), "ffn")
    plan.scales["ffn"] *= 1e6
    with pytest.raises(AUSteerError, match=r"would overflow in torch\.float16"):
        fold(source, plan, tmp_path / "out", certificate=False)


def test_a_changed_fold_is_not_undone(source, plan, tmp_path):
    with pytest.raises(AUSteerError, match="was not folded by this project"):
        unfold(source, tmp_path / "back")
    fold(source, plan, tmp_path / "out", certificate=False)
    changed = Checkpoint(tmp_path / "out")
    changed.write("model.norm.weight", changed.read("model.norm.weight") + 1)
    with pytest.raises(AUSteerError, match="was changed after it was folded"):
        unfold(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_command(source, plan, tmp_path, capsys):
    ranks = AURanks("ffn", plan.scales["ffn"], plan.scales["ffn"].clone(), header=plan.header)
    ranks.save(tmp_path / "ranks.safetensors")
    command.main(
        [
            f"--model={source}",
            f"--ranks={tmp_path / 'ranks.safetensors'}",
            "--k=4",
            "--alpha=1",
            f"--fold={tmp_path / 'out'}",
        ]
    )
    assert (
        "with 4 AUs in its weights" in (output := capsys.readouterr().out) and "greedy tokens agree on 100.0%" in output
    )
    command.main([f"--unfold={tmp_path / 'out'}", f"--out={tmp_path / 'back'}"])
    assert bits(tmp_path / "back") == bits(source)


def test_command_refuses_what_it_would_ignore(source, plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    model, file = f"--model={source}", f"--plan={tmp_path / 'plan.safetensors'}"
    for arguments, message in (
        (["--fold=x"], "--fold needs --model and --plan, or --ranks with --k and --alpha"),
        (["--lora=x", model], "--lora needs --plan, or"),
        (["--fold=x", model, "--ranks=r"], "--fold needs --k and --alpha"),
        (["--unfold=x"], "--unfold needs --out"),
        (["--fold=", model, file], "--fold is empty"),
        (["--fold=x", "--model=", file], "--model is empty"),
        (
            ["--fold=x", model, file, "--k=3", "--alpha=0", "--site=ffn"],
            "with --plan does not take --alpha, --k, --site",
        ),
        (["--fold=x", model, file, "--ranks=r"], "with --plan does not take --ranks"),
        (["--fold=x", model, file, "--out=y"], "does not take --out"),
        (["--lora=x", model, file, "--no-certificate"], "does not take --no-certificate"),
        (["--unfold=x", "--out=y", model], "--unfold does not take --model"),
        (["--fold=x", model, "--ranks=r", "--k=3", "--alpha=1", "--site=ffn"], "r names its site itself"),
    ):
        with pytest.raises(AUSteerError, match=message):
            command.main(arguments)


@pytest.mark.parametrize("kind", ["fold", "lora", "ia3", "gguf"])
def test_a_place_that_is_taken_is_refused_before_the_weights_are_read(source, plan, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Checkpoint, "check_plan", lambda *_: pytest.fail("the weights were read"))
    plan.save(tmp_path / "plan.safetensors")
    given = [f"--model={source}", f"--plan={tmp_path / 'plan.safetensors'}"]
    with pytest.raises(AUSteerError, match="exists already"):
        command.main([*given, f"--{kind}={tmp_path / 'plan.safetensors'}"])
    with pytest.raises(AUSteerError, match=r"cannot write .*plan.safetensors is not a folder"):
        command.main([*given, f"--{kind}={tmp_path / 'plan.safetensors' / 'out'}"])


def test_shared_aus_are_reported_and_the_sum_keeps_its_parts(source, plan, tmp_path, capsys):
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for k, path in enumerate(paths):
        plan.header["k"] = k
        plan.save(path)
    command.main([f"--model={source}", "--plan", *paths, f"--fold={tmp_path / 'out'}", "--no-certificate"])
    assert f"note: {len(plan)} AUs are in several plans; their scales add" in capsys.readouterr().out
    added = Plan.load(tmp_path / "out" / PLAN)
    assert [part["k"] for part in added.header["sum_of"]] == [0, 1]
    assert [part.get("k") for part in (added + plan).header["sum_of"]] == [0, 1, 1]


def test_what_the_certificate_needs_is_checked_before_the_copy(source, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "copy_to", lambda *_: pytest.fail("it was copied"))
    whole = load_file(source / "model-00001-of-00004.safetensors")
    name = next(name for name in whole if name.endswith("o_proj.weight"))
    save_file({**whole, name: whole[name].double()}, source / "model-00001-of-00004.safetensors", {"format": "pt"})
    with pytest.raises(AUSteerError, match="is stored as F64"):
        fold(source, plan, tmp_path / "out")
    save_file(whole, source / "model-00001-of-00004.safetensors", {"format": "pt"})
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(AUSteerError, match="cannot load the tokenizer"):
        fold(source, plan, tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, tensors: path.write_bytes(path.read_bytes()[:-9]),
        lambda path, tensors: path.write_bytes(b""),
        lambda path, tensors: save_file(tensors, path),
        lambda path, tensors: save_file(tensors, path, {"format": "austeer-undo-1", "sha256": "["}),
        lambda path, tensors: save_file(tensors, path, {"format": "austeer-undo-1", "sha256": '{"../x": "0"}'}),
        lambda path, tensors: rewritten(path, {key: t for key, t in tensors.items() if key.startswith("at.")}),
        lambda path, tensors: rewritten(
            path, {key: t + 999 if t.dtype == torch.int32 else t for key, t in tensors.items()}
        ),
        lambda path, tensors: rewritten(path, {key.replace("layers.0", "layers.9"): t for key, t in tensors.items()}),
    ],
)
def test_a_damaged_undo_file(source, plan, tmp_path, damage):
    fold(source, plan, tmp_path / "out", certificate=False)
    undo = tmp_path / "out" / UNDO
    damage(undo, load_file(undo))
    with pytest.raises(AUSteerError, match=r"undo\.safetensors is damaged, or belongs to another checkpoint"):
        unfold(tmp_path / "out", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def rewritten(path, tensors):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


def test_reading_errors_are_reported_as_such(source, plan, tmp_path):
    (source / "LICENSE").symlink_to(source / "nothing")
    (source / "notes.txt").mkdir()
    config = source / "generation_config.json"
    config.unlink()
    config.symlink_to("/proc/self/mem")  # can be opened but not read
    with pytest.raises(AUSteerError, match=r"cannot read .*generation_config.json: Input/output error"):
        fold(source, plan, tmp_path / "out", certificate=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_single_file_beside_an_index_is_what_is_folded(source, tmp_path):
    model = load(source)
    model.save_pretrained(tmp_path / "single")
    index = "model.safetensors.index.json"
    shutil.copy(source / index, tmp_path / "single" / index)
    fold(tmp_path / "single", some_plan(model, "ffn"), tmp_path / "out", certificate=False)
    assert not (tmp_path / "out" / index).exists()
    assert (source / index).exists() and load(tmp_path / "out")


def test_a_fold_is_not_folded_again(source, plan, tmp_path):
    fold(source, plan, tmp_path / "out", certificate=False)
    again = some_plan(load(tmp_path / "out"), "ffn")
    with pytest.raises(AUSteerError, match="is folded already: --unfold it"):
        fold(tmp_path / "out", again, tmp_path / "twice", certificate=False)
    (tmp_path / "out" / UNDO).unlink()
    fold(tmp_path / "out", again, tmp_path / "twice", certificate=False)


def test_files_have_the_mode_of_any_new_file(source, plan, tmp_path):
    before = os.umask(0o027)
    try:
        fold(source, plan, tmp_path / "out", certificate=False)
        save_lora(source, plan, tmp_path / "lora")
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "lora"):
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


KILLED = """
import sys, time
from austeer.errors import run_command
from austeer.files import new_folder
def main():
    with new_folder(sys.argv[1]) as folder:
        (folder / "half").write_text("half")
        print("at work", flush=True)
        time.sleep(60)
run_command(main)
"""


@pytest.mark.slow  # a subprocess imports transformers; that signals end in `finally` is tested in test_cli.py
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_killed_run_leaves_nothing(tmp_path, number):
    run = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"at work\n" and list(tmp_path.iterdir())
    run.send_signal(number)
    assert run.wait(20) == 128 + number
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_named(source, plan, tmp_path, capsys):
    (tmp_path / ".out.abcd1234").mkdir()
    (tmp_path / ".out.of.others").mkdir()
    fold(source, plan, tmp_path / "out", certificate=False)
    output = capsys.readouterr().err
    assert (
        output.count("/.out.abcd1234: belongs to another run; if that run was killed, remove it") == 1
        and "others" not in output
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hot_patch_is_always_undone(source, dtype):
    model = load(source, dtype)
    plan = some_plan(model, "attention", "ffn", "neuron")
    before = {name: (weight.clone(), weight.data_ptr()) for name, weight in model.named_parameters()}
    vanilla = model(IDS).logits
    with pytest.raises(ZeroDivisionError), folded(model, plan):
        assert not torch.equal(model(IDS).logits, vanilla)
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), folded(model, plan), torch.inference_mode():
        raise KeyboardInterrupt
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0]) and weight.data_ptr() == before[name][1]
    assert torch.equal(model(IDS).logits, vanilla)
    plan.header["fingerprint"] = "0" * 64
    with pytest.raises(AUSteerError, match="made on other weights"), folded(model, plan):
        pass
    with folded(model, plan, check=False):
        assert not torch.equal(model(IDS).logits, vanilla)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_hot_patch_of_quantised_layers(tmp_path, quantization):
    """8-bit rows are patched through their scales, and restored; what would leave the grid of numbers is refused."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in requirements2.txt")
    source = make(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=128)
    model = load_quantised(source, quantization)
    for site in ["attention", "neuron"] + ["ffn"] * (quantization == "4bit"):
        with pytest.raises(AUSteerError, match="is quantised"), folded(model, some_plan(model, site)):
            pass
    if quantization == "8bit":
        plan = some_plan(model, "ffn")
        plan.scales["ffn"][:, 5] = -1.75  # beyond zero, so the signs of the row change
        with folded(model, plan):  # before the first forward, which moves the scales to the state
            first = model(IDS).logits
        vanilla = model(IDS).logits
        with steer(model, plan):
            live = model(IDS).logits
        with folded(model, plan):
            assert torch.equal(model(IDS).logits, first)
        assert torch.equal(model(IDS).logits, vanilla)
        assert (first - live).abs().max() < 0.02 * (live - vanilla).abs().max()


@pytest.mark.slow
def test_compiled_code_sees_the_hot_patch(source):
    model = load(source)
    plan, vanilla = some_plan(model, "attention", "ffn"), model(IDS).logits
    compiled = torch.compile(model, fullgraph=True)
    before = compiled(IDS).logits
    with steer(model, plan):
        expected = model(IDS).logits
    with folded(model, plan):
        assert (compiled(IDS).logits - expected).abs().max() < 1e-4
    assert torch.equal(compiled(IDS).logits, before) and torch.equal(model(IDS).logits, vanilla)
    torch.compiler.reset()


@pytest.mark.gpu
def test_a_captured_graph_sees_the_hot_patch(source):
    model = rmodels.load(source, dtype="float32", device="cuda")
    plan, ids = some_plan(model, "attention", "ffn"), IDS.cuda()
    with torch.no_grad(), steer(model, plan):
        expected = model(ids, use_cache=False).logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(ids, use_cache=False)  # a warm-up, since this may not be captured
        with torch.cuda.graph(graph):
            captured = model(ids, use_cache=False).logits
    graph.replay()
    vanilla = captured.clone()
    with folded(model, plan):
        graph.replay()
        assert (captured - expected).abs().max() < 1e-3 < (vanilla - expected).abs().max()
    graph.replay()
    assert torch.equal(captured, vanilla)


@pytest.mark.slow
def test_memory_stays_below_one_shard(tmp_path):
    source = make(
        tmp_path / "source",
        "llama",
        shard="240MB",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=7,
        num_attention_heads=16,
        head_dim=64,
    )
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert len(shards) == 2
    model = load(source)
    some_plan(model, "attention", "ffn").save(tmp_path / "plan.safetensors")
    script = (  # VmHWM, because ru_maxrss would start at this process's own value
        "import re, sys; from pathlib import Path; from transformers import LlamaForCausalLM;"
        "from austeer.export.fold import fold; from austeer.plan import Plan; plan = Plan.load(sys.argv[2]);"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]);"
        "before = peak(); fold(sys.argv[1], plan, sys.argv[3], certificate=False); print(peak() - before)"
    )
    arguments = [source, tmp_path / "plan.safetensors", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, check=True
    )
    share = int(done.stdout) / max(shards)
    print(f"peak above the imports: {share:.2f} shards")
    assert share < 1.3
    unfold(tmp_path / "out", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)
    shutil.rmtree(tmp_path / "out")
