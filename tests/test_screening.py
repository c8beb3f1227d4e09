"""Screening equals the paper's formulas as plain loops, in any batches, any order and any number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, PAIRS
from reference import activation_scores, hooked, log_odds
from transformers import AutoModelForCausalLM

import rmodels
from austeer.batching import pair_batches
from austeer.errors import AUSteerError
from austeer.pairs import Pair, write_pairs
from austeer.ranks import AURanks
from austeer.steering import steer
from austeer.tokens import CLEAN, PAPER, EncodedPair, encode
from MFU_screening import ActivationMomentum, CausalMomentum, MFU_screening, screen
from set_MFU import set_MFU

ROOT = Path(__file__).parents[1]
STEP = 1e-2  # upstream's norms compute in float32 even in a double model, so a smaller step drowns in rounding


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(checkpoints, name):
    return rmodels.load(checkpoints[name], dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def upstream(checkpoints, name, model):
    kernel = model.config._attn_implementation.removeprefix("au_")
    return AutoModelForCausalLM.from_pretrained(
        checkpoints[name], dtype=torch.float32, attn_implementation=kernel, experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_scores_equal_the_formula(model, upstream, tokenizer, protocol):
    ranks = screen(PAIRS, model, tokenizer, rmodels.sites(model), protocol=protocol, progress=False)
    for site in rmodels.sites(model):
        expected = activation_scores(upstream, tokenizer, PAIRS, site, half=protocol == "paper")
        assert torch.equal(ranks[site].score, expected), site


def test_any_batch_size_and_order_give_the_same_ranks(model, tokenizer):
    one = screen(PAIRS, model, tokenizer, rmodels.sites(model), batch_size=1, progress=False)
    for size, pairs in ((3, PAIRS), (16, PAIRS[::-1]), (7, PAIRS[5:] + PAIRS[:5])):
        many = screen(pairs, model, tokenizer, rmodels.sites(model), batch_size=size, progress=False)
        for site in rmodels.sites(model):
            assert torch.equal(one[site].stats["positive"], many[site].stats["positive"])
            assert torch.equal(one[site].stats["negative"], many[site].stats["negative"])
            assert torch.equal(one[site].order, many[site].order)


def test_causal_momentum_equals_finite_differences(model, upstream, tokenizer):
    """c = d log sigmoid(M) / d g equals finite differences, one AU at a time, on the upstream model."""
    pairs = [Pair(*pair) for pair in PAIRS[:3]]
    upstream = upstream.double()
    try:
        ranks = {}
        for one in pairs:  # two copies of a pair: the sum is twice its momentum
            ranks[one] = screen([one, one], model, tokenizer, rmodels.sites(model), momentum="causal", progress=False)
        for site in rmodels.sites(model):
            for one in pairs:
                total = ranks[one][site].stats["sum"]
                for layer, dim in [divmod(int(au), total.shape[1]) for au in total.flatten().abs().topk(4).indices]:
                    logsig = {}
                    for step in (-2 * STEP, -STEP, STEP, 2 * STEP):

                        def nudge(i, x, layer=layer, dim=dim, step=step):
                            factor = torch.ones(x.shape[-1], dtype=x.dtype)
                            factor[dim] += step if i == layer else 0.0
                            return x * factor

                        with hooked(upstream, site, nudge):
                            odds = torch.tensor(log_odds(upstream, tokenizer, *one), dtype=torch.float64)
                        logsig[step] = float(torch.nn.functional.logsigmoid(odds))
                    near, far = logsig[STEP] - logsig[-STEP], logsig[2 * STEP] - logsig[-2 * STEP]
                    expected = (8 * near - far) / (12 * STEP)  # five-point stencil
                    assert float(total[layer, dim]) / 2 == pytest.approx(expected, rel=5e-3), (site, layer, dim)
    finally:
        upstream.float()


def test_causal_batching_and_padding_change_nothing(model, tokenizer):
    one = screen(PAIRS, model, tokenizer, rmodels.sites(model), momentum="causal", batch_size=1, progress=False)
    many = screen(PAIRS[::-1], model, tokenizer, rmodels.sites(model), momentum="causal", batch_size=16, progress=False)
    for site in rmodels.sites(model):
        scale = one[site].stats["sum"].abs().max()
        assert torch.allclose(one[site].stats["sum"], many[site].stats["sum"], atol=float(1e-5 * scale), rtol=1e-4)
        assert torch.allclose(one[site].score, many[site].score, atol=2e-3, rtol=1e-3)


def test_causal_score_is_the_t_statistic(llama, tokenizer):
    each = [
        screen([p, p], llama, tokenizer, ["ffn"], momentum="causal", progress=False)["ffn"].stats["sum"] / 2
        for p in PAIRS
    ]
    c = torch.stack(each)
    expected = c.mean(0) / (c.std(0) / len(PAIRS) ** 0.5)
    ranks = screen(PAIRS, llama, tokenizer, ["ffn"], momentum="causal", progress=False)["ffn"]
    assert torch.allclose(ranks.score.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(ranks.gain, ranks.score.sign())


def test_padding_is_really_exercised(tokenizer):
    """The pairs above must differ in prompt and answer length, or the batching tests test nothing."""
    encoded, _ = encode([Pair(*p) for p in PAIRS], tokenizer, CLEAN, 256)
    assert len({len(pair.prefix) for pair in encoded}) > 3
    assert len({(len(pair.positive), len(pair.negative)) for pair in encoded}) > 1
    assert max(len(pair.positive) for pair in encoded) > 3


def test_bpe_merges_over_the_seam(llama, tokenizer):
    """ "ga" + "ve" is one token: the shared prefix ends before the prompt does."""
    (encoded,), equal = encode([Pair("he ga", "ve", "p")], tokenizer, CLEAN, 256)
    assert tokenizer("gave")["input_ids"] == [1, tokenizer.convert_tokens_to_ids("gave")]
    assert encoded.prefix == tuple(tokenizer("he ")["input_ids"]) and equal == 0
    assert encoded.positive == (tokenizer.convert_tokens_to_ids("gave"),)


def test_equal_token_sequences_have_momentum_zero(llama, tokenizer):
    pairs = [["Say it:", "a", "a"], *PAIRS[:3]]
    with_equal = MFU_screening(pairs, llama, tokenizer, None, "ffn", protocol="paper", progress=False)
    without = MFU_screening(PAIRS[:3], llama, tokenizer, None, "ffn", protocol="paper", progress=False)
    assert torch.equal(with_equal.stats["positive"], without.stats["positive"])
    assert with_equal.header["pairs_with_equal_tokens"] == 1
    assert torch.allclose(with_equal.score * 4, without.score * 3)  # the equal pair counts in N


def test_clean_truncation_keeps_the_answer_and_paper_truncation_cuts_it(tokenizer):
    pair = Pair("x" * 600 + " end?", " yes", " no")
    (clean,), _ = encode([pair], tokenizer, CLEAN, 100)
    assert clean.length == 100 and clean.prefix[0] == tokenizer.bos_token_id
    assert tokenizer.decode(clean.prefix + clean.positive).endswith("end? yes")
    assert tokenizer.decode(clean.prefix + clean.negative).endswith("end? no")
    assert encode([pair], tokenizer, PAPER, 100) == ([], 1)  # both cut to the same 512 tokens


def test_an_answer_longer_than_the_context_is_refused(llama, tokenizer):
    with pytest.raises(AUSteerError, match="pair 1: an answer is longer than the context of 256"):
        MFU_screening([PAIRS[0], ["Why?", " yes" * 200, " no"]], llama, tokenizer, None, "ffn", progress=False)


def test_paper_protocol_drops_the_prompt_of_a_refusal(tokenizer):
    pair = Pair("Say something rude.", "\nI'm sorry, but I can't assist with that.", "\nno")
    (paper,), _ = encode([pair], tokenizer, PAPER, 256)
    assert tokenizer.decode(paper.positive, skip_special_tokens=True) == pair.positive
    (clean,), _ = encode([pair], tokenizer, CLEAN, 256)
    assert tokenizer.decode(clean.prefix, skip_special_tokens=True).startswith(pair.prompt)


def test_paper_protocol_uses_the_first_thousand_pairs(llama, tokenizer, monkeypatch):
    import dataclasses

    from austeer import tokens as encoding

    monkeypatch.setitem(encoding.PROTOCOLS, "paper", dataclasses.replace(PAPER, first_pairs=3))
    ranks = MFU_screening(PAIRS, llama, tokenizer, None, "ffn", protocol="paper", progress=False)
    assert ranks.header["pairs"] == 3 and PAPER.first_pairs == 1000


def test_rounding_to_half_is_the_papers(llama, tokenizer):
    """Answers that differ early leave nearly equal activations at the end, and rounding makes some momenta zero."""
    pairs = [[p, " once upon a time there was no", " Once upon a time there was no"] for p, _, _ in PAIRS]
    paper = MFU_screening(pairs, llama, tokenizer, None, "ffn", protocol="paper", progress=False)
    zeros = len(pairs) - paper.stats["positive"] - paper.stats["negative"]
    clean = MFU_screening(pairs, llama, tokenizer, None, "ffn", progress=False)
    assert zeros.sum() > (len(pairs) - clean.stats["positive"] - clean.stats["negative"]).sum()


def test_a_steered_model_is_screened_steered(llama, tokenizer):
    ranks = MFU_screening(PAIRS, llama, tokenizer, None, "ffn", progress=False)
    with steer(llama, set_MFU(ranks, 5, -2.0)):
        again = MFU_screening(PAIRS, llama, tokenizer, None, "ffn", progress=False)
    assert not torch.equal(again.stats["sum_activation"], ranks.stats["sum_activation"])


@pytest.mark.parametrize("momentum", ["activation", "causal"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_batch_and_counts_nothing_twice(llama, tokenizer, monkeypatch, momentum, error):
    expected = screen(PAIRS, llama, tokenizer, ["ffn"], momentum=momentum, batch_size=3, progress=False)["ffn"]
    kind = {"activation": ActivationMomentum, "causal": CausalMomentum}[momentum]
    real, sizes = kind.add, []

    def small(self, batch):
        sizes.append(len(batch))
        if len(batch) > 4:
            raise error
        real(self, batch)

    monkeypatch.setattr(kind, "add", small)
    ranks = screen(PAIRS, llama, tokenizer, ["ffn"], momentum=momentum, batch_size=16, progress=False)["ffn"]
    assert sizes[0] == 16 and sizes[1] == 8 and max(sizes[2:]) == 4 and sum(sizes[2:]) == len(PAIRS)
    assert torch.allclose(ranks.score, expected.score, atol=1e-4, rtol=1e-4)


def test_other_runtime_errors_are_not_swallowed(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(ActivationMomentum, "add", lambda self, batch: (_ for _ in ()).throw(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        MFU_screening(PAIRS, llama, tokenizer, None, "ffn", progress=False)


@pytest.mark.parametrize("momentum", ["activation", "causal"])
def test_overflow_is_reported_not_ranked(checkpoints, tokenizer, momentum):
    model = rmodels.load(checkpoints["llama"], dtype="float16", device="cpu")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 3e4
    with pytest.raises(AUSteerError, match=r"inf or nan in torch.float16.*bfloat16"):
        MFU_screening(PAIRS, model, tokenizer, None, "ffn", momentum=momentum, progress=False)


def test_the_paper_protocol_counts_overflow_by_its_sign(llama, tokenizer, monkeypatch):
    """Values beyond 65504 are finite in float32 and inf in the authors' float16: they are counted, not refused."""
    ranks = MFU_screening(PAIRS, llama, tokenizer, None, "ffn", protocol="paper", progress=False)
    model = __import__("copy").deepcopy(llama)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1e6
    huge = MFU_screening(PAIRS, model, tokenizer, None, "ffn", protocol="paper", progress=False)
    assert huge.header["not_finite"] == 0 and ranks.score.shape == huge.score.shape
    clean = MFU_screening(PAIRS, model, tokenizer, None, "ffn", progress=False)
    assert (huge.stats["positive"] < clean.stats["positive"]).any()  # inf - inf is no difference
    half = rmodels.load(llama.config.name_or_path, dtype="float16", device="cpu")
    with torch.no_grad():
        half.model.layers[1].mlp.down_proj.weight *= 3e4
    with pytest.warns(UserWarning, match="inf or nan in torch.float16"):
        MFU_screening(PAIRS, half, tokenizer, None, "ffn", protocol="paper", progress=False)


