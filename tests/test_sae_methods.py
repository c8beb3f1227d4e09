"""SAEs, STA and NeuroSteer: their worked numbers, plain loops, and runs on tiny and embedded models."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PAIRS
from one_cell import computed
from reference import hooked
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer import sae as sae_file
from austeer.chat import pairs_in_chat
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.identity import fingerprint
from austeer.methods.base import BUDGET
from austeer.methods.neurosteer import PRESETS, Firing, Neurons, NeuroSteer, feature_residual, most_often
from austeer.methods.sta import STA, Atoms, contrast, keep_atoms, scores, target_vector
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.sae import SAE, find_sae, token_activations
from austeer.steering import steer
from austeer.tokens import CLEAN, encode
from embedded import acceptance, tasks
from embedded import sae as recipe
from eval.scoring.behaviour_measures import worst_of_samples
from experiments import run_cell
from experiments.records import unpack
from paper import specs

LAYER = 1
METHODS = (STA, NeuroSteer)


def random_sae(width=48, latents=60, seed=0, **fields) -> SAE:
    draw = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(shape, generator=draw) for shape in ((width, latents), (latents, width)))
    b_enc, b_dec = torch.randn(latents, generator=draw), torch.randn(width, generator=draw)
    return SAE(**{"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "layer": LAYER, **fields})


@pytest.fixture
def stored(tmp_path):
    """Save an SAE of the tiny Llama, some of whose latents never fire, and return its path."""
    result = random_sae(threshold=torch.full((60,), 2.0))
    result.b_enc[:7] = -1e4
    result.save(tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


def evidence(model, tokenizer, pairs=PAIRS):
    return Evidence(model, tokenizer, [Pair(*pair) for pair in pairs], "layer", None)


# the value


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_encode_and_decode_are_the_formulas(centered, jump):
    sae = random_sae(5, 9, centered=centered, threshold=torch.linspace(0, 2, 9) if jump else None)
    for h in torch.randn(20, 5, generator=torch.Generator().manual_seed(1)):
        z = []
        for i in range(9):
            before = float(sae.b_enc[i])
            before += sum(float(h[d] - (sae.b_dec[d] if centered else 0)) * float(sae.W_enc[d, i]) for d in range(5))
            z.append(before if before > (float(sae.threshold[i]) if jump else 0) else 0.0)
        back = [sum(z[i] * float(sae.W_dec[i, d]) for i in range(9)) + float(sae.b_dec[d]) for d in range(5)]
        assert torch.allclose(sae.encode(h), torch.tensor(z), atol=1e-5)
        assert torch.allclose(sae.decode(sae.encode(h)), torch.tensor(back), atol=1e-5)


def test_a_pre_activation_at_its_threshold_is_silent():
    one = torch.ones(1, 1)
    sae = SAE(one, torch.zeros(1), one, torch.zeros(1), 0, threshold=torch.ones(1))
    assert sae.encode(torch.tensor([[1.0], [1.001], [0.5], [-3.0]])).flatten().tolist() == pytest.approx(
        [0, 1.001, 0, 0]
    )


def test_a_file_holds_all_of_it(tmp_path):
    sae = random_sae(threshold=torch.rand(60), centered=True, header={"model": "m"})
    sae.to(torch.float16).save(tmp_path / "a.safetensors")
    back, h = SAE.load(tmp_path / "a.safetensors"), torch.randn(4, 48)
    assert back.header["model"] == "m" and back.layer == LAYER and back.centered and back.W_enc.dtype == torch.float32
    assert torch.equal(back.encode(h), sae.to(torch.float16).to(torch.float32).encode(h))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    with pytest.raises(AUSteerError, match="damaged"):
        SAE.load(tmp_path / "b.safetensors")
    with pytest.raises(AUSteerError, match=r"b_enc of the SAE has shape \(3,\), which does not fit W_enc of 48 x 60"):
        random_sae(b_enc=torch.zeros(3))
    with pytest.raises(AUSteerError, match="W_dec of the SAE holds inf or nan"):
        random_sae(W_dec=torch.full((60, 48), math.nan))
    sae_file.write_tensors(tmp_path / "c.safetensors", {"W_enc": h}, {"format": sae_file.FORMAT, "header": "{}"})
    with pytest.raises(AUSteerError, match="is not an SAE of the residual stream"):
        SAE.load(tmp_path / "c.safetensors")


def test_an_sae_of_another_model_is_refused(llama, tokenizer, tmp_path):
    known = evidence(llama, tokenizer)
    for sae, message in (
        (random_sae(width=40), "reads layer 1 of width 40; this model has 3 layers of 48"),
        (random_sae(layer=3), "reads layer 3"),
        (
            random_sae(header={"fingerprint": "0", "precision": "float32", "model": "m"}),
            r"trained on other weights \(m\)",
        ),
    ):
        sae.save(tmp_path / "other.safetensors")
        with pytest.raises(AUSteerError, match=message):
            find_sae(known, str(tmp_path / "other.safetensors"))
    random_sae(header={"fingerprint": "0", "precision": "bfloat16"}).save(tmp_path / "other.safetensors")
    assert find_sae(known, str(tmp_path / "other.safetensors")).latents == 60
    with pytest.raises(AUSteerError, match="no such file"):
        find_sae(known, str(tmp_path / "none.safetensors"))
    for method in METHODS:
        with pytest.raises(AUSteerError, match=r"needs a sparse autoencoder of the model: give --option sta\.sae"):
            method().prepare(known)


# sae-lens, by a stand-in


def lens(monkeypatch, kind="jumprelu", hook="blocks.1.hook_resid_post", scaling="none"):
    ours = random_sae(threshold=torch.full((60,), 0.5))
    metadata = SimpleNamespace(hook_name=hook, model_name="gemma-2-9b-it")
    config = SimpleNamespace(
        architecture=lambda: kind, metadata=metadata, normalize_activations=scaling, apply_b_dec_to_input=True
    )
    theirs = SimpleNamespace(cfg=config, **ours._tensors())
    requests = []

    def from_pretrained(release, sae_id):
        requests.append((release, sae_id))
        if release == "none":
            raise ValueError("Release none not found\nin the directory")
        return theirs

    package = SimpleNamespace(SAE=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "sae_lens", package)
    return ours, requests


def test_a_release_of_sae_lens(monkeypatch, llama, tokenizer):
    ours, requests = lens(monkeypatch)
    actual = find_sae(evidence(llama, tokenizer), "gemma-scope-9b-it-res/layer_20/width_16k/average_l0_91")
    assert requests == [("gemma-scope-9b-it-res", "layer_20/width_16k/average_l0_91")]
    h = torch.randn(6, 48)
    assert torch.equal(actual.encode(h), replace(ours, centered=True).encode(h))
    assert actual.layer == 1 and actual.header["source"].startswith("gemma-scope-9b-it-res/")
    lens(monkeypatch, hook="blocks.2.hook_resid_pre", kind="standard")
    actual = find_sae(evidence(llama, tokenizer), "llama_scope_lxr_8x/l15r_8x")
    assert actual.layer == 1 and actual.threshold is None  # the input of layer 2 is the output of layer 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "topk"}, "is a topk SAE"),
        ({"scaling": "layer_norm"}, "input scaling layer_norm"),
        ({"hook": "blocks.1.hook_mlp_out"}, "reads blocks.1.hook_mlp_out"),
        ({"hook": "blocks.0.hook_resid_pre"}, "reads blocks.0.hook_resid_pre"),
        ({"hook": None}, "reads an unnamed place"),
    ],
)
def test_releases_that_do_not_fit_are_refused(monkeypatch, changed, message):
    lens(monkeypatch, **changed)
    with pytest.raises(AUSteerError, match=message):
        sae_file.from_sae_lens("some/id")


def test_sae_lens_missing_or_without_the_release(monkeypatch):
    lens(monkeypatch)
    with pytest.raises(AUSteerError, match=r"cannot load none/x: Release none not found$"):
        sae_file.from_sae_lens("none/x")
    with pytest.raises(AUSteerError, match="neither a file nor RELEASE/ID"):
        sae_file.from_sae_lens("nothing")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(
        AUSteerError, match=r"pip install .austeer\[sae\].*pip install -r (scripts/.*\.txt)\)"
    ) as missing:
        sae_file.from_sae_lens("some/id")
    assert "\n" not in str(missing.value)
    (pinned,) = [line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("sae-lens")]
    assert REQUIREMENTS.name in str(missing.value) and pinned.startswith("sae-lens==6.")


def test_the_row_of_the_paper_names_its_sae():
    (table,) = specs.read("paper", ["table1"])
    options = {cell.method.options for entry in table.entries if entry.row == "sta" for cell in entry.cells}
    assert options == {(("sae", PUBLISHED),)} and {e.block for e in table.entries if e.row == "sta"} == {"gemma2-9b-it"}


# sae-lens itself, where it is installed

REQUIREMENTS = Path(sae_file.__file__).parents[1] / "scripts" / "requirements-sae.txt"
PUBLISHED = "gemma-scope-9b-it-res-canonical/layer_20/width_16k/canonical"


def sae_lens():
    return pytest.importorskip("sae_lens", reason="sae-lens is in scripts/requirements-sae.txt")


@pytest.mark.slow
def test_the_published_layout_of_gemma_scope(tmp_path, monkeypatch, tokenizer):
    """Made-up weights in the hub's folders and of the published size become STA's plan on a thin Gemma 2 of 21 layers."""
    sae_lens()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    width, latents, used, draw = 3584, 16384, 48, np.random.default_rng(0)
    weights = {
        "W_enc": np.zeros((width, latents), np.float32),
        "W_dec": np.zeros((latents, width), np.float32),
        "b_enc": draw.normal(size=latents).astype(np.float32),
        "b_dec": draw.normal(size=width).astype(np.float32),
        "threshold": np.full(latents, 0.5, np.float32),
    }
    weights["W_enc"][:used], weights["W_dec"][:, :used] = (
        draw.normal(size=(used, latents)),
        draw.normal(size=(latents, used)),
    )
    repository, commit = tmp_path / "models--google--gemma-scope-9b-it-res", "0" * 40
    folder = repository / "snapshots" / commit / "layer_20" / "width_16k" / "average_l0_91"
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    np.savez_compressed(folder / "params.npz", **weights)
    config = AutoConfig.for_model(
        "gemma2", hidden_size=width, intermediate_size=16, num_hidden_layers=21, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=320, max_position_embeddings=64, sliding_window=12, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "thin")
    known = evidence(rmodels.load(tmp_path / "thin", dtype="float32", device="cpu"), tokenizer, PAIRS[:2])
    sae = find_sae(known, PUBLISHED)
    h = torch.randn(20, width, generator=torch.Generator().manual_seed(1))
    before = h.numpy() @ weights["W_enc"] + weights["b_enc"]
    assert np.allclose(sae.encode(h), np.where(before > 0.5, before, 0), atol=1e-3) and sae.layer == 20
    method = STA(sae=PUBLISHED)
    plan = method.plan(method.prepare(known), {"keep": 0.35, "alpha": 1.0})
    assert plan.shift("layer", 20)[:used].any() and len({au[1] for au in plan.aus()}) == 1


def test_a_folder_of_sae_lens_becomes_a_file(tmp_path):
    """docs/methods.md shows these two calls for an SAE that somebody trained with sae-lens."""
    package = sae_lens()
    weights = {
        name: tensor.contiguous() for name, tensor in random_sae(threshold=torch.full((60,), 0.5))._tensors().items()
    }
    save_file(weights, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(
        '{"architecture": "jumprelu", "d_in": 48, "d_sae": 60, "dtype": "float32", "apply_b_dec_to_input": true, '
        '"normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "model_name": "own"}}'
    )
    sae_file.convert(package.SAE.load_from_disk(tmp_path), "own").save(tmp_path / "own.safetensors")
    ours, h = SAE.load(tmp_path / "own.safetensors"), torch.randn(30, 48)
    expected = random_sae(threshold=torch.full((60,), 0.5), centered=True)
    assert torch.allclose(ours.encode(h), expected.encode(h), atol=1e-5) and (ours.layer, ours.centered) == (1, True)


@pytest.mark.parametrize("kind", ["StandardSAE", "JumpReLUSAE"])
def test_objects_of_the_real_package(kind):
    package = sae_lens()
    config = getattr(package, f"{kind}Config")(d_in=6, d_sae=11, apply_b_dec_to_input=kind == "StandardSAE")
    config.metadata.hook_name = "blocks.4.hook_resid_post"
    theirs = getattr(package, kind)(config)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.rand(weight.shape) - 0.3)
    ours, h = sae_file.convert(theirs, "made/up"), torch.randn(50, 6)
    assert torch.allclose(ours.encode(h), theirs.encode(h), atol=1e-6) and bool((ours.encode(h) > 0).any())
    assert torch.allclose(ours.decode(ours.encode(h)), theirs(h), atol=1e-6) and ours.layer == 4


# reading the texts


@torch.no_grad()
def residuals(model, text_ids, layer=LAYER):
    """Return (tokens, width) from a whole forward of upstream's model."""
    rows = {}
    with hooked(model, "layer", lambda index, x: rows.__setitem__(index, x[0].clone())):
        model(torch.tensor([text_ids]))
    return rows[layer]


