"""ITI, CAA and SADI: their worked examples, the same by plain loops, every option, and broken input."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, PAIRS
from one_cell import computed
from reference import hooked, last_activations
from scipy.optimize import minimize
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.austeer import AUSteer
from austeer.methods.base import MOST_POINTS
from austeer.methods.caa import CAA, Vectors, match_norms, mean_difference
from austeer.methods.choice import by_head, highest
from austeer.methods.iti import ITI, Heads, folds, logistic, spread, unit
from austeer.methods.registry import METHODS
from austeer.methods.sadi import SADIHead, SADIHidden, SADINeuron, Scores, clamped, difference, their_texts
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.steering import apply, clear, steer
from eval.tasks import embedded
from experiments.cell import cell_of
from experiments.run_cell import grid as cell_grid
from MFU_screening import screen
from paper import specs

ALL = [ITI(), ITI("probe"), CAA(), SADIHead(), SADINeuron(), SADIHidden()]
IDS = torch.tensor([[1, 40, 77, 130, 9, 200, 31, 55, 88]])
LETTERS = [Pair(f"Is {a} red?", *answers) for a in ("it", "a fox", "snow") for answers in ((" (A)", " (B)"),)]


class FakeEvidence:
    """Stand in for Evidence with these activations, (pairs, layers, width)."""

    def __init__(self, right, wrong, heads=1, site="attention", seed=0):
        self.right, self.wrong, self.site, self.seed = torch.tensor(right), torch.tensor(wrong), site, seed
        self.model = SimpleNamespace(config=AutoConfig.for_model("llama", num_attention_heads=heads, hidden_size=heads))

    def activations(self, readout="last", nonlinearity=False):
        return self.right.float(), self.wrong.float()

    def header(self):
        return {"site": self.site}


def evidence(model, tokenizer, site, pairs=PAIRS):
    return Evidence(model, tokenizer, [Pair(*pair) for pair in pairs], site, ranks=None)


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# the examples of each method, by hand


def iti_example(std):
    fake = FakeEvidence([[[2.0, 0.0, 1.0]], [[4.0, 2.0, 1.0]]], [[[0.0, 0.0, 1.0]], [[0.0, -2.0, 1.0]]])
    method = ITI(std=std)
    return method.prepare(fake), method


@pytest.mark.parametrize(
    ("std", "sigma", "shift"),
    [("n", 2.089350, [26.076668, 17.384445, 0]), ("n-1", 2.412574, [30.110742, 20.073828, 0])],
)
def test_iti_by_hand(std, sigma, shift):
    heads, method = iti_example(std)
    assert heads.direction.flatten().tolist() == pytest.approx([0.83205, 0.55470, 0], abs=1e-5)
    assert float(heads.sigma) == pytest.approx(sigma, abs=1e-6)
    plan = method.plan(heads, {"heads": 1, "alpha": 15.0})
    assert plan.shift("attention", 0).tolist() == pytest.approx(shift, abs=1e-5)
    gate = rmodels.AUGate("attention", 0, 3)
    gate.set(None, plan.shift("attention", 0), like=torch.zeros(1))
    assert gate(torch.ones(1, 1, 3)).flatten().tolist() == pytest.approx([1 + s for s in shift], abs=1e-5)
    if std == "n":  # the shift as a bias of o_proj
        projected = torch.tensor([[1.0, 0, 2], [0, 1, 1]]) @ plan.shift("attention", 0)
        assert projected.tolist() == pytest.approx([26.076668, 17.384445], abs=1e-5)


def test_heads_are_ranked_by_accuracy_and_ties_go_to_the_lower_layer():
    accuracy = torch.tensor([[0.60, 0.75], [0.75, 0.90]])
    order = [highest(accuracy, k, "heads") for k in (1, 2, 3, 4)]
    assert [kept.nonzero().tolist() for kept in order[:3]] == [[[1, 1]], [[0, 1], [1, 1]], [[0, 1], [1, 0], [1, 1]]]
    heads = Heads(accuracy, torch.ones(2, 2, 2), torch.ones(2, 2), {})
    plan = ITI().plan(heads, {"heads": 2, "alpha": 3.0})
    assert plan.shifts["attention"].tolist() == [[0, 0, 3, 3], [0, 0, 3, 3]] and not plan.scales
    assert plan.tokens == "last"


def test_caa_by_hand():
    right = torch.tensor([[[1.0, 1, 1], [2, 0, 1], [9, 9, 9]], [[0, 1, 0], [4, 2, 1], [8, 8, 8]]])
    wrong = torch.tensor([[[1.0, 1, 1], [0, 0, 3], [9, 9, 7]], [[0, 1, 0], [2, 4, 1], [8, 7, 8]]])
    read = {place: mean_difference(right[:, place, None], wrong[:, place, None])[0] for place in (-1, -2, -3)}
    assert [read[place].tolist() for place in (-2, -1, -3)] == [[2, -1, -1], [0, 0.5, 1], [0, 0, 0]]
    plan = CAA().plan(Vectors(torch.stack([read[-1], read[-2]]), {}), {"depth": 0.5, "alpha": 1.5})
    assert plan.shifts["layer"].tolist() == [[0, 0, 0], [3, -1.5, -1.5]] and plan.tokens == "last"
    matched = match_norms(torch.tensor([[3.0, 4, 0], [0, 0, 1]]))
    assert torch.allclose(matched, torch.tensor([[1.8, 2.4, 0], [0, 0, 3]]))


def test_caa_is_added_from_the_prompts_last_token_on(llama):
    """With five positions and a prompt of three, rows 0 and 1 stay the same."""
    shift = torch.zeros(3, 48)
    shift[1] = 1.5
    seen = []
    gate = next(gate for gate in rmodels.gates(llama, "layer") if gate.layer == 1)
    hook = gate.register_forward_hook(lambda module, args, out: seen.append(out - args[0]))
    with steer(llama, CAA().plan(Vectors(shift, {}), {"depth": 0.34, "alpha": 2.0}), prompt_end=3):
        llama(IDS[:, :5])
    hook.remove()
    assert not seen[0][0, :2].any() and torch.allclose(seen[0][0, 2:], torch.tensor(3.0), atol=1e-5)


SADI_RIGHT = [[[[1.0, 3], [2, 0]], [[-1, 5], [4, 4]]], [[[2, 4], [1, 1]], [[0, 2], [5, 1]]]]
SADI_WRONG = [[[[0.0, 2], [3, 1]], [[1, 1], [1, 1]]], [[[1, 1], [2, 2]], [[2, 2], [2, 0]]]]


def test_sadi_by_hand():
    right, wrong = np.array(SADI_RIGHT).reshape(2, 2, 4), np.array(SADI_WRONG).reshape(2, 2, 4)
    fake = FakeEvidence(right, wrong, heads=2)
    scores = SADIHead().prepare(fake)
    assert scores.by_unit.tolist() == [[1.5, -1], [0, 2.5]] and scores.unit_width == 2
    order = [highest(scores.by_unit, k, "heads") for k in range(1, 5)]
    first_of_each = [
        (now.int() - before.int()).nonzero().tolist()[0]
        for before, now in zip([torch.zeros(2, 2), *order], order, strict=False)
    ]
    assert first_of_each == [[1, 1], [0, 0], [1, 0], [0, 1]]
    x = torch.tensor([[1.0, -1, 2, 2], [0.5, 1, 3, -2]])
    for delta, first, second in ((4.0, [5, -5, 2, 2], [0.5, 1, 15, -10]), (5.0, [6, -6, 2, 2], [0.5, 1, 18, -12])):
        plan = SADIHead().plan(scores, {"heads": 2, "alpha": delta})
        assert (x * (1 + plan.scales["attention"])).tolist() == [first, second]
    assert not plan.shifts and plan.tokens == "last"
    neurons = difference(
        torch.tensor([[[0.1, 0.9, -0.2, 0.4]]])[..., None], torch.tensor([[[0.3, 0.1, 0.2, 0.4]]])[..., None]
    )
    assert neurons.flatten().tolist() == pytest.approx([-0.2, 0.8, -0.4, 0])
    by_rule = {
        rule: SADINeuron(rule).plan(Scores(neurons, 1, {"site": "neuron"}), {"k": 2, "alpha": 1.0}).aus()
        for rule in ("signed", "absolute")
    }
    assert {rule: {unit[2] for unit in units} for rule, units in by_rule.items()} == {
        "signed": {1, 3},
        "absolute": {1, 2},
    }


# the same by plain loops


@pytest.mark.parametrize(("scale", "dims", "texts"), [(1.0, 5, 40), (300.0, 4, 30), (0.01, 3, 12), (5.0, 30, 14)])
def test_the_probe_is_the_minimum_a_general_solver_finds(scale, dims, texts):
    """The fit equals one head at a time. The last case has few texts; the second is separable and large."""
    x = scale * noise(1, 2, texts, dims)
    y = (noise(2, texts) + x[0, :, 0] / scale > 0).astype(float)
    x[0, y > 0, 0] += scale
    weights, bias = logistic(torch.tensor(x), torch.tensor(y))
    for head in range(2):

        def loss(w, rows=x[head]):
            z = rows @ w[:-1] + w[-1]
            p = 1 / (1 + np.exp(-np.clip(z, -500, 500)))
            value = np.logaddexp(0, -(2 * y - 1) * z).sum() + w[:-1] @ w[:-1] / 2
            return value, np.append(rows.T @ (p - y) + w[:-1], (p - y).sum())

        best = minimize(loss, np.zeros(dims + 1), jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 5000})
        ours = np.append(weights[head].numpy(), float(bias[head]))
        assert loss(ours)[0] <= best.fun + 1e-7 and np.abs(loss(ours)[1]).max() < 1e-4 * max(1, scale)
        assert np.allclose(ours, best.x, atol=2e-3)


@pytest.mark.parametrize("preset", [None, "original"])
@pytest.mark.parametrize("direction", ["mass-mean", "probe"])
def test_iti_by_loops(direction, preset):
    pairs, layers, heads, dim = 15, 2, 3, 4
    right, wrong = noise(3, pairs, layers, heads * dim), noise(4, pairs, layers, heads * dim)
    right[:, 1, 4:8] += 1.5
    right[:, 0, :4] -= 0.7
    method = ITI(direction, "n", preset)
    actual = method.prepare(FakeEvidence(right, wrong, heads, seed=5))
    cut = {None: [range(15)], "original": [range(8), range(8, 15)]}[preset]
    rounds = [[part.tolist() for part in fold] for fold in folds(pairs, len(cut), 5)]
    for fold, (fitted, held_out) in zip(cut, rounds, strict=True):
        assert sorted([*fitted, *held_out]) == list(fold) and len(held_out) == round(len(fold) / 5)
    right, wrong = right.astype(np.float32).astype(float), wrong.astype(np.float32).astype(float)
    expected, accuracy = {}, {}
    for layer, head in itertools.product(range(layers), range(heads)):
        mine = slice(head * dim, (head + 1) * dim)
        accuracy[layer, head], of_probes = 0.0, np.zeros(dim)
        for fitted, held_out in rounds:
            x = np.array([texts[i, layer, mine] for texts in (right, wrong) for i in fitted])
            y = np.array([1.0] * len(fitted) + [0.0] * len(fitted))
            weights, bias = logistic(torch.tensor(x)[None], torch.tensor(y))
            weights = weights[0].numpy()
            hits = [weights @ right[i, layer, mine] + float(bias) > 0 for i in held_out]
            hits += [weights @ wrong[i, layer, mine] + float(bias) <= 0 for i in held_out]
            accuracy[layer, head] += sum(map(bool, hits)) / len(hits) / len(rounds)
            of_probes += weights / len(rounds)
        theta = right[:, layer, mine].mean(0) - wrong[:, layer, mine].mean(0) if direction == "mass-mean" else of_probes
        theta = theta / math.sqrt(sum(theta**2))
        along = [float(theta @ texts[i, layer, mine]) for texts in (right, wrong) for i in range(pairs)]
        expected[layer, head] = 2.0 * np.std(along) * theta
    assert {place: float(actual.accuracy[place]) for place in accuracy} == pytest.approx(accuracy)
    chosen = sorted(accuracy, key=lambda place: (-accuracy[place], place))[:2]
    plan = method.plan(actual, {"heads": 2, "alpha": 2.0})
    shift = by_head(
        plan.shifts["attention"], AutoConfig.for_model("llama", num_attention_heads=heads, hidden_size=heads)
    )
    for place in accuracy:
        assert shift[place].tolist() == pytest.approx(
            (expected[place] if place in chosen else np.zeros(dim)).tolist(), abs=1e-5
        )


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, checkpoints):
    """Return a patched model and upstream's, for every family."""
    model = rmodels.load(checkpoints[request.param], dtype="float32", device="cpu")
    kernel = model.config._attn_implementation.removeprefix("au_")
    upstream = AutoModelForCausalLM.from_pretrained(
        checkpoints[request.param], dtype=torch.float32, attn_implementation=kernel, experts_implementation="eager"
    )
    return model, upstream.eval()