def test_batches_hold_the_token_budget_tails_included():
    pairs = [
        EncodedPair((1,) * p, (2,) * a, (3,) * b)
        for p, a, b in [(20, 1, 1)] * 400 + [(18, 1000, 3), (30, 2, 900), (5, 1, 1)]
    ]
    pairs += [EncodedPair((), (1,) * 40, (2,) * 9)]
    result = pair_batches(pairs, torch.device("cuda"))
    assert sorted(map(id, (pair for batch in result for pair in batch))) == sorted(map(id, pairs))
    for batch in result:
        padded = max(len(p.prefix) for p in batch) + 2 * max(p.tail for p in batch)
        assert len(batch) == 1 or len(batch) * padded <= 8192
        assert len({bool(pair.prefix) for pair in batch}) == 1
    assert len(result) < 12 and max(pair.cost for pair in result[0]) == max(pair.cost for pair in pairs)


def test_constant_effects_and_silent_aus_have_a_defined_score(llama, tokenizer):
    ranks = screen([PAIRS[0], PAIRS[0]], llama, tokenizer, ["ffn"], momentum="causal", progress=False)["ffn"]
    assert torch.isfinite(ranks.score).all() and ranks.score.abs().max() > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(train_dataset=[]), "no pairs"),
        (dict(train_dataset=[["a", "b"]]), r"\[prompt, right answer, wrong answer\]"),
        (dict(train_dataset=[["q", "a", "a"]]), "pair 0: both answers are 'a'"),
        (dict(train_dataset=[["q", "", "a"]]), "pair 0: positive is empty"),
        (dict(applied_module="mlp"), "no site 'mlp'"),
        (dict(protocol="exact"), "protocol 'exact' is unknown"),
        (dict(momentum="moment"), "momentum 'moment' is unknown"),
        (dict(momentum="causal", protocol="paper"), "not the paper's"),
        (dict(train_dataset=PAIRS[:1], momentum="causal"), "at least two pairs"),
        (dict(train_dataset=["abc", "def"]), "every pair must be"),
        (dict(max_length=0), "from 1 to 256 tokens"),
        (dict(max_length=10**6), "from 1 to 256 tokens"),
        (dict(batch_size=0), "batch size must be at least 1"),
        (dict(protocol="paper", batch_size=4), "one text at a time"),
        (dict(protocol="paper", max_length=99), "one text at a time"),
    ],
)
def test_bad_arguments(llama, tokenizer, arguments, message):
    call = dict(train_dataset=PAIRS, model=llama, tokenizer=tokenizer, path=None, applied_module="ffn", progress=False)
    with pytest.raises(AUSteerError, match=message):
        MFU_screening(**{**call, **arguments})


@pytest.mark.slow  # tests/test_processes.py runs the command in forks; only accelerate's own launcher is new here
@pytest.mark.parametrize("momentum", ["activation", "causal"])
def test_two_processes_equal_one(checkpoints, tmp_path, momentum):
    write_pairs(tmp_path / "pairs.jsonl", [Pair(*pair) for pair in PAIRS])
    command = ["MFU_screening.py", "--model", str(checkpoints["llama"]), "--pairs", str(tmp_path / "pairs.jsonl")]
    command += f"--site attention ffn --momentum {momentum} --device cpu --out".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    accelerate += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    subprocess.run([sys.executable, *command, str(tmp_path / "one")], cwd=ROOT, env=env, check=True)
    subprocess.run([*accelerate, *command, str(tmp_path / "two")], cwd=ROOT, env=env, check=True)
    for site in ("attention", "ffn"):
        one, two = (AURanks.load(tmp_path / folder / f"{site}.safetensors") for folder in ("one", "two"))
        if momentum == "activation":
            assert torch.equal(one.score, two.score) and torch.equal(one.order, two.order)
        else:
            assert torch.allclose(one.score, two.score, atol=1e-3, rtol=1e-3)
        assert one.header == two.header