@pytest.mark.parametrize("bos", [True, False])
def test_activations_of_all_tokens_are_those_of_whole_texts(checkpoints, llama, tokenizer, bos):
    import copy

    upstream = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).eval()
    tokenizer, pairs = copy.deepcopy(tokenizer), [*PAIRS, ("he ga", "ve", "ined"), ("same", "x", "x")]
    if not bos:  # then some texts share nothing
        tokenizer.post_processor = None
        tokenizer._tokenizer.post_processor = None
        pairs += [("", "yes", "no"), ("", "a", "bcd")]
    expected = [
        [residuals(upstream, [*pair.prefix, *tail]) for tail in (pair.positive, pair.negative)]
        for pair in encode([Pair(*p) for p in pairs], tokenizer, CLEAN, 256)[0]
    ]
    actual = list(token_activations(evidence(llama, tokenizer, pairs), LAYER))
    assert len(actual) == len(expected) == len(pairs) - 1
    for shared, right, wrong in actual:
        close = [
            len(shared) + len(right) == len(a)
            and len(shared) + len(wrong) == len(b)
            and torch.allclose(torch.cat([shared, right]), a, atol=1e-4)
            and torch.allclose(torch.cat([shared, wrong]), b, atol=1e-4)
            for a, b in expected
        ]
        assert sum(close) == 1  # batches go by length
    assert (min(len(shared) for shared, _, _ in actual) == 0) == (not bos)