def test_caa_and_sadi_by_loops(both, tokenizer):
    model, upstream = both
    for method, site in ((CAA(), "layer"), (SADIHead(), "attention"), (SADIHidden(), "ffn"), (SADIHidden(), "layer")):
        result = method.prepare(evidence(model, tokenizer, site))
        total = 0
        for prompt, right, wrong in PAIRS:
            two = [last_activations(upstream, tokenizer, prompt + answer, site).double() for answer in (right, wrong)]
            if method.name == "sadi-head":
                two = [torch.stack([x[:, h * 16 : h * 16 + 16].mean(1) for h in range(4)], 1) for x in two]
            total = total + (two[0] - two[1]) / len(PAIRS)
        actual = result.by_layer if method.name == "caa" else result.by_unit
        assert actual.shape == total.shape and torch.allclose(actual, total.float(), atol=1e-4)


def test_sadi_neurons_are_chosen_by_the_nonlinearity(both, tokenizer):
    model, upstream = both
    if model.config.model_type == "qwen3_moe":
        with pytest.raises(AUSteerError, match="has experts, whose nonlinearities"):
            SADINeuron().prepare(evidence(model, tokenizer, "neuron"))
        return
    total = torch.zeros(3, 80)
    rows = {}
    for index, layer in enumerate(upstream.model.layers):
        layer.mlp.act_fn.register_forward_hook(lambda m, args, out, i=index: rows.__setitem__(i, out[0, -1]))
    for prompt, *answers in PAIRS:
        for sign, answer in zip((1, -1), answers, strict=True):
            with torch.no_grad():
                upstream(torch.tensor([tokenizer(prompt + answer)["input_ids"]]))
            total += sign * torch.stack([rows[i] for i in range(3)]) / len(PAIRS)
    seen = evidence(model, tokenizer, "neuron")
    assert torch.allclose(SADINeuron().prepare(seen).by_unit, total, atol=1e-4)
    right, wrong = seen.activations("last")  # the product with up_proj differs
    assert not torch.allclose((right - wrong).mean(0), total, atol=1e-2)
    assert not any(layer.mlp.act_fn._forward_hooks for layer in model.model.layers)


