"""vLLM under adapters answers as the live model under their plans. Run by tests/run-vllm.sh, not by default."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import pytest
import torch
from conftest import COMMON, FAMILIES, SPECIAL, byte_tokenizer
from samples import write_datasets
from test_adapters import plan_for
from test_engine_batches import same_words, words
from transformers import AutoConfig, AutoModelForCausalLM

import main
import rmodels
from austeer.errors import AUSteerError
from austeer.export.fold import fold
from austeer.export.lora import save_lora
from austeer.identity import model_header
from austeer.methods import austeer
from austeer.plan import Plan
from austeer.steering import steer
from eval.answering.answerer import Generation, option_tokens
from eval.answering.live import LiveAnswerer
from experiments.bench import BENCHES
from experiments.engines.vllm_engine import VLLMEngine

pytestmark = pytest.mark.vllm
PROMPTS = [
    "The cat sat on",
    "Question: is iron heavier than water?\nAnswer:",
    "gave",
    "One, two, three, four, five, six,",
]
SITES = (["attention"], ["ffn"], ["neuron"], ["attention", "ffn", "neuron"])  # of each plan
PLANS = len(SITES)


def checkpoint(name, folder, **more):
    """As the other tests' models, but with heads of 32: vLLM's CPU kernels take no smaller ones."""
    special = {**SPECIAL[name], "head_dim": 32, **more}
    if "final_logit_softcapping" in special:
        special["final_logit_softcapping"] = 30.0  # at 6 random logits saturate, and rounding decides which is largest
    config = AutoConfig.for_model(name, **{**COMMON, **special})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Served:
    """A family's model live and in vLLM, with plans and their adapters."""

    def __init__(self, name, folder, dtype="float32"):
        path = checkpoint(name, folder / "model")
        self.model = rmodels.load(path, dtype=dtype, device="cpu")
        self.tokenizer = rmodels.load_tokenizer(path)
        self.plans = [plan_for(self.model, sites, seed=seed) for seed, sites in enumerate(SITES)]
        self.adapters = [save_lora(path, plan, folder / f"plan{i}").folder for i, plan in enumerate(self.plans)]
        self.engine = VLLMEngine(path, max_loras=PLANS, max_lora_rank=16, dtype=dtype, max_model_len=128)

    def live(self, plan, question):
        with steer(self.model, [plan] if plan is None else plan):
            return LiveAnswerer(self.model, self.tokenizer).answer(PROMPTS, question, batch_size=1)


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "qwen3_moe"])
def served(request, tmp_path_factory):
    made = Served(request.param, tmp_path_factory.mktemp("served"))
    yield made
    made.engine.stop()


def test_vllm_equals_live(served):
    """Base and a plan of each site and of all in one batch: the same greedy text, log-probabilities of the options."""
    question = Generation(12, options=option_tokens(served.tokenizer, ["yes", "no"], "Answer:"))
    plans, folders = [None, *served.plans], [None, *served.adapters]
    grid = [(prompt, folder) for folder in folders for prompt in PROMPTS]
    found = served.engine.answers([prompt for prompt, _ in grid], question, [folder for _, folder in grid])
    seen = set()
    for index, plan in enumerate(plans):
        live = served.live(plan, question)
        engine = found[index * len(PROMPTS) : (index + 1) * len(PROMPTS)]
        assert [one.text for one in engine] == [one.text for one in live]
        for one, other in zip(engine, live, strict=True):
            assert one.options == pytest.approx(other.options, abs=1e-4)
        seen.add(tuple(round(value, 2) for one in live for value in one.options))
    assert len(seen) == len(plans)  # every plan changes the answers, so that a silent no-op would show


def test_plans_together_equal_each_alone(served):
    question = Generation(8)
    together = served.engine.answers(PROMPTS[:1] * PLANS, question, served.adapters)
    alone = [served.engine.answers(PROMPTS[:1], question, [adapter])[0] for adapter in served.adapters]
    assert together == alone
    assert served.engine.answers(PROMPTS, question) == served.live(None, question)


def test_folders_of_one_name_are_different_adapters(served, tmp_path):
    """vLLM tells adapters apart by their names."""
    named = [copytree(adapter, tmp_path / str(place) / "plan") for place, adapter in enumerate(served.adapters)]
    asked = PROMPTS[:2] * PLANS, Generation(8)
    assert served.engine.answers(*asked, [one for one in named for _ in range(2)]) == served.engine.answers(
        *asked, [one for one in served.adapters for _ in range(2)]
    )


def test_refusals(served, tmp_path):
    wide = save_lora(served.model, plan_for(served.model, ["attention"], aus=20), tmp_path / "wide")
    with pytest.raises(AUSteerError, match="has rank 21, and this engine takes 16"):
        served.engine.answers(["a"], Generation(1), [wide.folder])
    served.engine.targets, allowed = {"down_proj"}, served.engine.targets
    narrow = save_lora(served.model, plan_for(served.model, ["attention"]), tmp_path / "narrow")
    with pytest.raises(AUSteerError, match="changes o_proj"):
        served.engine.answers(["a"], Generation(1), [narrow.folder])
    served.engine.targets = allowed
    with pytest.raises(AUSteerError, match="cannot read the adapter"):
        served.engine.answers(["a"], Generation(1), [tmp_path / "nowhere"])
    with pytest.raises(AUSteerError, match="1 adapters for 2 prompts"):
        served.engine.answers(["a", "b"], Generation(1), [None])