def whole_texts(checkpoints, tokenizer, sae, pairs):
    """Return z of each text, with the index where its own tokens begin."""
    upstream = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).eval()
    for pair in encode([Pair(*p) for p in pairs], tokenizer, CLEAN, 256)[0]:
        z = [sae.encode(residuals(upstream, [*pair.prefix, *tail])) for tail in (pair.positive, pair.negative)]
        h = [residuals(upstream, [*pair.prefix, *tail]) for tail in (pair.positive, pair.negative)]
        yield len(pair.prefix), *z, *h


# STA

Z_RIGHT = torch.tensor([[2, 0, 1, 0, 0.5], [4, 0, 0, 0, 0.5], [0, 1, 2, 0, 0.5]])
Z_WRONG = torch.tensor([[0, 3, 1, 0, 0], [0, 1, 0, 0, 0.5], [0, 2, 1, 0, 0.5]])
DECODER = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])


def test_sta_worked_example():
    amplitude, frequency = contrast(zip(Z_RIGHT, Z_WRONG, strict=True))
    assert amplitude.tolist() == pytest.approx([2, -1.666667, 0.333333, 0, 0.166667], abs=1e-6)
    assert frequency.tolist() == [2, -2, 0, 0, 1]
    assert scores(amplitude, frequency).tolist() == [1, -1, 0, 0, 0.5]

    def kept(keep):
        return keep_atoms(amplitude, frequency, keep).nonzero().flatten().tolist()

    assert kept(0.2) == [0, 1] and kept(0.4) == [0, 1] and kept(0.6) == [0, 1, 2, 4]
    plain = torch.where(keep_atoms(amplitude, frequency, 0.4), amplitude, 0).float() @ DECODER
    assert float(plain.norm()) == pytest.approx(2.603417, abs=1e-6)
    prepared = Atoms(amplitude, frequency, DECODER, 5.0, 1, (3, 3), {})
    plan = STA().plan(prepared, {"keep": 0.4, "alpha": 1.0})
    assert plan.shift("layer", 1).tolist() == pytest.approx([3.841106, -3.200922, 0], abs=1e-5)
    assert plan.tokens == "all" and {au[1] for au in plan.aus()} == {1} and plan.header["atoms"] == 2
    unfiltered = target_vector(amplitude, keep_atoms(amplitude, frequency, 0.6), DECODER, 6.5**0.5)
    assert unfiltered.tolist() == pytest.approx([2, -1.5, 0.5], abs=1e-5)  # norm kept: |(2, -1.5, .5)|^2 = 6.5
    doubled = STA().plan(prepared, {"keep": 0.4, "alpha": 2.0})
    assert torch.allclose(doubled.shift("layer", 1), 2 * plan.shift("layer", 1))


