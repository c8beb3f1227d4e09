"""The contract of rmodels: every rule on every family. A ported family is tested once conftest.SPECIAL lists it."""

import contextlib
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import COMMON, FAMILIES
from reference import hook_steering
from tiny_families import plan_in_every_layer, save_family
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer.errors import AUSteerError
from austeer.plan import Plan
from austeer.steering import steer

IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 88, 12, 254, 17, 99, 43, 66, 71, 20], list(range(30, 47))])


# neurons of experts are in tests/test_experts.py: the oracle there is a loop over tokens, which rounds otherwise
FAMILY_SITES = [(name, site) for name in FAMILIES for site in rmodels.SITES if (name, site) != ("qwen3_moe", "neuron")]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def load(checkpoints, name, dtype="float32", kernel=None):
    return rmodels.load(checkpoints[name], dtype=dtype, device="cpu", attn_implementation=kernel)


def load_upstream(checkpoints, name, dtype="float32", kernel=None):
    return AutoModelForCausalLM.from_pretrained(
        checkpoints[name], dtype=getattr(torch, dtype), attn_implementation=kernel
    ).eval()


def some_plan(model, site, value=1.5, shift=0.0):
    """Return a plan with two AUs per layer, of different strength."""
    scale = torch.zeros(rmodels.site_shape(model, site))
    scale[:, 3], scale[:, -2] = value, -0.4 * value
    return Plan({site: scale}, {site: (scale != 0) * shift} if shift else {})


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_idle_is_bit_equal_to_upstream(checkpoints, name, dtype, kernel):
    model, upstream = load(checkpoints, name, dtype, kernel), load_upstream(checkpoints, name, dtype, kernel)
    assert list(model.state_dict()) == list(upstream.state_dict())
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    assert torch.equal(model(IDS).logits, upstream(IDS).logits)
    assert torch.equal(model(IDS, attention_mask=mask).logits, upstream(IDS, attention_mask=mask).logits)
    short = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(IDS, **short), upstream.generate(IDS, **short))


def test_one_gate_per_layer_and_site_of_the_right_width(checkpoints, name):
    model = load(checkpoints, name)
    for site in rmodels.sites(model):
        assert [gate.layer for gate in rmodels.gates(model, site)] == [0, 1, 2]
    assert rmodels.site_shape(model, "attention") == (3, 64)  # heads * head_dim, not hidden
    assert rmodels.site_shape(model, "ffn") == rmodels.site_shape(model, "layer") == (3, 48)
    # of Qwen3-MoE two layers have 4 experts of 24 neurons, and the dense one has 80
    assert rmodels.site_shape(model, "neuron") == (3, 96 if name == "qwen3_moe" else 80)
    assert not [key for key in model.state_dict() if ".au" in key]
    assert not any(True for gate in rmodels.gates(model) for _ in (*gate.parameters(), *gate.buffers()))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "site"), FAMILY_SITES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steered_equals_hooks_on_upstream(checkpoints, name, site, kernel, dtype):
    model, upstream = load(checkpoints, name, dtype, kernel), load_upstream(checkpoints, name, dtype, kernel)
    plan = some_plan(model, site, shift=0.25)
    vanilla = model(IDS).logits
    with steer(model, plan), hook_steering(upstream, plan):
        ours = model(IDS).logits
        assert torch.equal(ours, upstream(IDS).logits)
        assert not torch.equal(ours, vanilla)
        short = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(IDS))
        assert torch.equal(model.generate(IDS, **short), upstream.generate(IDS, **short))
    assert torch.equal(model(IDS).logits, vanilla)


@pytest.mark.parametrize(("name", "site"), FAMILY_SITES)
def test_only_the_chosen_dimensions_move(checkpoints, name, site):
    model = load(checkpoints, name)
    values = {}
    first = next(gate for gate in rmodels.gates(model, site) if gate.layer == 0)
    first.register_forward_hook(lambda gate, args, out: values.update(x=args[0], y=out))
    with steer(model, some_plan(model, site)):
        model(IDS)
    moved = (values["x"] != values["y"]).any(0).any(0).nonzero().flatten().tolist()
    assert moved == [3, first.width - 2]
    assert torch.equal(values["y"][..., 3], values["x"][..., 3] + values["x"][..., 3] * 1.5)
    assert values["x"].data_ptr() != values["y"].data_ptr()  # never in place