def test_the_last_token_but_one(llama, checkpoints, tokenizer):
    upstream = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    right, wrong = evidence(llama, tokenizer, "layer", LETTERS).activations("before-last")
    for row, pair in enumerate(LETTERS):
        for read, answer in ((right, pair.positive), (wrong, pair.negative)):
            expected = last_activations(upstream, tokenizer, pair.prompt + answer[:-1], "layer")  # without the bracket
            assert torch.allclose(read[row], expected, atol=1e-4)
    bare = [Pair("Is it red?", " A", " B")]
    with pytest.raises(AUSteerError, match=r"the last token but one of some pair is in its prompt.*\(A\)"):
        CAA("before-last").prepare(evidence(llama, tokenizer, "layer", bare))


# the originals' settings


def test_the_presets_sweep_what_the_originals_do():
    """The counts and strengths are spelled out here as the authors' scripts have them."""
    strengths = [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80]
    expected = {
        SADIHead: ("heads", [1, 2, 4, 6, 8, 10], strengths),
        SADINeuron: ("k", [3, 5, 10, 30, 50, 100, 200, 300, 400, 500], [10, 20, 30, 50, 70, 90]),
        SADIHidden: ("k", [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20], strengths),
    }
    for method, (key, counts, factors) in expected.items():
        points = [{key: count, "alpha": factor - 1} for count in counts for factor in factors]
        assert method(preset="original").grid("small") == method(preset="original").grid("full") == points
    layers = [{"depth": layer, "alpha": alpha} for alpha in (0.5, 1, 1.5, 2) for layer in range(7)]
    assert CAA(preset="original", layers=7).grid("full") == layers and len(CAA(preset="original").grid("full")) == 128
    iti = ITI(preset="original").grid("full")
    alphas = dict.fromkeys(point["alpha"] for point in ITI().grid("full"))
    assert iti == [{"heads": heads, "alpha": alpha} for heads in (2, 4, 8, 16, 32, 48, 64) for alpha in alphas]
    assert max(point["heads"] for point in ITI(preset="original").grid("small")) == 16  # all of an embedded model
    for method in (ITI, CAA, SADIHead, SADINeuron, SADIHidden):
        with pytest.raises(AUSteerError, match="preset 'theirs' is unknown; use original, or leave it out"):
            method(preset="theirs")