def sta_loops(right, wrong, keep):
    """Choose atoms one at a time, over rows z of pairs."""
    pairs, atoms = len(right), len(right[0])
    amplitude = [sum(right[j][i] - wrong[j][i] for j in range(pairs)) / pairs for i in range(atoms)]
    frequency = [sum((right[j][i] > 0) - (wrong[j][i] > 0) for j in range(pairs)) for i in range(atoms)]
    score = [f if a * f > 0 else 0 for a, f in zip(amplitude, frequency, strict=True)]
    bars = [sorted((abs(value) for value in of), reverse=True)[int(keep * atoms)] for of in (score, amplitude)]
    return amplitude, [i for i in range(atoms) if abs(score[i]) >= bars[0] and abs(amplitude[i]) >= bars[1]]


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.35, 0.9])
def test_sta_selects_as_plain_loops_do(keep):
    draw = torch.Generator().manual_seed(3)
    right, wrong = ((torch.randint(-6, 7, (9, 40), generator=draw) / 4).relu() for _ in range(2))
    right[:, :5] = wrong[:, :5] = 0  # dead
    right[:, 5] = wrong[:, 5] = 1  # constant
    amplitude, frequency = contrast(zip(right, wrong, strict=True))
    expected, kept = sta_loops(right.tolist(), wrong.tolist(), keep)
    assert torch.allclose(amplitude, torch.tensor(expected, dtype=torch.float64))
    assert keep_atoms(amplitude, frequency, keep).nonzero().flatten().tolist() == kept