def test_bfloat16(tmp_path):
    """Each rounds in its own places: likelihoods agree to a few hundredths, measured against what the plans do."""
    made = Served("llama", tmp_path, "bfloat16")
    question = Generation(1, options=option_tokens(made.tokenizer, ["yes", "no"], "Answer:"))
    moved, apart = [], []
    idle = made.live(None, question)
    for plan, adapter in zip(made.plans, made.adapters, strict=True):
        live = made.live(plan, question)
        found = made.engine.answers(PROMPTS, question, [adapter] * len(PROMPTS))
        for a, b, c in zip(live, found, idle, strict=True):
            apart += [abs(x - y) for x, y in zip(a.options, b.options, strict=True)]
            moved += [abs(x - y) for x, y in zip(a.options, c.options, strict=True)]
    made.engine.stop()
    assert max(apart) < 0.1 * max(moved), (max(apart), max(moved))


def test_a_family_with_experts_is_refused_on_the_cpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU takes it")
    with pytest.raises(AUSteerError, match="mixtures of experts on the CPU"):
        VLLMEngine(checkpoint("qwen3_moe", tmp_path / "model"), max_loras=1, max_lora_rank=8, max_model_len=64)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_checkpoint_equals_live(tmp_path, name):
    """The engine knows of no steering."""
    if name == "qwen3_moe" and not torch.cuda.is_available():
        pytest.skip("vLLM's CPU build has no kernel for experts: it raises NotImplementedError at loading")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    path = checkpoint(name, tmp_path / "model")
    model, tokenizer = rmodels.load(path, dtype="float32", device="cpu"), rmodels.load_tokenizer(path)
    sites = [site for site in ("attention", "ffn", "neuron") if site in rmodels.sites(model)]
    plan = Plan({site: torch.zeros(rmodels.site_shape(model, site)) for site in sites}, header=model_header(model))
    for scale in plan.scales.values():
        scale[:, 3], scale[1:, -2] = 1.5, -0.6
    fold(path, plan, tmp_path / "folded", certificate=False)
    engine = LLM(str(tmp_path / "folded"), dtype="float32", max_model_len=128, trust_remote_code=False)
    asked = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    settings = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in asked], settings, use_tqdm=False)
    moved = 0.0
    for ids, output in zip(asked, outputs, strict=True):
        said = list(output.outputs[0].token_ids)
        text = torch.tensor([ids + said])
        theirs = torch.tensor([at[token].logprob for token, at in zip(said, output.outputs[0].logprobs, strict=True)])
        idle = model(text).logits[0].log_softmax(-1)
        with steer(model, plan):
            live = model(text).logits[0].log_softmax(-1)
        places = torch.arange(len(ids) - 1, len(ids) + len(said) - 1)
        assert live[places].argmax(-1).tolist() == said
        assert (live[places, said] - theirs).abs().max() < 1e-4
        moved = max(moved, float((live - idle)[places, said].abs().max()))
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    assert moved > 0.5


def ask(port, model, prompt):
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["text"]


def test_server(tmp_path):
    """Two plans and the model as it is, asked at once over HTTP, are each the live model's."""
    path = checkpoint("llama", tmp_path / "model")
    model, tokenizer = rmodels.load(path, dtype="float32", device="cpu"), rmodels.load_tokenizer(path)
    plans = {name: plan_for(model, ["attention", "ffn"], seed=seed) for seed, name in enumerate(["calm", "brave"])}
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [str(tmp_path / f"{name}.safetensors") for name in plans]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    root, log = Path(__file__).parents[1], (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "austeer.export.serve", str(path), *files, *flags],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        for _ in range(300):
            time.sleep(1)
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                continue
        prompt = "Question: is iron heavier than water?\nAnswer:"
        with ThreadPoolExecutor(6) as together:
            names = [str(path), "calm", "brave"] * 2
            got = dict(zip(names, together.map(lambda name: ask(port, name, prompt), names), strict=True))
        for name, plan in {str(path): None, **plans}.items():
            with steer(model, [plan] if plan is None else plan):
                assert got[name] == LiveAnswerer(model, tokenizer).answer([prompt], Generation(8), batch_size=1)[0].text
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def test_a_comparison_by_vllm_is_the_live_one(tmp_path, monkeypatch):
    """main.py on a task in the official format, both sites: the same choices and outcomes, item by item."""
    data = write_datasets(tmp_path / "data")
    model = checkpoint("llama", tmp_path / "model", max_position_embeddings=512)
    monkeypatch.setitem(austeer.KS, "full", (4, 60))  # the second needs another engine, of a higher rank
    monkeypatch.setitem(austeer.ALPHAS, "full", (0.0, 1.0, 4.0))
    found = {}
    for engine in ("live", "vllm"):
        results = tmp_path / engine
        main.main(
            ["--model", str(model), "--data_name", "copa", "--data-dir", str(data), "--results", str(results),
             "--path", str(tmp_path / "ranks"), "--method", "causal", "random", "--draws", "1", "--dtype", "float32",
             "--engine", engine]
        )  # fmt: skip
        BENCHES.close()
        rows = [json.loads(file.read_text()) for file in (results / "records").glob("*.json")]
        assert all(row["engine"].startswith(engine) for row in rows)
        found[engine] = {
            (row["method"], row["site"]): [row.get(key) for key in ("outcomes", "grid_outcomes", "chosen", "columns")]
            for row in rows
        }
    assert found["vllm"] == found["live"] and len(found["live"]) == 6
    same_words(words(tmp_path / "live"), words(tmp_path / "vllm"))
