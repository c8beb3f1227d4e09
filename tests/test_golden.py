"""The paper protocol against what the authors' code computed (tests/golden), number by number."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import rmodels
from austeer.plan import Plan
from austeer.steering import clear, steer
from MFU_screening import MFU_screening
from set_MFU import set_MFU

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "gemma2")
SITES = ("attention", "ffn", "layer")  # the authors'


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request):
    return GOLDEN / request.param


@pytest.fixture(scope="module")
def model(folder):
    return rmodels.load(folder / "model", dtype="float32", device="cpu", attn_implementation="eager")


@pytest.fixture(scope="module")
def ranks(folder, model):
    pairs, tokenizer = json.loads((folder / "pairs.json").read_text()), AutoTokenizer.from_pretrained(folder / "model")
    return {
        site: MFU_screening(pairs, model, tokenizer, None, site, protocol="paper", progress=False) for site in SITES
    }


def masks(folder, prefix=""):
    """Yield (site, k, alpha, mask) of every steering vector that the authors' selection wrote."""
    stored = np.load(folder / "masks.npz")
    for key in stored.files:
        if key.startswith(SITES):
            site, setting = key.split("__")
            k, alpha = setting[1:].split("_a")
            yield site, int(k), float(alpha), torch.tensor(stored[key])


@pytest.mark.parametrize("site", SITES)
def test_ranks(folder, ranks, site):
    golden = np.load(folder / "scores.npz")
    scores, layer_ids, indices = ranks[site]
    assert scores == golden[f"{site}__scores"].tolist()
    assert layer_ids == golden[f"{site}__layer_ids"].tolist()
    assert indices == golden[f"{site}__indices"].tolist()
    assert ranks[site].order.tolist() == golden[f"{site}__order"].tolist()


def test_masks_by_the_authors_call(folder, model, ranks):
    count = 0
    for site, k, alpha, mask in masks(folder):
        set_MFU(*ranks[site], k, alpha, model, site)
        written = [
            gate.scale if gate.scale is not None else torch.zeros(gate.width) for gate in rmodels.gates(model, site)
        ]
        assert torch.equal(torch.stack(written), mask), (site, k, alpha)
        count += 1
    clear(model)
    assert count == 150


def test_masks_by_plans(folder, ranks):
    for site, k, alpha, mask in masks(folder):
        if 1 <= k <= ranks[site].score.numel():
            plan = set_MFU(ranks[site], k, alpha)
            assert torch.equal(torch.stack([plan.scale(site, layer) for layer in range(4)]), mask)


@pytest.mark.parametrize(("tag", "dtype"), [("f16model", "float16"), ("bf16model", "bfloat16")])
def test_masks_in_half_precision(tag, dtype):
    model = rmodels.load(GOLDEN / "llama" / "model", dtype=dtype, device="cpu")
    stored = np.load(GOLDEN / "llama" / "masks.npz")
    (key,) = [key for key in stored.files if key.startswith(f"{tag}__ffn__k100_a15")]
    scores = np.load(GOLDEN / "llama" / "scores.npz")
    lists = [scores[f"ffn__{name}"].tolist() for name in ("scores", "layer_ids", "indices")]
    set_MFU(*lists, 100, 15, model, "ffn")
    written = torch.stack([gate.scale for gate in rmodels.gates(model, "ffn")])
    assert torch.equal(written.float(), torch.tensor(stored[key]).float())


def test_logits(folder, model):
    golden, runs = np.load(folder / "logits.npz"), _runs(folder)
    for key in golden.files:
        tag, prompt = key.rsplit("__p", 1)
        expected = torch.tensor(golden[key])
        with _steered(model, folder, tag):
            logits = model(torch.tensor([runs[tag, int(prompt)]["prompt_ids"]])).logits[0]
        assert (logits[-len(expected) :] - expected).abs().max() <= 1e-4, key


def test_generations(folder, model):
    for (tag, prompt), run in _runs(folder).items():
        ids, expected = torch.tensor([run["prompt_ids"]]), run["new_ids"]
        if folder.name == "gemma2":  # their cache goes wrong once a short prompt outgrows the window
            expected = expected[: {0: 3, 3: 14}.get(prompt, 20)]
        with _steered(model, folder, tag):
            new = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
        assert new[: len(expected)] == expected, (tag, prompt)


def _runs(folder):
    return {(run["tag"], run["prompt"]): run for run in json.loads((folder / "generations.json").read_text())["runs"]}


def _steered(model, folder, tag):
    if tag == "base":
        return steer(model, Plan({}))
    return steer(model, Plan({tag.split("__")[0]: torch.tensor(np.load(folder / "masks.npz")[tag])}))