def test_sta_on_a_model_is_the_whole_text_recipe(checkpoints, llama, tokenizer, stored):
    sae = SAE.load(stored)
    right, wrong, norm = [], [], []
    for start, z_right, z_wrong, h_right, h_wrong in whole_texts(checkpoints, tokenizer, sae, PAIRS):
        right.append(z_right[start:].mean(0).tolist())
        wrong.append(z_wrong[start:].mean(0).tolist())
        norm.append(h_right[start:].mean(0) - h_wrong[start:].mean(0))
    amplitude, kept = sta_loops(right, wrong, 0.3)
    shift = sum(amplitude[i] * sae.W_dec[i] for i in kept)
    norm = torch.stack(norm).mean(0).norm()
    method = STA(sae=stored)
    plan = method.plan(method.prepare(evidence(llama, tokenizer)), {"keep": 0.3, "alpha": 2.0})
    assert torch.allclose(plan.shift("layer", LAYER), 2 * shift * norm / shift.norm(), atol=1e-4)
    assert plan.header["fingerprint"] == fingerprint(llama) and 0 < len(kept) < 60
    assert not plan.shift("layer", 0).any() and not plan.scales


def test_sta_without_an_atom_to_keep_does_nothing():
    amplitude = torch.tensor([3.0, 2, 0.1, 0.1])  # large ones fire as often on both sides
    frequency = torch.tensor([0, 0, 5, 4])
    kept = keep_atoms(amplitude, frequency, 0.26)
    assert not kept.any() and not target_vector(amplitude, kept, torch.eye(4), 3.0).any()
    plan = STA().plan(Atoms(amplitude, frequency, torch.eye(4), 3.0, 0, (2, 4), {}), {"keep": 0.26, "alpha": 1.0})
    assert len(plan) == 0
    cancelled = target_vector(torch.tensor([1.0, 1.0]), torch.ones(2, dtype=bool), torch.tensor([[1.0], [-1.0]]), 2.0)
    assert cancelled.tolist() == [0]
    for keep in (0, 1, -0.5, math.nan):
        with pytest.raises(AUSteerError, match="keep, the share of atoms kept"):
            keep_atoms(amplitude, frequency, keep)


def test_the_original_sta_reads_chats(llama, tokenizer, stored, monkeypatch):
    """Pairs of a base model, and pairs that a task put into the chat format, stay as they are."""

    def plan(pairs, **options):
        method = STA(sae=stored, **options)
        return method.plan(method.prepare(evidence(llama, tokenizer, pairs)), {"keep": 0.35, "alpha": 1.0})

    raw = plan(PAIRS)
    assert torch.equal(plan(PAIRS, preset="original").shifts["layer"], raw.shifts["layer"])
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<m>")
    turns = [(f"<u>{prompt}</u><m>", right.strip(), wrong.strip()) for prompt, right, wrong in PAIRS]
    assert pairs_in_chat(tokenizer, [Pair(*pair) for pair in PAIRS]) == turns
    expected = plan(turns)
    assert not torch.allclose(expected.shifts["layer"], raw.shifts["layer"], atol=1e-2)
    for pairs in (PAIRS, turns):
        assert torch.equal(plan(pairs, preset="original").shifts["layer"], expected.shifts["layer"])
    assert STA(preset="original").grid("small") == [{"alpha": 1.0, "keep": 0.35}] == STA(preset="original").grid("full")
    with pytest.raises(AUSteerError, match="preset 'chat' is unknown; use original"):
        STA(preset="chat")