def test_a_sweep_over_budget_is_for_races(monkeypatch):
    def points(search, options=(("caa.preset", "original"), ("caa.layers", "6"))):
        return cell_grid(
            cell_of(model="embedded", task="copa", method="caa", site="layer", options=options, search=search)
        )

    assert len(points("racing")) == 24 > MOST_POINTS["small"]
    for search in ("grid", "sample", "test"):
        with pytest.raises(
            AUSteerError, match=r"24 grid points; .* is 15, and caa\.preset=original .* --search racing"
        ):
            points(search)
    monkeypatch.setitem(CAA.axes["alpha"], "small", range(6))
    with pytest.raises(AssertionError, match="18 grid points"):  # no other grid may, raced or not
        points("racing", options=())


def test_caa_at_every_layer(llama, tokenizer):
    method = CAA(preset="original", layers=3)
    vectors, same = (m.prepare(evidence(llama, tokenizer, "layer")) for m in (method, CAA()))
    assert torch.equal(vectors.by_layer, same.by_layer)
    for layer in range(3):
        shift = method.plan(vectors, {"alpha": 1.5, "depth": layer}).shifts["layer"]
        assert torch.equal(shift[layer], 1.5 * same.by_layer[layer]) and shift.any(1).sum() == 1
    with pytest.raises(AUSteerError, match=r"this model has 3 layers, not 32: add caa\.layers=3 to --option"):
        CAA(preset="original").prepare(evidence(llama, tokenizer, "layer"))


