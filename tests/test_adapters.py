"""Adapters: they do exactly what the live plan does, and refuse what they cannot do."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import COMMON, FAMILIES, SPECIAL
from safetensors.torch import load_file, save_file
from tiny_families import plan_in_every_layer, save_family
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

import rmodels
from austeer.errors import AUSteerError
from austeer.export.adapter import open_weights
from austeer.export.checkpoint import Checkpoint
from austeer.export.ia3 import save_ia3
from austeer.export.lora import factors_of, lora_factors, max_lora_rank, save_lora
from austeer.export.serve import main as serve
from austeer.export.serve import server_command
from austeer.export.weights import Edit
from austeer.identity import model_header
from austeer.plan import Plan
from austeer.steering import steer
from rmodels import LinearMap

IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 12, 300, 7, 90, 41, 66, 3, 250]])


def plan_for(model, sites, aus=5, strength=2.0, seed=0) -> Plan:
    """Return a plan with a few AUs in some layers, not equally many (in MoE families' ffn only in the dense layer)."""
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    for site in sites:
        values = torch.zeros(rmodels.site_shape(model, site))
        widths = [gate.width for gate in rmodels.gates(model, site)]
        for layer in [1] if model.config.model_type == "qwen3_moe" and site == "ffn" else [0, 1]:
            dims = torch.randperm(widths[layer], generator=generator)[: aus + layer]
            values[layer, dims] = strength * torch.randn(len(dims), generator=generator)
        scales[site] = values
    return Plan(scales)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, checkpoints):
    return rmodels.load(checkpoints[request.param], dtype="float32", device="cpu")


def changed_by_hand(model, folder):
    """Return upstream's model with W + B A in its weights, as any reader of the adapter computes it."""
    plain = AutoModelForCausalLM.from_pretrained(
        model.config.name_or_path,
        dtype=torch.float32,
        attn_implementation=model.config._attn_implementation[3:],
        trust_remote_code=False,
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in config["target_modules"]:
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        assert config["rank_pattern"].get(name, config["r"]) == len(a) == b.shape[1]
        assert config["alpha_pattern"].get(name, config["lora_alpha"]) == len(a)  # scaling is 1
        plain.get_submodule(name).weight.data += b @ a
    for name in config.get("target_parameters", []):  # experts one behind another, as PEFT keeps them
        a, b = (tensors.pop(f"base_model.model.{name.rpartition('.')[0]}.lora_{part}.weight") for part in "AB")
        weight, rank = plain.get_parameter(name), config["rank_pattern"].get(name, config["r"])
        a, b = a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1)
        weight.data += (b @ a).view_as(weight)
    assert not tensors
    return plain


def test_lora_equals_live(model, tmp_path):
    every = ["attention", "ffn", "neuron"]
    for sites in [[site] for site in every] + [every]:
        plan, out = plan_for(model, sites), tmp_path / "-".join(sites)
        result = save_lora(model.config.name_or_path, plan, out)
        with steer(model, plan):
            live = model(IDS).logits
        exported = changed_by_hand(model, out)(IDS).logits
        assert (live - model(IDS).logits).abs().max() > 0.05
        assert (live - exported).abs().max() < 1e-4
        per_module = sum(len(sites) > 1 and site != "attention" for site in sites) or 1
        assert result.rank == 6 * per_module  # no more than its AUs


def test_lora_of_several_plans_and_of_a_loaded_model(llama, tmp_path):
    plans = [plan_for(llama, ["attention"], seed=1), plan_for(llama, ["attention", "ffn"], seed=2)]
    save_lora(llama, plans, tmp_path / "loaded")
    save_lora(llama.config.name_or_path, plans[0] + plans[1], tmp_path / "read")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "loaded" / file).read_bytes() == (tmp_path / "read" / file).read_bytes()
    with steer(llama, plans[0] + plans[1]):
        live = llama(IDS).logits
    assert (live - changed_by_hand(llama, tmp_path / "loaded")(IDS).logits).abs().max() < 1e-4