# NeuroSteer

TARGET = torch.tensor([[[1.0, 0, 2, 0], [3, 0, 0, 0]], [[2, 1, 0, 0], [0, 0, 2, 4]]])
SOURCE = torch.tensor([[[0.0, 2, 1, 0], [0, 2, 0, 0]], [[1, 0, 3, 0], [0, 0, 0, 1]]])


def firing(texts):
    result = Firing(texts.shape[-1])
    result.add(texts)
    return result


def test_neurosteer_worked_example():
    target, source = firing(TARGET), firing(SOURCE)
    assert target.count.tolist() == [3, 1, 2, 1] and source.count.tolist() == [1, 2, 2, 1]
    assert target.mean.tolist() == [2, 1, 2, 4] and source.mean.tolist() == [1, 2, 2, 1]
    chosen = most_often(target.count, source.count, 2)
    assert chosen.tolist() == [0, 1]
    decoder = torch.cat([torch.eye(3), torch.ones(1, 3)])
    assert feature_residual(target.mean, source.mean, chosen, decoder).tolist() == [1, 0, 0]
    assert feature_residual(target.mean, source.mean, chosen, decoder, "tar_mean").tolist() == [2, 1, 0]
    prepared = Neurons((target.count, source.count), (target.mean, source.mean), decoder, 0, (2, 3), {})
    plan = NeuroSteer().plan(prepared, {"neurons": 2, "alpha": 100.0})
    assert plan.shifts["layer"].tolist() == [[100, 0, 0], [0, 0, 0]] and plan.tokens == "prompt"

    def shift(**options):
        return NeuroSteer(**options).plan(prepared, {"neurons": 2, "alpha": 100.0}).shift("layer", 0).tolist()

    assert shift(weight="tar_mean") == [200, 100, 0]
    assert shift(weight="tar_mean", normalize=True) == pytest.approx([200 / 5**0.5, 100 / 5**0.5, 0])


@pytest.mark.parametrize("weight", ["dif_mean", "tar_mean"])
def test_neurosteer_on_a_model_is_the_whole_text_recipe(checkpoints, llama, tokenizer, stored, weight):
    sae = SAE.load(stored)
    kinds = ([], [])
    for _, z_right, z_wrong, *_ in whole_texts(checkpoints, tokenizer, sae, PAIRS):
        kinds[0].extend(z_right.tolist())
        kinds[1].extend(z_wrong.tolist())
    fired = [[[z[i] for z in kind if z[i] != 0] for i in range(60)] for kind in kinds]
    mean = [[sum(values) / len(values) if values else 0.0 for values in kind] for kind in fired]
    more = [max(len(fired[0][i]) - len(fired[1][i]), 0) for i in range(60)]
    expected = torch.zeros(48)
    for i in sorted(range(60), key=lambda i: -more[i])[:6]:
        expected += (max(mean[0][i] - mean[1][i], 0) if weight == "dif_mean" else mean[0][i]) * sae.W_dec[i]
    method = NeuroSteer(sae=stored, weight=weight)
    prepared = method.prepare(evidence(llama, tokenizer))
    assert prepared.counts[0].tolist() == [len(values) for values in fired[0]] and prepared.counts[0][:7].sum() == 0
    plan = method.plan(prepared, {"neurons": 6, "alpha": 3.0})
    assert torch.allclose(plan.shift("layer", LAYER), 3 * expected, atol=1e-3) and expected.any()


def test_modes_presets_and_the_cache_trap():
    assert NeuroSteer().tokens == "prompt" and NeuroSteer(cache_trap=False).tokens == "all"
    assert NeuroSteer(mode="last").tokens == "before-last" and NeuroSteer(mode="last2").tokens == "before-last-2"
    assert {name: (p.alpha, p.k, NeuroSteer(preset=name).tokens) for name, p in PRESETS.items()} == {
        "sentiment": (100, 100, "prompt"),
        "toxicity": (101, 100, "before-last"),
        "politeness": (10, 150, "prompt"),
        "stance": (15, 150, "prompt"),
        "cot": (20, 100, "before-last"),
    }
    assert NeuroSteer(preset="stance").grid("full") == [{"neurons": 150, "alpha": 15}]
    for options, message in (
        ({"mode": "gaussian"}, "mode 'gaussian' has no token scope here; use one of all, last, last2"),
        ({"mode": "last2", "cache_trap": False}, "all but the last two positions of a pass, which only a prompt has"),
        ({"mode": "last", "cache_trap": False}, "which only a prompt has"),
        ({"preset": "toxicity", "cache_trap": False}, "which only a prompt has"),
        ({"preset": "anger"}, "use one of sentiment, toxicity, politeness, stance, cot"),
        ({"weight": "mean"}, "use one of dif_mean, tar_mean"),
    ):
        with pytest.raises(AUSteerError, match=message):
            NeuroSteer(**options)