def test_sadi_reads_the_authors_texts(checkpoints, llama, tokenizer):
    upstream = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    spaced = [(f"  {prompt} \n", f"{right} ", wrong.strip()) for prompt, right, wrong in PAIRS]
    # tokens are bytes here, with one BOS: the first is one too long, and the length of a wrong text does not matter
    long = [("a" * 697, "b c", "d"), ("a" * 690, "b", "c" * 20)]
    kept = their_texts(evidence(llama, tokenizer, "ffn", spaced + long)).pairs
    assert len(kept) == len(spaced) + 1 and kept[-1] == ("a" * 690, " b", " " + "c" * 20)
    total = 0
    for prompt, *answers in spaced:
        two = [last_activations(upstream, tokenizer, f"{prompt.strip()} {a.strip()}", "ffn").double() for a in answers]
        total = total + (two[0] - two[1]) / len(spaced)
    actual = SADIHidden(preset="original").prepare(evidence(llama, tokenizer, "ffn", spaced + long[:1]))
    assert torch.allclose(actual.by_unit, total.float(), atol=1e-4)
    assert not torch.allclose(SADIHidden().prepare(evidence(llama, tokenizer, "ffn", spaced)).by_unit, total.float())
    assert actual.header["pairs_hash"] == evidence(llama, tokenizer, "ffn", spaced + long[:1]).header()["pairs_hash"]
    with pytest.raises(AUSteerError, match="every right text has over 700 tokens"):
        SADIHidden(preset="original").prepare(evidence(llama, tokenizer, "ffn", long[:1]))


