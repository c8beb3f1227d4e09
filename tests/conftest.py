"""Tiny seeded checkpoints of every family, and a byte tokenizer."""

import gc
import os
from collections import defaultdict
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: no test asks the network

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import rmodels
from experiments import costs
from rmodels import sources

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "models").exists(), reason="needs ../shared, which users do not have")


def pytest_collection_finish():
    """Let the collector skip what was imported and collected: `gc.collect` would take half a second, hundreds of times."""
    gc.collect()
    gc.freeze()


torch.set_num_threads(1)  # on busy machines two threads are several times slower than one

COMMON = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=320, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    initializer_range=0.2,
)  # fmt: skip
SPECIAL = defaultdict(dict, {  # head_dim * heads differs from hidden_size everywhere: code that confuses them fails
    "gemma2": dict(
        sliding_window=12, attn_logit_softcapping=3.0, final_logit_softcapping=6.0, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1]),
})  # fmt: skip
FAMILIES = sorted(rmodels.families())

PAIRS = [
    (f"Question: is {a} {w} than {b}?\nAnswer:", right, wrong)
    for i, (a, b) in enumerate([("iron", "water"), ("an owl", "a mouse"), ("June", "May"), ("a lamp", "the moon"),
                                ("ten", "four and a half"), ("ice", "steam"), ("a drum", "a bell"), ("night", "noon")])
    for w, right, wrong in [("heavier", " yes", " no"), ("more quiet" + " still" * (i % 3), " no, never", " yes")]
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def documents_once():
    """Draw the neutral text of the embedded models once in a process, and not once for every bench."""
    costs.held_out_documents = cache(costs.held_out_documents)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, one merge ("ga" + "ve") that crosses a prompt's seam, and BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "ga", "ve", "gave"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("g", "a"), ("v", "e"), ("ga", "ve")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def save_tiny(folder: Path, config: PretrainedConfig) -> Path:
    """Save upstream's model of a config, with seeded random weights, and its tokenizer."""
    torch.manual_seed(0)
    return save_model(folder, AutoModelForCausalLM.from_config(config))


def save_model(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of a real language model, which tests/run.sh fetches. Where CI is set its tests fail without it."""
    if not (sources.cache_folder() / f"{sources.SMOLLM2}.gguf").exists():
        reason = f"{sources.SMOLLM2} is not in the cache: bash scripts/setup.sh --smollm2"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return sources.local(sources.SMOLLM2)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """family -> a saved upstream checkpoint with its tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_tiny(root / name, AutoConfig.for_model(name, **COMMON, **SPECIAL[name])) for name in FAMILIES}


@pytest.fixture(scope="session")
def llama(checkpoints):
    return rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def little_neutral_text(monkeypatch):
    """Cost is measured on a quarter of the embedded models' text: what it costs is tested, and not how exactly."""
    monkeypatch.setattr("experiments.costs.MORE", 1)
    monkeypatch.setattr("experiments.costs.DOCUMENTS", 3000)


@pytest.fixture(autouse=True)
def no_steering_left(request):
    """Shared models must leave every test as they entered it."""
    yield
    for name in ("llama", "model"):
        if name in request.fixturenames:
            left = [gate for gate in rmodels.gates(request.getfixturevalue(name)) if gate.scale is not None or gate.tap]
            assert not left, f"the test left {len(left)} gates set"