def test_several_behaviours_add_up(llama, tokenizer, stored):
    method = NeuroSteer(sae=stored)
    prepared = (
        method.prepare(evidence(llama, tokenizer, PAIRS[::2])),
        method.prepare(evidence(llama, tokenizer, PAIRS[1::2])),
    )
    one, other = (method.plan(each, {"neurons": 5, "alpha": 2.0}) for each in prepared)
    both = one + other
    assert torch.equal(both.shifts["layer"], one.shifts["layer"] + other.shifts["layer"]) and both.tokens == "prompt"
    assert not torch.equal(one.shifts["layer"], other.shifts["layer"]) and both.header["fingerprint"]


def test_k_is_a_number_of_neurons():
    counts = torch.tensor([1, 0, 0])
    for k in (0, 4, 2.5, True):
        with pytest.raises(AUSteerError, match=r"k must be a whole number from 1 to 3 \(the neurons of the SAE\)"):
            most_often(counts, counts, k)
    assert most_often(counts, counts, 3).tolist() == [0, 1, 2]  # nothing fires more often, so the first ones fill up
    nothing = feature_residual(torch.zeros(3), torch.ones(3), torch.tensor([0, 1]), torch.eye(3), normalize=True)
    assert nothing.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("tokens", "left"), [("before-last", 1), ("before-last-2", 2)])