def test_iti_needs_pairs_in_both_halves(llama, tokenizer):
    with pytest.raises(AUSteerError, match="with preset=original two in each half"):
        ITI(preset="original").prepare(evidence(llama, tokenizer, "attention", PAIRS[:3]))
    ITI(preset="original").prepare(evidence(llama, tokenizer, "attention", PAIRS[:4]))


# open answers


def test_caa_over_the_answer_by_loops(checkpoints, llama, tokenizer):
    """The mean over the tokens that the two texts do not share, token by token."""
    upstream = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    pairs, total = [("Say it:", " so it is", " so they went off"), ("And:", " nothing", " at once")], 0
    for prompt, *answers in pairs:
        texts = [prompt + answer for answer in answers]
        shared = len(prompt) + (4 if "so" in answers[0] else 1)  # tokens are bytes
        means = []
        for text in texts:
            at = [last_activations(upstream, tokenizer, text[: end + 1], "layer") for end in range(shared, len(text))]
            means.append(sum(at) / len(at))
        total = total + (means[0] - means[1]) / len(pairs)
    actual = CAA("answer").prepare(evidence(llama, tokenizer, "layer", pairs)).by_layer
    assert torch.allclose(actual, total, atol=1e-4)
    assert not torch.allclose(CAA().prepare(evidence(llama, tokenizer, "layer", pairs)).by_layer, total, atol=1e-2)


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_the_tables_read_open_answers_over_the_answer(scale):
    (table,) = specs.read(scale, ["table1"])
    read = {entry.column: cell.method.options for entry in table.entries if entry.row == "caa" for cell in entry.cells}
    answer = (("readout", "answer"),)
    open_answers = {"mawps": answer, "detox": answer, "delta_win_rate": answer}
    assert read == dict.fromkeys(("boolq", "copa", "winogrande", "svamp"), ()) | open_answers


# the authors' SADI: frozen, overwritten


def test_clamped_is_the_overwriting_of_one_position(both):
    model, upstream = both
    for site in rmodels.sites(model):
        scale = torch.zeros(rmodels.site_shape(model, site))
        scale[1, :7], scale[2, 5] = 4.0, 9.0
        plan, clean = Plan({site: scale}, tokens="last"), {}
        with torch.no_grad():
            with hooked(upstream, site, lambda layer, x, clean=clean: clean.__setitem__(layer, x[0, -1].clone())):
                upstream(IDS)

            def overwrite(layer, x, clean=clean, scale=scale):
                x = x.clone()
                x[0, IDS.shape[1] - 1] = clean[layer] * (1 + scale[layer, : x.shape[-1]])
                return x

            answer = torch.tensor([[17, 99]])
            with hooked(upstream, site, overwrite):  # as the authors do: the answer is fed after the prompt
                expected = upstream(torch.cat([IDS, answer], 1)).logits[0, IDS.shape[1] - 1 :]
            with steer(model, clamped(model, plan, IDS)):
                prefill = model(IDS, use_cache=True)
                behind = model(answer, past_key_values=prefill.past_key_values).logits[0]
            ours = torch.cat([prefill.logits[0, -1:], behind])
            assert torch.allclose(ours, expected, atol=1e-3), site
            with steer(model, plan):  # the paper's form lets layers react
                assert not torch.allclose(model(IDS, use_cache=True).logits[0, -1], expected[0], atol=1e-2)
    with pytest.raises(AUSteerError, match="one plan per prompt"):
        clamped(model, plan, IDS.repeat(2, 1))


# options, degenerate input, whole runs