def test_lora_of_many_aus_has_the_rank_of_the_matrix(llama, tmp_path):
    plan = Plan({"attention": torch.full(rmodels.site_shape(llama, "attention"), 0.5)})  # 64 AUs into 48 outputs
    result = save_lora(llama.config.name_or_path, plan, tmp_path / "all")
    assert (result.rank, len(result.modules), result.targets) == (48, 3, ["o_proj"])
    with steer(llama, plan):
        live = llama(IDS).logits
    assert (live - changed_by_hand(llama, tmp_path / "all")(IDS).logits).abs().max() < 1e-4


def test_only_touched_matrices_are_read_from_the_right_shard(checkpoints, llama, tmp_path, monkeypatch):
    folder, reads, read = tmp_path / "sharded", [], Checkpoint.read
    AutoModelForCausalLM.from_pretrained(checkpoints["llama"], trust_remote_code=False).save_pretrained(
        folder, max_shard_size="100KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 1
    plan = Plan({"attention": torch.zeros(rmodels.site_shape(llama, "attention"))})
    plan.scales["attention"][2, 7] = 1.0
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: reads.append(name) or read(self, name))
    save_lora(folder, plan, tmp_path / "adapter")
    b = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.2.self_attn.o_proj"
    assert reads == [f"{name}.weight"]
    assert torch.equal(b[f"base_model.model.{name}.lora_B.weight"][:, 0], llama.get_submodule(name).weight[:, 7])


