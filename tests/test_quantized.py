"""Live gates on 4-bit and 8-bit layers, through bitsandbytes on the CPU."""

import pytest
import torch
from conftest import COMMON, PAIRS, SPECIAL, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer.steering import steer
from MFU_screening import screen
from set_MFU import set_MFU

pytest.importorskip("bitsandbytes", reason="bitsandbytes is in requirements2.txt")
IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55]])


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def bits(request):
    return request.param


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3"])
def model(request, bits, tmp_path_factory):
    """Wider than the other tests' models: 4-bit blocks hold 64 weights."""
    folder = tmp_path_factory.mktemp("quantized")
    wide = {**COMMON, "hidden_size": 64, "intermediate_size": 128, **SPECIAL[request.param]}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **wide)).save_pretrained(folder)
    return rmodels.load(folder, dtype="float32", device="cpu", quantization=bits)


@pytest.mark.parametrize("momentum", ["activation", "causal"])
def test_rank_and_steer(model, bits, momentum):
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" if bits == "4bit" else "Linear8bitLt") in kinds
    ranks = screen(PAIRS, model, byte_tokenizer(), ["attention", "ffn"], momentum=momentum, progress=False)
    vanilla = model(IDS).logits
    for site in ("attention", "ffn"):
        seen = {}
        gate = next(gate for gate in rmodels.gates(model, site) if gate.layer == ranks[site].top(1)[0][0])
        hook = gate.register_forward_hook(lambda gate, args, out: seen.update(x=args[0], y=out))  # noqa: B023
        plan = set_MFU(ranks[site], 6, 1.0)
        with steer(model, plan):
            assert not torch.equal(model(IDS).logits, vanilla)
        hook.remove()
        gamma = plan.scale(site, gate.layer).to(seen["x"].dtype)
        assert torch.equal(seen["y"], seen["x"] + seen["x"] * gamma)
    assert torch.equal(model(IDS).logits, vanilla)