def test_every_option_changes_the_plan(llama, tokenizer):
    long = [Pair(p, right + " and so on", wrong + " or else") for p, right, wrong in PAIRS]

    def plan(method, site, settings, pairs=PAIRS):
        result = method.plan(method.prepare(evidence(llama, tokenizer, site, pairs)), settings)
        return torch.cat([*result.scales.values(), *result.shifts.values()])

    few, many, deep = {"heads": 3, "alpha": 2.0}, {"k": 30, "alpha": 2.0}, {"depth": 0.4, "alpha": 1.0}
    different = [
        [plan(ITI(d, s), "attention", few) for d, s in itertools.product(("mass-mean", "probe"), ("n-1", "n"))],
        [plan(CAA(r), "layer", deep, long) for r in ("last", "answer", "before-last")],
        [plan(CAA("last", norm), "layer", deep) for norm in ("own", "mean")],
        [plan(SADIHidden(), "ffn", many), plan(SADIHidden(), "layer", many)],
        *(
            [plan(method(rule), site, many if site != "attention" else few) for rule in ("signed", "absolute")]
            for method, site in ((SADIHead, "attention"), (SADINeuron, "neuron"), (SADIHidden, "layer"))
        ),
    ]
    for result in different:
        assert all(x.any() for x in result)
        assert not any(torch.equal(x, y) for x, y in itertools.combinations(result, 2))
    for bad in (
        lambda: ITI("best"),
        lambda: ITI(std="n-2"),
        lambda: CAA("first"),
        lambda: CAA(norm="l1"),
        lambda: SADIHead("top"),
    ):
        with pytest.raises(AUSteerError):
            bad()


def test_matching_norms_over_layers():
    vectors = CAA(norm="mean").prepare(
        FakeEvidence([[[3.0, 4], [0, 1], [0, 0]]], [[[0.0, 0], [0, 0], [0, 0]]], site="layer")
    )
    assert torch.allclose(vectors.by_layer, torch.tensor([[1.2, 1.6], [0, 2], [0, 0]]))


def test_uninformative_input():
    same = np.ones((6, 2, 8))
    for direction in ("mass-mean", "probe"):
        heads = ITI(direction).prepare(FakeEvidence(same, same, heads=2))
        assert torch.equal(heads.accuracy, torch.full((2, 2), 0.5, dtype=heads.accuracy.dtype))
        assert not ITI().plan(heads, {"heads": 4, "alpha": 15.0}).aus()
    assert not CAA().plan(CAA().prepare(FakeEvidence(same, same, site="layer")), {"depth": 0.5, "alpha": 3.0}).aus()
    assert not CAA(norm="mean").prepare(FakeEvidence(same, same)).by_layer.any()
    for method in (SADIHead(), SADINeuron(), SADIHidden()):
        with pytest.raises(AUSteerError, match="nothing to choose by"):
            method.prepare(FakeEvidence(same, same, heads=2))
    # a head with the same difference in every pair has a direction and a spread; one that never varies has neither
    right = same.copy()
    right[:, :, :4] += 1
    heads = ITI().prepare(FakeEvidence(right, same, heads=2))
    assert heads.accuracy.tolist() == [[1, 0.5], [1, 0.5]] and not heads.sigma[:, 1].any() and heads.sigma[:, 0].all()


def test_one_pair_and_equal_pairs(llama, tokenizer):
    one = PAIRS[:1]
    with pytest.raises(AUSteerError, match="at least two pairs"):
        ITI().prepare(evidence(llama, tokenizer, "attention", one))
    for method in ALL[2:]:
        result = method.prepare(evidence(llama, tokenizer, method.sites[0], one))
        assert method.plan(result, method.grid("small")[0]).aus()
    ITI().prepare(evidence(llama, tokenizer, "attention", PAIRS[:2]))
    equal = [Pair("a", "b", "b")] * 3
    for method in ALL:
        with pytest.raises(AUSteerError, match="the same tokens"):
            method.prepare(evidence(llama, tokenizer, method.sites[0], equal))


def test_separable_texts_of_any_size_have_a_finite_probe():
    for scale in (1e-6, 1.0, 1e4):
        x = scale * torch.tensor([[[3.0, 1], [2, 1], [-2, 1], [-3, 1]]], dtype=torch.float64)
        weights, bias = logistic(x, torch.tensor([1.0, 1, 0, 0], dtype=torch.float64))
        assert torch.isfinite(weights).all() and torch.isfinite(bias).all() and weights[0, 0] > 0
    assert unit(torch.zeros(2, 3)).tolist() == [[0, 0, 0]] * 2
    assert not spread(torch.ones(4, 1, 1, 3), torch.ones(1, 1, 3), 1).any()


