"""Every way to steer by one plan does the same. The reference: forward hooks on upstream's own, unpatched model.

vLLM is compared in an environment of its own, by tests/test_vllm.py.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import COMMON, FAMILIES, SPECIAL
from reference import hook_steering
from test_adapters import plan_for
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import rmodels
from austeer.errors import AUSteerError
from austeer.export.fold import fold
from austeer.export.hot_patch import folded
from austeer.export.ia3 import save_ia3
from austeer.export.lora import save_lora
from austeer.plan import Plan
from austeer.steering import steer

# How far the logits of each way may be from the reference's.
# float32: sums run in another order, with one rounding where hooks have two. Logits here are up to 20.
FLOAT32 = 1e-4
# bfloat16: hooks round a steered activation, folding rounds a weight, adapters round the sum of two products, and none
# of them is exact. So all, hooks included, are compared with float32 arithmetic on the same bfloat16 weights, and may
# differ from it by this many times the difference of hooks.
BFLOAT16 = 2.0
# With experts, rounding sends tokens elsewhere, which no tolerance covers. There the arithmetic is float32 on bfloat16
# weights, and only the rounding of folded weights is left, a share of the largest logit (austeer/export/certificate.py).
EXPERTS = 2e-2
# 4-bit and 8-bit layers, as a share of the plan's effect. 4-bit: matrix products are in bfloat16. 8-bit: a tiny
# difference may round to another int8, and a LoRA's own part of the product is not rounded.
QUANTISED = {"live": 0.0, "IA3": 0.05, "LoRA": 0.1, "hot patch": 0.02}

IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 88, 12], [1, 41, 7, 254, 17, 99, 43, 66, 71, 20]])
GREEDY = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)


@dataclass
class Case:
    source: Path
    plan: Plan
    dtype: str
    folder: Path  # for what is exported
    quantization: str | None = None

    def ours(self):
        return rmodels.load(self.source, dtype=self.dtype, device="cpu", quantization=self.quantization)

    def upstream(self, dtype=None):
        kernel = rmodels.family(
            AutoConfig.from_pretrained(self.source, trust_remote_code=False).model_type
        ).DEFAULT_KERNEL
        bits = {
            "4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
            "8bit": dict(load_in_8bit=True),
        }.get(self.quantization)
        model = AutoModelForCausalLM.from_pretrained(
            self.source,
            dtype=dtype or self.dtype,
            attn_implementation=kernel,
            trust_remote_code=False,
            quantization_config=bits and BitsAndBytesConfig(**bits),
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = (
                    False  # another kernel, with other rounding; rmodels.load does so, too
                )
        return model.eval()


@contextmanager
def hooks(case, dtype=None):
    model = case.upstream(dtype)
    with ExitStack() as stack:
        for site, scale in case.plan.scales.items():
            stack.enter_context(hook_steering(model, Plan({site: scale})))
        yield model


@contextmanager
def live(case):
    model = case.ours()
    with steer(model, case.plan):
        yield model


@contextmanager
def hot_patch(case):
    with folded(case.ours(), case.plan) as model:
        yield model


@contextmanager
def checkpoint(case):
    fold(case.source, case.plan, case.folder / "folded", certificate=False)
    yield AutoModelForCausalLM.from_pretrained(
        case.folder / "folded",
        dtype=case.dtype,
        attn_implementation=case.upstream().config._attn_implementation,
        trust_remote_code=False,
    ).eval()


def adapter(save, name, merged=False):
    @contextmanager
    def adapted(case):
        peft = pytest.importorskip("peft", reason="peft is in requirements2.txt")
        save(case.ours() if case.quantization else case.source, case.plan, case.folder / name)
        model = peft.PeftModel.from_pretrained(case.upstream(), case.folder / name).eval()
        yield model.merge_and_unload() if merged else model

    return adapted


WAYS = {
    "live": live,
    "hot patch": hot_patch,
    "folded": checkpoint,
    "LoRA": adapter(save_lora, "lora"),
    "IA3": adapter(save_ia3, "ia3"),
    "LoRA merged": adapter(save_lora, "lora-to-merge", True),
    "IA3 merged": adapter(save_ia3, "ia3-to-merge", True),
}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits.float()


def greedy(model):
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY)


def assert_same_text(text, expected, reference, allowed):
    """Compare up to the first token whose two best reference logits are closer than the allowed difference."""
    best, second = reference.topk(2).values.unbind(-1)
    close = best - second <= 2 * allowed
    for row, (a, b) in enumerate(zip(text, expected, strict=True)):
        differ = (a != b).nonzero()
        assert not len(differ) or close[row, differ[0] - 1], f"row {row} differs from its token {int(differ[0])} on"


CASES = [
    (name, sites, dtype)
    for dtype in ("float32", "bfloat16")
    for name in FAMILIES
    for sites in (["attention"], ["ffn"], ["neuron"], ["attention", "ffn"])
    if (name, sites) != ("qwen3_moe", ["neuron"])  # which hooks do not reach: tests/test_experts.py
]
EVERYWHERE = [(name, ["attention"] if name == "qwen3_moe" else ["attention", "ffn"], "float32") for name in FAMILIES]
EVERYWHERE += [(name, ["attention"], "bfloat16") for name in FAMILIES]


@pytest.mark.parametrize(
    ("name", "sites", "dtype"),
    [
        pytest.param(
            *case, marks=[] if case in EVERYWHERE else pytest.mark.slow, id="-".join([case[0], *case[1], case[2]])
        )
        for case in CASES
    ],
)
def test_every_way_equals_the_reference(tmp_path, checkpoints, name, sites, dtype):
    source = checkpoints[name]
    if dtype != "float32":
        source = tmp_path / "source"
        AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=dtype, trust_remote_code=False).save_pretrained(
            source
        )
    rounds = dtype == "bfloat16" and name != "qwen3_moe"
    case = Case(source, steered := Plan({}), "bfloat16" if rounds else "float32", tmp_path)
    with_all_layers = name == "qwen3_moe" and "ffn" in sites  # of its experts, too, which IA3 cannot reach
    steered.scales = scales(case.ours(), sites) if with_all_layers else plan_for(case.ours(), sites).scales
    with hooks(case) as model:
        expected = greedy(model)
        reference = logits(model, expected)
    vanilla = case.upstream()
    assert not torch.equal(greedy(vanilla), expected)
    exact, allowed = reference, FLOAT32
    if rounds:
        with hooks(case, "float32") as model:
            exact = logits(model, expected)
        allowed = BFLOAT16 * float((reference - exact).abs().max())
    elif dtype == "bfloat16":
        allowed = EXPERTS * float(reference.abs().max())
    assert (logits(vanilla, expected) - exact).abs().max() > 10 * allowed
    for way, steering in WAYS.items():
        if with_all_layers and way.startswith("IA3"):
            with pytest.raises(AUSteerError, match="sums many experts"), steering(case):
                pass
            continue
        with steering(case) as model:
            actual = logits(model, expected)
            assert (actual - exact).abs().max() <= allowed, way
            assert_same_text(greedy(model), expected, exact, allowed)
            if dtype == "float32":
                assert torch.equal(actual.argmax(-1), reference.argmax(-1)), way


def scales(model, sites):
    """Scale two AUs in every layer."""
    result = {site: torch.zeros(rmodels.site_shape(model, site)) for site in sites}
    for scale in result.values():
        scale[:, 3], scale[:, -2] = 1.5, -0.6
    return result


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
def test_quantised(tmp_path, name, bits, site):
    """The adapter is made from the loaded model, and PEFT loads it on upstream's model with the same number of bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in requirements2.txt")
    wide = {**COMMON, "hidden_size": 64, "intermediate_size": 128, **SPECIAL[name]}  # 4-bit blocks hold 64 weights
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **wide)).save_pretrained(tmp_path / "model")
    case = Case(tmp_path / "model", Plan({}), "float32", tmp_path, bits)
    case.plan = plan_for(case.ours(), [site], strength=1.0)
    with hooks(case) as model:
        reference = logits(model, IDS)
    moved = (logits(case.upstream(), IDS) - reference).abs().max()
    for way in ("live", "IA3", "LoRA", "hot patch"):
        if way == "hot patch" and (bits, site) != ("8bit", "ffn"):
            with pytest.raises(AUSteerError, match="is quantised"), WAYS[way](case):
                pass
            continue
        with WAYS[way](case) as model:
            assert (logits(model, IDS) - reference).abs().max() <= QUANTISED[way] * moved, way