def test_idle_gate_returns_its_very_input():
    x = torch.randn(2, 3, 8)
    assert rmodels.AUGate("ffn", 0, 8)(x) is x


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "llama" else []) for name in FAMILIES]
)
def test_compiles_without_a_graph_break(checkpoints, name):
    model = load(checkpoints, name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-5)
    for site in rmodels.sites(model):
        with steer(model, some_plan(model, site)):
            assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-4)
    torch.compiler.reset()


def test_experts_run_as_upstreams_in_a_process_that_never_built_upstream(checkpoints):
    """transformers caches the answer on the class, so the tests above could not see it."""
    script = (
        "import sys, torch, rmodels; from transformers import AutoModelForCausalLM as Upstream;"
        "ours = rmodels.load(sys.argv[1], dtype='bfloat16', device='cpu'); ids = torch.arange(3, 40)[None];"
        "theirs = Upstream.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval();"
        "assert ours.config._experts_implementation == theirs.config._experts_implementation == 'grouped_mm';"
        "assert torch.equal(ours(ids).logits, theirs(ids).logits)"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script, str(checkpoints["qwen3_moe"])], cwd=root, check=True)


def test_loaded_models_are_frozen_and_in_eval_mode(checkpoints, name):
    model = load(checkpoints, name)
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def test_pickled_weights_are_never_read(checkpoints, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoints["llama"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load(checkpoints, "llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(AUSteerError, match="cannot load the weights"):
        rmodels.load(folder)


def test_code_of_a_model_repository_is_never_run(checkpoints, tmp_path, monkeypatch):
    folder, marker = tmp_path / "evil", tmp_path / "ran"
    shutil.copytree(checkpoints["llama"], folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    for file in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / file).read_text())
        auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        if file == "tokenizer_config.json":
            config["tokenizer_class"] = "Evil"
        (folder / file).write_text(json.dumps({**config, "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for use in (rmodels.load, rmodels.load_tokenizer):
        with contextlib.suppress(AUSteerError):
            use(folder)
        assert not marker.exists()


def test_a_checkpoint_without_a_tokenizer(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(AUSteerError, match=r"cannot load the tokenizer of .*mute"):
        rmodels.load_tokenizer(tmp_path / "mute")


def test_a_layer_kept_on_disk_is_ranked_and_steered_alike(checkpoints, tokenizer, tmp_path):
    from accelerate import disk_offload
    from conftest import PAIRS

    from MFU_screening import screen
    from set_MFU import set_MFU

    whole, offloaded = load(checkpoints, "llama"), load(checkpoints, "llama")
    ranks = screen(PAIRS, whole, tokenizer, ["ffn"], progress=False)["ffn"]
    disk_offload(offloaded.model.layers[1], tmp_path)
    again = screen(PAIRS, offloaded, tokenizer, ["ffn"], progress=False)["ffn"]
    assert torch.equal(again.score, ranks.score) and again.header["fingerprint"] is None
    with steer(whole, set_MFU(ranks, 9, 2.0)), steer(offloaded, set_MFU(ranks, 9, 2.0)):
        assert torch.equal(whole(IDS).logits, offloaded(IDS).logits)


def test_saved_checkpoint_is_upstreams(checkpoints, name, tmp_path):
    model = load(checkpoints, name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "au_" not in json.dumps(config)
    assert config["architectures"] == [type(load_upstream(checkpoints, name)).__name__]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(again(IDS).logits, load_upstream(checkpoints, name, kernel="eager")(IDS).logits)


def test_switching_the_kernel_keeps_the_gates(checkpoints, name):
    model = load(checkpoints, name, kernel="sdpa")
    plan = some_plan(model, "attention")
    model.set_attn_implementation("eager")
    with steer(model, plan):
        steered = model(IDS).logits
    with steer(fresh := load(checkpoints, name, kernel="eager"), plan):
        assert torch.equal(fresh(IDS).logits, steered)


def test_layers_survive_device_placement(checkpoints, name):
    model = load(checkpoints, name)
    (protected,) = model._no_split_modules
    assert all(type(layer).__name__ == protected for layer in model.model.layers)


def test_gates_survive_a_swap_of_linear_layers(checkpoints, name):
    """A quantiser replaces every Linear by another module after the model was built."""

    class Swapped(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.inner = linear

        def forward(self, x):
            return self.inner(x)

    model = load(checkpoints, name)
    plan = {site: some_plan(model, site) for site in rmodels.sites(model)}
    expected = {}
    for site in plan:
        with steer(model, plan[site]):
            expected[site] = model(IDS).logits
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and not isinstance(parent, Swapped):
                setattr(parent, child_name, Swapped(child))
    for site in plan:
        with steer(model, plan[site]):
            assert torch.equal(model(IDS).logits, expected[site])


def test_flash_kernels_see_their_own_name(llama, monkeypatch):
    """Without a GPU, a stand-in flash kernel checks what upstream's kernel reads from the module's config."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def stand_in(module, query, key, value, mask, **kwargs):
        assert module.config._attn_implementation == "flash_attention_2"
        assert module.is_causal and module.layer_idx in range(3)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", stand_in)
    with steer(llama, some_plan(llama, "attention")):
        expected = llama(IDS).logits
        kernel = llama.config._attn_implementation
        llama.config._attn_implementation = "au_flash_attention_2"
        try:
            assert torch.equal(llama(IDS).logits, expected)
        finally:
            llama.config._attn_implementation = kernel


def test_a_family_without_gates_is_an_error(checkpoints, name):
    upstream = load_upstream(checkpoints, name)
    with pytest.raises(AUSteerError, match="0 AU gates instead of 12"):
        rmodels.check_gates(upstream)


def test_an_unlisted_module_is_an_error(checkpoints, monkeypatch):
    cls = rmodels.family("qwen3_moe")
    short = {up: ours for up, ours in cls.GATED.items() if "Sparse" not in up.__name__}
    monkeypatch.setattr(cls, "GATED", short)
    with pytest.raises(AUSteerError, match=r"Qwen3MoeSparseMoeBlock at site ffn.*docs/porting.md"):
        load(checkpoints, "qwen3_moe")


def test_a_dense_mlp_that_passes_no_neuron_gate_is_an_error(checkpoints, monkeypatch):
    from transformers.models.llama import modeling_llama as upstream

    class Forgetful(upstream.LlamaMLP):
        def forward(self, x):
            return self.au(super().forward(x))

    monkeypatch.setitem(rmodels.family("llama").GATED, upstream.LlamaMLP, Forgetful)
    with pytest.raises(AUSteerError, match=r"Forgetful of .* is not a GatedMLP.*docs/porting.md"):
        load(checkpoints, "llama")


def test_gemma2_gets_eager_attention_by_default(checkpoints):
    """transformers' sdpa ignores the attention soft cap."""
    assert load(checkpoints, "gemma2").config._attn_implementation == "au_eager"
    assert load(checkpoints, "llama").config._attn_implementation == "au_sdpa"


def test_deep_copies_steer_apart(llama):
    twin = copy.deepcopy(llama)
    with steer(twin, some_plan(twin, "ffn")):
        assert not torch.equal(twin(IDS).logits, llama(IDS).logits)


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_deep_copies_with_gates_by_structure_steer_apart(name, tmp_path):
    model = rmodels.load(save_family(tmp_path / name, name), dtype="float32", device="cpu")
    twin, idle = copy.deepcopy(model), model(IDS[:1]).logits
    for site in rmodels.sites(model):
        plan = plan_in_every_layer(model, [site])
        with steer(model, plan):
            live = model(IDS[:1]).logits
            assert torch.equal(twin(IDS[:1]).logits, idle) and not torch.equal(live, idle)
        with steer(twin, plan):
            assert torch.equal(twin(IDS[:1]).logits, live) and torch.equal(model(IDS[:1]).logits, idle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(device="cuda"), "no CUDA device"),
        (dict(device="gpu0"), "unknown"),
        (dict(dtype="half"), "dtype 'half' is unknown"),
        (dict(attn_implementation="magic"), "kernel 'magic' is unknown"),
        (dict(quantization="3bit"), "use 4bit or 8bit"),
        (dict(device="cpu", device_map="auto"), "not both"),
    ],
)
def test_bad_load_arguments_are_seen_before_a_file_is_read(change, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AUSteerError, match=message):
        rmodels.load("nowhere.gguf", **change)


def test_bad_checkpoints(checkpoints, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AUSteerError, match=r"no config.json"):
        rmodels.load(tmp_path / "empty")
    shutil.copytree(checkpoints["llama"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(AUSteerError, match="cannot load the weights"):
        rmodels.load(tmp_path / "bare")


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=320)
NO_DECODERS = {  # upstream's class, its config, and what is said of it
    "BertForMaskedLM": (("bert", SMALL), "BertForMaskedLM is an encoder, which does not continue texts"),
    "BertModel": (("bert", SMALL), "BertModel is an encoder, which does not continue texts"),
    "BertLMHeadModel": (("bert", SMALL), "BertLMHeadModel is no causal language model: its first tokens see the last one"),
    "ModernBertForMaskedLM": (
        ("modernbert", SMALL | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)),
        "ModernBertForMaskedLM is an encoder",
    ),
    "T5ForConditionalGeneration": (
        ("t5", dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=320)),
        "T5ForConditionalGeneration is an encoder-decoder: AUSteer steers decoders alone",
    ),
    "CLIPTextModel": (("clip_text_model", SMALL | dict(bos_token_id=1, eos_token_id=2)), "has no language-model head"),
    "LlamaModel": (("llama", COMMON), "LlamaModel has no language-model head; take a checkpoint of LlamaForCausalLM"),
    "LlamaForSequenceClassification": (("llama", COMMON), "take a checkpoint of LlamaForCausalLM"),
    "GPT2Model": (("gpt2", COMMON), "GPT2Model has no language-model head; take a checkpoint of GPT2LMHeadModel"),
}  # fmt: skip


@pytest.mark.parametrize("cls", NO_DECODERS)
def test_what_is_no_decoder_with_a_head_is_one_clear_line(tmp_path, cls):
    (model_type, fields), message = NO_DECODERS[cls]
    getattr(transformers, cls)(AutoConfig.for_model(model_type, **fields)).save_pretrained(tmp_path)
    with pytest.raises(AUSteerError, match=re.escape(message)) as error:
        rmodels.load(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def edited(checkpoint, folder, **fields):
    """Return a copy of a checkpoint whose config says something else."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_a_checkpoint_that_needs_the_code_of_its_repository(checkpoints, tmp_path):
    remote = {"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}}
    known = edited(checkpoints["llama"], tmp_path / "known", architectures=["XForCausalLM"], **remote)
    with pytest.raises(
        AUSteerError, match=r"^XForCausalLM is code in its model repository, which is never run here; take"
    ):
        rmodels.load(known)
    unknown = edited(checkpoints["llama"], tmp_path / "unknown", model_type="x_lm", **remote)
    with pytest.raises(
        AUSteerError, match=r"unknown: transformers does not know its model type, and the code of a model"
    ):
        rmodels.load(unknown)
    new = edited(checkpoints["llama"], tmp_path / "new", model_type="x_lm")  # newer than this transformers
    with pytest.raises(AUSteerError, match=r"does not know its model type.*update transformers"):
        rmodels.load(new)


@pytest.mark.parametrize("names", [[], ["LLaMAForCausalLM"], ["TunedLlamaForCausalLM"]])
def test_old_and_unknown_names_of_a_class_load(checkpoints, tmp_path, names):
    # transformers has the class of an old name itself, so the code beside the checkpoint is not needed
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}} if names == ["LLaMAForCausalLM"] else {}
    named = edited(checkpoints["llama"], tmp_path / "named", architectures=names, **remote)
    model = rmodels.load(named, device="cpu")
    assert torch.equal(model(IDS).logits, load(checkpoints, "llama")(IDS).logits)


def test_a_truncated_checkpoint_is_one_clear_line(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(AUSteerError, match="cannot load the weights"):
        rmodels.load(tmp_path / "cut")


def test_missing_weights_are_an_error_not_random_numbers(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoints["llama"], tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(AUSteerError, match=r"lacks 1 weights .model.layers.1.mlp.down_proj"):
        rmodels.load(tmp_path / "part")