@pytest.mark.parametrize("k", [0, 5, 1.5, True, -1])
def test_bad_k(k):
    with pytest.raises(AUSteerError, match="heads must be a whole number from 1 to 4"):
        highest(torch.zeros(2, 2), k, "heads")


def test_bad_depth():
    for depth in (-0.1, 1.0, 7):
        with pytest.raises(AUSteerError, match="depth is a share of the layers"):
            CAA().plan(Vectors(torch.ones(4, 2), {}), {"depth": depth, "alpha": 1.0})


@pytest.mark.parametrize("kind", MOST_POINTS)
def test_grids_keep_to_the_budget(kind):
    for method in ALL:
        grid = method.grid(kind)
        assert len({tuple(settings.items()) for settings in grid}) == len(grid) <= MOST_POINTS[kind]
        assert grid[0]["alpha"] == min(settings["alpha"] for settings in grid)
    depths = {round(settings["depth"] * 32) for settings in CAA().grid("full")}
    assert 13 in depths and min(depths) == 8 and max(depths) == 24  # the authors' layer of Llama-2-7B, L/4 to 3L/4
    assert {"heads": 48, "alpha": 15.0} in ITI().grid("full")


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_from_pairs_to_a_steered_model(both, tokenizer, method, tmp_path):
    model, _ = both
    if (method.name, model.config.model_type) == ("sadi-neuron", "qwen3_moe"):
        with pytest.raises(AUSteerError, match="has experts, whose nonlinearities"):
            method.prepare(evidence(model, tokenizer, "neuron"))
        return
    for site in set(method.sites) & set(rmodels.sites(model)):
        result = method.prepare(evidence(model, tokenizer, site))
        plan = method.plan(result, method.grid("small")[-1])
        assert plan.sites == [site] and plan.shape(site) == rmodels.site_shape(model, site)
        plan.save(tmp_path / "plan.safetensors")
        with torch.no_grad():
            vanilla = model(IDS, use_cache=True).logits
            with steer(model, Plan.load(tmp_path / "plan.safetensors")):
                steered = model(IDS, use_cache=True).logits
        moved = (steered - vanilla).abs().amax(-1)[0]
        assert moved[:-1].max() < 1e-4 < moved[-1]  # not exactly zero: experts see their tokens in other groups


def test_a_plan_refuses_other_weights(checkpoints, llama, tokenizer):
    method = CAA()
    plan = method.plan(method.prepare(evidence(llama, tokenizer, "layer")), {"depth": 0.5, "alpha": 1.0})
    other = rmodels.load(checkpoints["llama"], dtype="float32", device="cpu")
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(AUSteerError, match="made on other weights"):
        apply(other, plan)
    clear(other)


def test_neurons_are_atomic_units_too(llama, tokenizer):
    """Equation 1, literally: AUSteer at the input of down_proj."""
    ranks = screen(PAIRS, llama, tokenizer, ["neuron"], progress=False)["neuron"]
    plan = AUSteer().plan(ranks, {"k": 5, "alpha": 1.0})
    assert plan.shape("neuron") == (3, 80) and len(plan) == 5
    vanilla = llama(IDS).logits
    with steer(llama, plan):
        assert not torch.equal(llama(IDS).logits, vanilla)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_a_cell_of_each(method, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, method.name, method)
    monkeypatch.setattr(embedded, "PAIRS", 60)
    record = computed(tmp_path, task="svamp", limit=8, method=method.name, site=method.sites[-1])
    assert record["n"] == 8 and len(record["grid_scores"]) == MOST_POINTS["small"]
    if record["settings"]:
        assert record["touched"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "site"), [(ITI(), "attention"), (CAA(), "layer"), (SADIHead(), "attention")])
def test_they_find_the_polite_tone(method, site, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, method.name, method)
    record = computed(tmp_path, task="tone", method=method.name, site=site)
    assert record["right"] / record["n"] > 0.95  # 0.75 without