def test_checkpoints_that_are_refused_leave_nothing(checkpoints, llama, tmp_path):
    folder, plan = tmp_path / "source", plan_for(llama, ["attention"])
    shutil.copytree(checkpoints["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"

    def refused(message):
        with pytest.raises(AUSteerError, match=message):
            save_lora(folder, plan, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused("is quantised")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**stored, name: stored[name].double()}, folder / "model.safetensors")
    refused("is stored as F64")
    save_file({key: weight for key, weight in stored.items() if key != name}, folder / "model.safetensors")
    refused("lacks the weight at site attention of layer 0")


def test_bfloat16(checkpoints, tmp_path):
    model = rmodels.load(checkpoints["llama"], dtype="bfloat16", device="cpu")
    plan = plan_for(model, ["attention", "ffn"], strength=1.0)
    save_lora(model, plan, tmp_path / "a")
    with steer(model, plan):
        live = model(IDS).logits.float()
    exported = changed_by_hand(model, tmp_path / "a")(IDS).logits  # float32 arithmetic on bfloat16's weights
    idle = (live - model(IDS).logits.float()).abs().max()
    assert (live - exported).abs().max() < 0.1 * idle


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_lora_of_a_quantized_model(tmp_path, bits):
    """The adapter of a loaded 4- or 8-bit model holds the weights it computes with, not the checkpoint's."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in requirements2.txt")
    wide = {**COMMON, "hidden_size": 64, "intermediate_size": 128}  # 4-bit blocks hold 64 weights
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **wide)).save_pretrained(tmp_path / "model")
    model = rmodels.load(tmp_path / "model", dtype="float32", device="cpu", quantization=bits)
    plan = plan_for(model, ["attention", "ffn", "neuron"], strength=1.0)
    idle = model(IDS).logits
    with steer(model, plan):
        live = model(IDS).logits
    apart = {}
    for source in (model, tmp_path / "model"):
        factors, hooks = lora_factors(open_weights(source, plan), plan), []
        for name, (a, b) in factors.items():
            hooks.append(
                model.get_submodule(name).register_forward_hook(
                    lambda module, args, out, a=a, b=b: out + args[0].float() @ a.T @ b.T
                )
            )
        apart[source] = (model(IDS).logits - live).abs().max()
        for hook in hooks:
            hook.remove()
    moved = (live - idle).abs().max()
    if bits == "4bit":
        assert apart[model] < 0.05 * moved  # in bfloat16, as it computes
        assert apart[model] < 0.5 * apart[tmp_path / "model"]
    else:  # live, activations are rounded to 8 bits after the gate, which no adapter can imitate
        assert apart[model] < 0.1 * moved


def test_refusals_leave_nothing(checkpoints, llama, tmp_path):
    shape, out = rmodels.site_shape(llama, "ffn"), tmp_path / "out"
    some = plan_for(llama, ["ffn"])
    path = llama.config.name_or_path
    layer = Plan({"layer": torch.ones(shape)})
    shift = Plan({}, {"ffn": torch.ones(shape)})
    wide = Plan({"ffn": torch.ones(3, 999)})
    other = Plan(some.scales, header={"family": "gemma2", "model": "org/other"})
    for save in (save_lora, save_ia3):
        for plan, why in [
            (layer, "residual stream"),
            (shift, "adds something"),
            (wide, "3 layers of 999"),
            (other, "gemma2 model"),
            (Plan(some.scales, tokens="last"), "only 'last' ones"),
            (Plan({}), "touches no AU"),
            ([], "no plan"),
        ]:
            with pytest.raises(AUSteerError, match=why):
                save(path, plan, out)
        with pytest.raises(AUSteerError, match="is not a folder, and the hub does not offer it"):
            save(tmp_path / "nowhere", some, out)
        assert not list(tmp_path.iterdir())
    with pytest.raises(AUSteerError, match="many experts"):
        save_ia3(checkpoints["qwen3_moe"], some, out)
    with pytest.raises(AUSteerError, match="many experts"):
        lora_factors(open_weights(checkpoints["qwen3_moe"], some), some)
    dense = tmp_path / "dense.safetensors"
    Plan({"ffn": some.scales["ffn"] * torch.tensor([[0], [1], [0]])}).save(dense)
    with pytest.raises(AUSteerError, match=r"layers.1.mlp.down_proj.weight belongs to an MLP of a family with experts"):
        server_command(str(checkpoints["qwen3_moe"]), [dense], [], tmp_path / "adapters")
    shutil.rmtree(tmp_path / "adapters")
    dense.unlink()
    both = Plan({site: torch.ones(rmodels.site_shape(llama, site)) for site in ("ffn", "neuron")})
    with pytest.raises(AUSteerError, match="one vector per module"):
        save_ia3(path, both, out)
    save_ia3(path, some, out)
    with pytest.raises(AUSteerError, match="exists already"):
        save_lora(path, some, out)
    assert max_lora_rank(9) == 16 and max_lora_rank(1) == 1
    with pytest.raises(AUSteerError, match="vLLM allows 512"):
        max_lora_rank(513)


def test_a_bias_of_the_ffn(tmp_path):
    """A LoRA cannot scale the bias; IA3 can, and both can scale the input of the same module."""
    model = biased(tmp_path / "biased")
    with pytest.raises(AUSteerError, match="has a bias"):
        save_lora(model, plan_for(model, ["ffn"]), tmp_path / "ffn")
    save_ia3(model, plan_for(model, ["ffn"]), tmp_path / "ffn")
    save_lora(model, plan_for(model, ["attention", "neuron"]), tmp_path / "others")


def biased(folder):
    """Return a model with nonzero biases, which transformers initialises to zero."""
    config = AutoConfig.for_model("llama", **{**COMMON, **SPECIAL["llama"]}, mlp_bias=True, attention_bias=True)
    torch.manual_seed(0)
    result = AutoModelForCausalLM.from_config(config)
    for name, weight in result.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    result.save_pretrained(folder)
    return rmodels.load(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("save", "sites"),
    [
        (save_ia3, ["ffn"]),
        (save_ia3, ["attention"]),
        (save_ia3, ["attention", "ffn"]),
        (save_lora, ["attention"]),
        (save_lora, ["attention", "neuron"]),
    ],
)
def test_biases_are_steered_as_live(tmp_path, save, sites):
    peft = pytest.importorskip("peft", reason="peft is in requirements2.txt")
    model = biased(tmp_path / "biased")
    plan = plan_for(model, sites)
    save(model, plan, tmp_path / "adapter")
    with steer(model, plan):
        live = model(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "biased", dtype=torch.float32, trust_remote_code=False)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (live - adapted(IDS).logits).abs().max() < 1e-4 < (live - model(IDS).logits).abs().max()
        assert (live - adapted.merge_and_unload()(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_peft_reads_it(model, tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft is in requirements2.txt")
    moe = model.config.model_type == "qwen3_moe"
    for sites in [["attention", "ffn"], ["attention"] if moe and kind == "ia3" else ["neuron"]]:
        plan, out = plan_for(model, sites), tmp_path / "-".join(sites)
        {"lora": save_lora, "ia3": save_ia3}[kind](model.config.name_or_path, plan, out)
        with steer(model, plan):
            live = model(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(
            model.config.name_or_path,
            dtype=torch.float32,
            attn_implementation=model.config._attn_implementation[3:],
            trust_remote_code=False,
        )
        adapted = peft.PeftModel.from_pretrained(plain, out).eval()
        with torch.no_grad():
            assert (live - adapted(IDS).logits).abs().max() < 1e-4
            assert (live - adapted.merge_and_unload()(IDS).logits).abs().max() < 1e-4


IN_PEFT = {  # family -> sites that a LoRA, and an IA3, can hold
    "gpt2": (["attention", "neuron"], ["attention", "ffn"]),
    "mixtral": (["attention", "ffn", "neuron"], ["attention"]),
    "qwen2_moe": (["attention", "ffn", "neuron"], ["attention"]),
    "opt": (["attention", "neuron"], ["attention", "ffn"]),
    "bloom": (["attention", "neuron"], ["attention", "ffn"]),
    "gpt_oss": (["attention", "neuron"], ["attention"]),
    "phi3": (["attention", "ffn", "neuron"], ["attention", "ffn"]),
    "mamba2": (None, ["attention"]),
    "qwen3_next": (["attention", "ffn", "neuron"], ["attention"]),
    "gemma3_text": (["attention", "ffn", "neuron"], ["attention", "neuron"]),
}


@pytest.mark.parametrize(
    ("name", "kind", "sites"),
    [
        pytest.param(name, kind, sites, marks=[] if name in ("gpt2", "qwen2_moe") else pytest.mark.slow)
        for name, by_kind in IN_PEFT.items()
        for kind, sites in zip(("lora", "ia3"), by_kind, strict=True)
        if sites
    ],
)
def test_peft_reads_adapters_of_any_decoder(tmp_path, name, kind, sites):
    """Conv1D modules, fused experts beside a shared one and beside dense layers, layers of different width."""
    peft = pytest.importorskip("peft", reason="peft is in requirements2.txt")
    source = save_family(tmp_path / "source", name)
    model = rmodels.load(source, dtype="float32", device="cpu")
    plan = plan_in_every_layer(model, sites)
    {"lora": save_lora, "ia3": save_ia3}[kind](source, plan, tmp_path / "adapter")
    with steer(model, plan):
        live = model(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    # PEFT sees this for itself, but other readers may not
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (live - adapted(IDS).logits).abs().max() < 1e-4 < 0.2 < (live - model(IDS).logits).abs().max()
        assert (live - adapted.merge_and_unload()(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("deepseek_ocr2", "attention"),  # `layers.` of files is `language_model.layers.` of the model
        ("deepseek_ocr2", "ffn"),
        ("laguna", "ffn"),  # `mlp.shared_expert.` is `mlp.shared_experts.`
    ],
)
def test_peft_finds_tensors_whose_names_transformers_would_rename_again(tmp_path, name, site):
    peft = pytest.importorskip("peft", reason="peft is in requirements2.txt")
    model = rmodels.load(save_family(tmp_path / "source", name), dtype="float32", device="cpu")
    plan = plan_in_every_layer(model, [site])
    lora = save_lora(tmp_path / "source", plan, tmp_path / "adapter")
    idle = model(IDS).logits
    with steer(model, plan):
        live = model(IDS).logits
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert (live - adapted(IDS).logits).abs().max() < 1e-4 < 0.2 < (live - idle).abs().max()
    assert all(adapted.get_submodule(f"base_model.model.{module}") for module in lora.modules)


def test_a_name_that_peft_loses_whatever_a_file_calls_it_is_refused(tmp_path, monkeypatch):
    model = rmodels.load(save_family(tmp_path / "source", "laguna"), dtype="float32", device="cpu")
    lost = [WeightRenaming("o_proj", "out"), WeightRenaming("out", "elsewhere")]
    monkeypatch.setattr("austeer.export.lora.get_model_conversion_mapping", lambda model: lost)
    with pytest.raises(AUSteerError, match=r"PEFT renames model.layers.0.self_attn.o_proj.lora_A.weight .*; fold"):
        save_lora(model, plan_in_every_layer(model, ["attention"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_of_the_neurons_of_fused_experts_has_factors_of_its_own_for_each(tmp_path):
    weight, scale = torch.randn(3, 4, 5), torch.zeros(3, 5)
    scale[0, 1], scale[0, 3], scale[1, 4], scale[2, 0] = 2.0, 1.0, -0.5, 0.25
    edit = Edit(
        0, "neuron", LinearMap("weight", None, -1, -2), scale, torch.zeros(3, 5), torch.zeros(4), torch.zeros(4)
    )
    a, b = factors_of(edit, weight)
    assert a.shape == (3, 2, 5) and torch.allclose(b @ a, weight * scale[:, None])
    turned = factors_of(replace(edit, map=LinearMap("weight", None, -2, -1)), weight.mT.contiguous())
    assert torch.equal(turned[0], a) and torch.equal(turned[1], b)


def test_adapters_that_their_readers_refuse_are_refused_here(tmp_path):
    for name, site, why in (
        ("mamba2", "attention", "readers of LoRA adapters refuse .*out_proj of mamba2; use IA3"),
        ("gpt_oss", "ffn", "experts has a bias, which a LoRA adapter cannot scale; fold"),
        ("gpt2", "ffn", "c_proj has a bias, which a LoRA adapter cannot scale; use IA3"),
    ):
        source = save_family(tmp_path / name, name)
        with pytest.raises(AUSteerError, match=why):
            save_lora(source, plan_in_every_layer(rmodels.load(source, device="cpu"), [site]), tmp_path / "out")


def test_server_command(llama, tmp_path):
    plans = [tmp_path / "calm.safetensors", tmp_path / "brave.safetensors"]
    for seed, plan in enumerate(plans):
        plan_for(llama, ["attention"], seed=seed).save(plan)
    command = server_command(llama.config.name_or_path, plans, ["--port", "1"], tmp_path / "adapters")
    flags = dict(itertools.pairwise(command))
    assert flags["--max-lora-rank"] == "8" and flags["--lora-target-modules"] == "o_proj" and flags["--port"] == "1"
    assert flags["--max-loras"] == ("2" if torch.cuda.is_available() else "3")
    served = dict(word.split("=") for word in command if "=" in word)
    assert list(served) == ["calm", "brave"]
    assert Plan.load(f"{served['brave']}/plan.safetensors").aus() == Plan.load(plans[1]).aus()
    with pytest.raises(AUSteerError, match="under their file names"):
        server_command(llama.config.name_or_path, plans[:1] * 2, [], tmp_path / "more")
    with pytest.raises(AUSteerError, match="at least one plan"):
        serve([llama.config.name_or_path, "--port", "1"])


def test_the_server_refuses_plans_of_other_weights(llama, tmp_path, monkeypatch):
    """The shapes are the same, as with a base model and its chat model. The weights are read once for all plans."""
    plans, hashed = [tmp_path / "calm.safetensors", tmp_path / "brave.safetensors"], []
    as_loaded = Checkpoint.as_loaded
    monkeypatch.setattr(Checkpoint, "as_loaded", lambda self, name: hashed.append(name) or as_loaded(self, name))
    for seed, path in enumerate(plans):
        plan = plan_for(llama, ["attention"], seed=seed)
        plan.header |= model_header(llama)
        plan.save(path)
    server_command(llama.config.name_or_path, plans, [], tmp_path / "adapters")
    read_for_adapters = 2 * len(plans)
    assert len(hashed) - read_for_adapters == len(set(hashed)) == len(llama.state_dict())
    plan.header["fingerprint"] = "0" * 64
    plan.save(plans[1])
    with pytest.raises(AUSteerError, match="this plan was made on other weights"):
        server_command(llama.config.name_or_path, plans, [], tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_readers_find_the_base_model(llama, tmp_path, monkeypatch):
    folder = str(Path(llama.config.name_or_path).resolve())
    for name, base in ((llama.config.name_or_path, folder), ("org/model", "org/model")):
        monkeypatch.setattr(llama.config, "name_or_path", name)
        save_lora(llama, plan_for(llama, ["attention"]), tmp_path / base.replace("/", "-"))
        config = json.loads((tmp_path / base.replace("/", "-") / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