def test_the_prompt_without_its_last_tokens(llama, tokens, left):
    """A shift at the last layer shows only where it was added, and cached steps equal the whole forward."""
    shift = torch.zeros(rmodels.site_shape(llama, "layer"))
    shift[-1] = 1.0
    plan, ids = Plan({}, {"layer": shift}, tokens), torch.tensor([[1, 40, 77, 130, 9, 200, 31]])
    vanilla = llama(ids).logits
    with steer(llama, plan, prompt_end=5):
        whole = llama(ids).logits
    assert [not torch.equal(a, b) for a, b in zip(whole[0], vanilla[0], strict=True)] == [True] * (5 - left) + [
        False
    ] * (2 + left)
    early = torch.zeros_like(shift)
    early[0] = 1.0
    with steer(llama, Plan({}, {"layer": early}, tokens), prompt_end=5):
        whole = llama(ids).logits
    with steer(llama, Plan({}, {"layer": early}, tokens)):
        out = llama(ids[:, :5], use_cache=True)
        parts = [out.logits]
        for t in (5, 6):
            out = llama(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert not torch.allclose(whole[:, 4], vanilla[:, 4], atol=1e-3)  # through attention


# degenerate evidence


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_evidence(llama, tokenizer, tmp_path, stored, method):
    random_sae(b_enc=torch.full((60,), -1e4)).save(tmp_path / "dead.safetensors")
    dead = method(sae=str(tmp_path / "dead.safetensors"))
    with pytest.raises(AUSteerError, match=r"of the SAE fires differently on right and wrong"):
        dead.prepare(evidence(llama, tokenizer))
    known = method(sae=stored)
    with pytest.raises(AUSteerError, match="both answers of every pair are the same tokens"):
        known.prepare(evidence(llama, tokenizer, [("a", "b", "b")]))
    one = known.prepare(evidence(llama, tokenizer, PAIRS[:1]))
    for settings in known.grid("small"):
        settings = {**settings, **({"neurons": 5} if "neurons" in settings else {})}
        assert known.plan(one, settings).sites == ["layer"]  # finite, which a plan checks
    constant = random_sae(W_enc=torch.zeros(48, 60), b_enc=torch.ones(60))  # always on, always the same
    constant.save(tmp_path / "constant.safetensors")
    try:  # answers of unlike length still differ in how often a constant neuron fires
        result = method(sae=str(tmp_path / "constant.safetensors")).prepare(evidence(llama, tokenizer, PAIRS[:2]))
        assert not known.plan(result, {"neurons": 4, "keep": 0.2, "alpha": 2.0}).aus()
    except AUSteerError as error:
        assert "fires differently" in str(error)


def test_float16_that_overflows_is_refused(checkpoints, tokenizer, stored):
    model = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(math.inf)
    for method in METHODS:
        with pytest.raises(AUSteerError, match="activations are inf or nan"):
            method(sae=stored).prepare(evidence(model, tokenizer))


@pytest.mark.parametrize("method", METHODS)
def test_grids_keep_to_the_budget_and_begin_gently(method):
    for kind, budget in BUDGET.items():
        grid = method().grid(kind)
        assert len({tuple(settings.values()) for settings in grid}) == len(grid) <= budget
        assert grid[0]["alpha"] == min(settings["alpha"] for settings in grid)


# the embedded models


@pytest.fixture(scope="module", params=tasks.TASKS)
def shipped(request):
    folder = acceptance.WEIGHTS / request.param
    return request.param, rmodels.load(folder, dtype="float32", device="cpu"), rmodels.load_tokenizer(folder)


def test_shipped_saes_are_of_the_shipped_models(shipped):
    task, model, tokenizer = shipped
    sae = find_sae(evidence(model, tokenizer))
    assert sae.header["fingerprint"] == fingerprint(model) and sae.header["trained_on"].endswith(f"{task}, split train")
    held_out = recipe.activations(model, tokenizer.get_vocab(), task, Random(f"{task} sae held out 0"), 100)  # of 500
    measured = recipe.quality(sae, held_out)
    for name in ("explained_variance", "mean_active"):
        assert measured[name] == pytest.approx(sae.header[name], rel=0.05)
    assert sae.header["dead_latents"] <= measured["dead_latents"] < 150
    assert measured["explained_variance"] > 0.9 and 5 < measured["mean_active"] < 64 and sae.latents == 512
    assert sae.W_dec.norm(dim=1).sub(1).abs().max() < 1e-3


def test_shipped_saes_are_small_and_found_in_other_precision():
    assert sum(file.stat().st_size for file in acceptance.WEIGHTS.glob("*/sae/*.safetensors")) < 4e6
    model = rmodels.load(acceptance.WEIGHTS / "tone", dtype="bfloat16", device="cpu")
    assert find_sae(evidence(model, None)).header["model"] == "weights/tone"


def test_the_recipe_is_deterministic_and_sees_the_training_split_only(monkeypatch):
    seen = []
    document = tasks.document

    def watched(task, rng, truth_only=False):
        result = document(task, rng, truth_only)
        seen.append(" ".join(result.words) + " ")
        return result

    monkeypatch.setattr(recipe.tasks, "document", watched)
    monkeypatch.setattr(recipe, "HELD_OUT", 100)
    two = [recipe.make("svamp", steps=5, documents=100) for _ in range(2)]
    assert torch.equal(two[0].W_enc, two[1].W_enc) and torch.equal(two[0].b_dec, two[1].b_dec)
    assert two[0].header["explained_variance"] == two[1].header["explained_variance"]
    requests = [item.prompt for split in ("pairs", "validation", "test") for item in tasks.items("svamp", split, 300)]
    assert seen and not any(prompt in text for prompt in requests for text in seen)
    h = torch.randn(300, 128, generator=torch.Generator().manual_seed(1))
    others = [recipe.train(h, seed, 3).W_enc for seed in (0, 1)]
    assert not torch.equal(*others)


@pytest.mark.parametrize("method", METHODS)
def test_a_cell_of_an_embedded_task(tmp_path, monkeypatch, method):
    monkeypatch.setitem(run_cell.METHODS, method.name, method())
    grid = method().grid("small")
    monkeypatch.setattr(method, "grid", lambda self, kind: grid[-3:])
    record = computed(tmp_path, task="tone", limit=40, method=method.name, site="layer")
    vanilla = computed(tmp_path, task="tone", limit=40, method="vanilla")
    assert record["n"] == 40 and record["chosen"] and record["touched"] == 128
    before = unpack(vanilla["validation"])
    assert record["right"] > vanilla["right"] and max(record["grid_scores"].values()) > sum(before) / len(before)


# metrics of NeuroSteer's tables


def test_worst_of_samples():
    assert worst_of_samples([[0.1, 0.6], [0.5, 0.2], [0.0, 0.0]]) == pytest.approx((1.1 / 3, 1 / 3))  # 0.5 is not above
    for scores_, message in (([], "at least one sample"), ([[0.1], []], "at least one"), ([[math.nan, 1.0]], "nan")):
        with pytest.raises(AUSteerError, match=message):
            worst_of_samples(scores_)
