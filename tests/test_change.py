"""Adapters: low-rank terms beside projections, against changed weights; applied and undone; kept in files."""

import pytest
import torch
from conftest import save_tiny
from torch.nn.functional import pad
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

import rmodels
from austeer.change import Adapter, applied, projections
from austeer.errors import AUSteerError
from austeer.identity import model_header
from austeer.plan import Plan
from experiments.engines.answering import vllm_answering

IDS = torch.tensor([[1, 40, 77, 130, 9, 200]])


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def model(request, checkpoints, tmp_path_factory):
    if request.param == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=48, n_layer=3, n_head=4, vocab_size=320, n_positions=64)
        return rmodels.load(save_tiny(tmp_path_factory.mktemp("gpt2"), config), dtype="float32", device="cpu")
    return rmodels.load(checkpoints[request.param], dtype="float32", device="cpu")


def random_adapter(model, sites=("attention", "neuron"), rank=2, strength=0.7):
    torch.manual_seed(0)
    factors = {}
    for name, module in projections(model, sites).items():
        inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        factors[name] = 0.2 * torch.randn(rank, inputs), 0.2 * torch.randn(outputs, rank)
    return Adapter(factors, strength, model_header(model))


def test_an_adapter_is_a_change_of_the_weights(model):
    adapter, before = random_adapter(model), model(IDS).logits
    with applied(model, adapter):
        live = model(IDS).logits
    kept = {}
    for name, (down, up) in adapter.factors.items():
        module = model.get_submodule(name)
        kept[name] = module.weight.data.clone()
        for out in range(up.shape[0]):
            for into in range(down.shape[1]):
                change = 0.7 * sum(float(up[out, r] * down[r, into]) for r in range(2))
                place = (into, out) if isinstance(module, Conv1D) else (out, into)
                module.weight.data[place] += change
    edited = model(IDS).logits
    for name, weight in kept.items():
        model.get_submodule(name).weight.data = weight
    assert torch.allclose(live, edited, atol=1e-4) and not torch.allclose(live, before, atol=1e-2)
    assert torch.equal(model(IDS).logits, before), "nothing is left on the model"


def test_sites_name_their_projections(llama):
    names = {site: list(projections(llama, [site])) for site in ("attention", "ffn", "neuron")}
    assert names["attention"] == [f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)]
    assert names["ffn"] == names["neuron"] == [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    assert list(projections(llama, ["attention", "ffn"])) == [
        name for both in zip(names["attention"], names["ffn"], strict=True) for name in both
    ]
    with pytest.raises(AUSteerError, match="no projection of its own at site layer"):
        projections(llama, ["layer"])


def test_fused_experts_are_refused(checkpoints):
    moe = rmodels.load(checkpoints["qwen3_moe"], dtype="float32", device="cpu")
    with pytest.raises(AUSteerError, match="fused experts"):
        projections(moe, ["neuron"])
    assert len(projections(moe, ["attention"])) == 3


def test_times_and_zero(llama):
    adapter, before = random_adapter(llama), llama(IDS).logits
    logits = []
    for change in (adapter.times(0), adapter, adapter.times(2)):
        with applied(llama, change):
            logits.append(llama(IDS).logits)
    assert torch.equal(logits[0], before) and not torch.allclose(logits[1], logits[2])
    assert (len(adapter), len(adapter.times(0))) == (6, 0) and adapter.times(0)
    assert adapter.times(2).strength == 1.4 and adapter.strength == 0.7


def test_a_receipt_counts_positions(llama):
    adapter = random_adapter(llama)
    with applied(llama, adapter) as adapting:
        assert adapting.receipt() == {"modules": 6, "positions": 0}
        cache = llama(IDS, use_cache=True).past_key_values
        llama(torch.tensor([[5]]), past_key_values=cache)
        assert adapting.receipt() == {"modules": 6, "positions": 7}
    assert adapter.aus() == [] and adapter.inverted == 0 and adapter.tokens == "all"
    assert adapter.numbers == 3 * 2 * (64 + 48 + 80 + 48)


def test_files(llama, tmp_path):
    adapter = random_adapter(llama)
    adapter.save(tmp_path / "a.safetensors")
    read = Adapter.load(tmp_path / "a.safetensors")
    assert read.strength == 0.7 and read.header == adapter.header and read.factors.keys() == adapter.factors.keys()
    for name, both in adapter.factors.items():
        assert all(torch.equal(one, other) for one, other in zip(both, read.factors[name], strict=True))
    Plan({"ffn": torch.zeros(3, 48)}).save(tmp_path / "p.safetensors")
    with pytest.raises(AUSteerError, match="not a low-rank adapter file"):
        Adapter.load(tmp_path / "p.safetensors")


def test_none_and_plans(llama):
    scale = torch.zeros(3, 64)
    scale[1, 5] = 3.0
    before = llama(IDS).logits
    with applied(llama, None) as nothing:
        assert nothing is None and torch.equal(llama(IDS).logits, before)
    with applied(llama, Plan({"attention": scale})) as steering:
        assert not torch.equal(llama(IDS).logits, before) and steering.receipt() == {"aus": 1, "positions": 6}
    with applied(llama, Plan({"attention": scale}, tokens="last"), prompt_end=6) as steering:
        llama(IDS)
        assert steering.receipt()["positions"] == 1


def test_other_models_are_refused(llama, checkpoints):
    adapter = random_adapter(llama)
    other = rmodels.load(checkpoints["qwen3"], dtype="float32", device="cpu")
    with pytest.raises(AUSteerError, match="adapter was made for a llama model"), applied(other, adapter):
        pass
    with pytest.raises(AUSteerError, match="no module"), applied(llama, Adapter({"model.x": torch.ones(2, 1, 1)})):
        pass


def test_wrong_widths_are_refused(llama):
    name = "model.layers.0.self_attn.o_proj"
    down, up = random_adapter(llama).factors[name]
    for wrong in ((pad(down, (0, 1)), up), (down, up[:-1])):
        with pytest.raises(AUSteerError, match="other widths"), applied(llama, Adapter({name: wrong})):
            llama(IDS)
    assert not any(module._forward_hooks for module in projections(llama, ["attention"]).values())


def test_overflow_is_refused(llama):
    with pytest.raises(AUSteerError, match="inf or nan"):
        random_adapter(llama).times(float("inf"))
    with pytest.raises(AUSteerError, match="adapter overflowed"), applied(llama, random_adapter(llama).times(1e39)):
        llama(IDS)


def test_gates_and_adapters_work_together(llama):
    """A plan steers what enters the projection, and so what enters the adapter."""
    adapter, scale = random_adapter(llama, ["attention"]), torch.full((3, 64), -1.0)
    with applied(llama, adapter), applied(llama, Plan({"attention": scale})):
        both = llama(IDS).logits
    with applied(llama, Plan({"attention": scale})):
        assert torch.equal(llama(IDS).logits, both), "silenced AUs leave an adapter nothing to change"


def test_vllm_refuses_adapters(llama):
    with pytest.raises(AUSteerError, match="use --engine live"), vllm_answering(None, [random_adapter(llama)], 1):
        pass
