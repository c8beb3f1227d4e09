"""Pruning, and RestoreLCC, which gives a pruned model its lost components back."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON, FAMILIES, PAIRS, SPECIAL, byte_tokenizer
from one_cell import bench_for, computed
from reference import hook_steering, hooked
from reference import last_activations as activations_of
from tokenizers import processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import rmodels
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.export.fold import fold
from austeer.identity import fingerprint
from austeer.methods import restore_lcc
from austeer.methods.base import BUDGET
from austeer.methods.pruning import parse_sparsity, prune, same_length_batches
from austeer.methods.restore_lcc import (
    MeanLost,
    RandomHeads,
    RestoreLCC,
    answer_loss,
    best_first,
    head_rows,
    last_activations,
    learned_component,
    lost_components,
    probe_accuracy,
    questions_of,
    train,
)
from austeer.pairs import Pair
from austeer.plan import Plan
from austeer.steering import steer
from experiments import records, restore
from experiments.bench import BENCHES
from experiments.search import SearchResult

DENSE_FAMILIES = [name for name in FAMILIES if name != "qwen3_moe"]
TEXTS = [[1, *(7 * i % 300 + 3 for i in range(start, start + length))] for start, length in ((0, 20), (5, 20), (9, 31))]
IDS = torch.tensor([TEXTS[2]])
MINE = [Pair(*pair) for pair in PAIRS]


def load(checkpoints, name, dtype="float32"):
    return rmodels.load(checkpoints[name], dtype=dtype, device="cpu")


def upstream(checkpoints, model, dtype=torch.float32):
    """Return upstream's unpatched model with this model's weights and kernel."""
    kernel = model.config._attn_implementation.removeprefix("au_")
    result = AutoModelForCausalLM.from_pretrained(
        checkpoints[model.config.model_type], dtype=dtype, attn_implementation=kernel, trust_remote_code=False
    )
    result.load_state_dict(model.state_dict())
    return result.eval().requires_grad_(False)


def linears(model):
    return {n: m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}


def zero_lowest(scores, count):
    """Return the places of the `count` lowest scores, the first ones among ties."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


def prune_rows_by_loops(weight, score, sparsity):
    for row in range(len(weight)):
        group = sparsity[1] if isinstance(sparsity, tuple) else weight.shape[1]
        count = sparsity[0] if isinstance(sparsity, tuple) else int(group * sparsity)
        for start in range(0, weight.shape[1], group):
            for place in zero_lowest(score[row, start : start + group].tolist(), count):
                weight[row, start + place] = 0


@pytest.mark.parametrize("sparsity", [0.3, (2, 4)])
def test_magnitude_equals_loops(checkpoints, sparsity):
    model = load(checkpoints, "llama")
    before = copy.deepcopy(model)
    achieved = prune(model, "magnitude", sparsity)
    for name, linear in linears(before).items():
        weight = linear.weight.clone()
        if isinstance(sparsity, tuple):
            prune_rows_by_loops(weight, weight.abs(), sparsity)
        else:
            flat = weight.view(-1)
            for place in zero_lowest(flat.abs().tolist(), int(flat.numel() * sparsity)):
                flat[place] = 0
        assert torch.equal(linears(model)[name].weight, weight), name
        assert achieved.by_module[f"layers.{name}"] == (int((weight == 0).sum()), weight.numel())
    assert achieved.weights == sum(linear.weight.numel() for linear in linears(before).values())
    assert (
        achieved.sparsity
        == achieved.zeros / achieved.weights
        == pytest.approx(0.3 if sparsity == 0.3 else 0.5, abs=1e-3)
    )
    for untouched in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[untouched], before.state_dict()[untouched])
    assert fingerprint(model) != fingerprint(before)  # so plans for the dense model are refused


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_wanda_equals_loops_over_the_upstream_model(checkpoints, name, sparsity):
    """Prune text by text and block by block, each block after the pruned ones."""
    model = load(checkpoints, name, torch.float64)
    oracle = upstream(checkpoints, model, torch.float64)
    for layer in oracle.model.layers:
        parts = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        squares = {n: torch.zeros(m.in_features, dtype=torch.float64) for n, m in parts.items()}

        def add(part, args, squares=squares, parts=parts):
            (own,) = (n for n, m in parts.items() if m is part)
            for token in args[0][0]:
                squares[own] += token**2

        handles = [m.register_forward_pre_hook(add) for m in parts.values()]
        for text in TEXTS:
            oracle(torch.tensor([text]))
        for handle in handles:
            handle.remove()
        for n, m in parts.items():
            prune_rows_by_loops(m.weight, m.weight.abs() * squares[n].sqrt(), sparsity)
    achieved = prune(model, "wanda", sparsity, TEXTS)
    for n, linear in linears(oracle).items():
        assert torch.equal(linears(model)[n].weight, linear.weight), n
    assert achieved.zeros == sum(int((m.weight == 0).sum()) for m in linears(oracle).values())
    assert achieved.sparsity == 0.5


def test_wanda_listens_to_its_calibration(checkpoints):
    plain, other, magnitude = (load(checkpoints, "llama") for _ in range(3))
    prune(plain, "wanda", 0.5, TEXTS)
    prune(other, "wanda", 0.5, [[1, 200, 3, 200, 3]])
    prune(magnitude, "magnitude", 0.5)
    assert len({fingerprint(plain), fingerprint(other), fingerprint(magnitude)}) == 3


@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_gates_of_a_pruned_model_steer(checkpoints, name):
    model = load(checkpoints, name)
    prune(model, "wanda", 0.5, TEXTS)
    rmodels.check_gates(model)
    plain = upstream(checkpoints, model)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    plan = Plan({}, {"attention": torch.randn(rmodels.site_shape(model, "attention"))})
    with steer(model, plan), hook_steering(plain, plan):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_what_cannot_be_pruned(checkpoints, llama, tmp_path):
    before = fingerprint(llama)
    for how, sparsity, texts, message in [
        ("sparsegpt", 0.5, TEXTS, "unknown; use one of wanda, magnitude"),
        ("wanda", 0.5, [], "needs calibration texts"),
        ("wanda", 0.5, [[]], "needs calibration texts"),
        ("magnitude", (2, 7), [], "not a multiple of 7"),
    ]:
        with pytest.raises(AUSteerError, match=message):
            prune(llama, how, sparsity, texts)
    with steer(llama, Plan({"ffn": torch.ones(3, 48)}, {})), pytest.raises(AUSteerError, match="is steered"):
        prune(llama, "magnitude", 0.5)
    assert fingerprint(llama) == before
    with pytest.raises(AUSteerError, match="several experts in one tensor"):
        prune(load(checkpoints, "qwen3_moe"), "magnitude", 0.5)
    with pytest.raises(AUSteerError, match="inf or nan on the calibration"):
        broken = load(checkpoints, "llama")
        broken.model.embed_tokens.weight[3] = torch.inf
        prune(broken, "wanda", 0.5, TEXTS)


def test_a_quantised_model_is_not_pruned(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in requirements2.txt")
    wide = {**COMMON, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **wide)).save_pretrained(tmp_path)
    model = rmodels.load(tmp_path, dtype="float32", device="cpu", quantization="4bit")
    with pytest.raises(AUSteerError, match="quantised model cannot be pruned"):
        prune(model, "magnitude", 0.5)


def test_sparsity_in_words():
    assert [parse_sparsity(text) for text in ("0.5", ".25", "2:4", "4:8")] == [0.5, 0.25, (2, 4), (4, 8)]
    for text in ("0", "1", "1.5", "-0.5", "0.0", "4:4", "0:4", "half", "nan", ""):
        with pytest.raises(AUSteerError, match="give a share above 0"):
            parse_sparsity(text)


def test_batches_of_one_length():
    result = same_length_batches([[1] * n for n in (3, 5, 3, 3, 5)], tokens=6)
    assert result == [[1], [4], [0, 2], [3]]


def test_worked_example():
    delta = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, -1.0]])
    lost = lost_components(delta[None])
    size = (delta @ lost.basis[0].T).norm(dim=0)
    assert torch.allclose(size, torch.tensor([4.095363, 2.868449]), atol=1e-6)
    assert torch.allclose(lost.alpha[0].abs(), torch.tensor([2.213446, 0.317264]), atol=1e-6)
    assert torch.allclose(lost.component(1)[0], torch.tensor([1.819288, 1.260767]), atol=1e-6)
    assert torch.allclose(lost.component(2)[0], torch.tensor([2.0, 1.0]), atol=1e-6)
    beta, basis, offset = (
        torch.tensor([[2.0, -1.0]]),
        torch.tensor([[[0.6, 0.8], [-0.8, 0.6]]]),
        torch.tensor([[0.1, -0.2]]),
    )
    assert torch.allclose(learned_component(beta, basis, offset), torch.tensor([[2.1, 0.8]]))


@pytest.mark.parametrize("rows", [3, 9])  # fewer and more questions than d
def test_lost_components_equal_loops(rows):
    delta = torch.randn(4, rows, 5, generator=torch.Generator().manual_seed(1))
    lost = lost_components(delta)
    for head in range(4):
        u, s, vt = torch.linalg.svd(delta[head].double(), full_matrices=False)
        total = torch.zeros(5, dtype=torch.float64)
        for i in range(len(s)):
            total += sum(float(s[i] * u[n, i]) for n in range(rows)) / rows * vt[i]
            assert torch.allclose(lost.component(i + 1)[head], total.float(), atol=1e-5)
        assert torch.allclose(lost.basis[head] @ lost.basis[head].T, torch.eye(5), atol=1e-5)
        assert torch.allclose(lost.component(5)[head], delta[head].mean(0), atol=1e-5)


def test_heads_are_slices_of_the_site():
    activations = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    heads = head_rows(activations, SimpleNamespace(num_attention_heads=4))
    for layer in range(3):
        for head in range(4):
            for text in range(2):
                assert torch.equal(heads[layer * 4 + head, text], activations[text, layer, head * 2 : head * 2 + 2])


def test_probes_equal_one_at_a_time():
    drawn = torch.Generator().manual_seed(3)
    offered, right, wrong = (torch.randn(9, 31, 4, generator=drawn) for _ in range(3))
    right[:, :, 1] += torch.linspace(0, 3, 9)[:, None]  # each head knows more than the one before
    drawn = torch.Generator().manual_seed(42)
    order = torch.randperm(31, generator=drawn)
    weight, bias = ((2 * torch.rand(*shape, generator=drawn) - 1) / 8**0.5 for shape in ((9, 8, 1), (9, 1)))
    expected = []
    for head in range(9):
        probe = nn.Linear(8, 1)
        probe.weight.data, probe.bias.data = weight[head].T.clone(), bias[head].clone()
        rows = [
            (torch.cat([offered[head, n], answer[head, n]]), label)
            for answer, label in ((right, 1.0), (wrong, 0.0))
            for n in order
        ]
        fit = [row for i, row in enumerate(rows) if i % 31 < 22]  # 0.7 * 31, rounded
        held = [row for i, row in enumerate(rows) if i % 31 >= 22]
        adam = torch.optim.Adam(probe.parameters(), lr=0.01)
        x, y = torch.stack([row[0] for row in fit]), torch.tensor([[row[1]] for row in fit])
        for _ in range(200):
            adam.zero_grad()
            nn.BCELoss()(torch.sigmoid(probe(x)), y).backward()
            adam.step()
        right_of = [bool(torch.sigmoid(probe(x)) > 0.5) == (label == 1) for x, label in held]
        expected.append(sum(right_of) / len(held))
    assert probe_accuracy(offered, right, wrong).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 3


def test_the_head_that_tells_answers_apart_is_the_one_shifted(llama):
    """With three layers of four heads the authors' numbering, layer * layers + head, would shift another head."""
    right = torch.randn(12, 40, 16, generator=torch.Generator().manual_seed(0))
    wrong = torch.randn(12, 40, 16, generator=torch.Generator().manual_seed(1))
    right[1 * 4 + 2, :, 0] += 9.0
    order = best_first(probe_accuracy(torch.zeros(12, 40, 16), right, wrong))
    lost = lost_components(torch.randn(12, 20, 16))
    prepared = restore_lcc.Prepared(llama, [], lost, order, {})
    plan = MeanLost(llama).plan(prepared, {"share": 1 / 12, "alpha": 2.0})
    assert plan.shifts["attention"].nonzero()[:, 0].unique().tolist() == [1]
    assert torch.equal(plan.shift("attention", 1)[32:48], 2 * lost.mean[6])
    assert len(plan) == 16 and plan.tokens == "all"
    assert best_first(torch.tensor([0.5, 0.9, 0.9, 0.2])).tolist() == [1, 2, 0, 3]  # ties: in order


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_training_equals_loops_over_the_upstream_model(checkpoints, tokenizer, name):
    model = load(checkpoints, name)
    questions = questions_of(Evidence(model, tokenizer, MINE[:11], "attention", None))
    heads, basis = torch.tensor([9, 2]), lost_components(torch.randn(2, 20, 16)).basis
    before = fingerprint(model)
    ours = train(model, questions, basis, heads, rate=0.03, epochs=2)
    assert fingerprint(model) == before and not any(weight.requires_grad for weight in model.parameters())

    plain, drawn = upstream(checkpoints, model), torch.Generator().manual_seed(42)
    beta, offset = ((torch.randn(2, 16, generator=drawn) * 1e-3).requires_grad_() for _ in range(2))
    adam = torch.optim.Adam([beta, offset], lr=0.03)
    first_loss = None
    for _ in range(2):
        order = torch.randperm(11, generator=drawn).tolist()
        for start in range(0, 11, 8):
            losses = []
            for question in (questions[i] for i in order[start : start + 8]):

                def change(layer, x):
                    for row, (at_layer, head) in enumerate(((2, 1), (0, 2))):  # heads 9 and 2, with four per layer
                        if layer == at_layer:
                            c = offset[row] + sum(beta[row, i] * basis[row, i] for i in range(16))
                            x = x + nn.functional.pad(c, (16 * head, x.shape[-1] - 16 * head - 16))
                    return x

                text = question.prompt + question.answer
                with hooked(plain, "attention", change):
                    logp = plain(torch.tensor([text])).logits[0].log_softmax(-1)
                losses += [-logp[t - 1, text[t]] for t in range(len(question.prompt), len(text))]
            loss = torch.stack(losses).mean()
            first_loss = first_loss or (loss.item(), order)
            adam.zero_grad()
            loss.backward()
            adam.step()
    theirs = torch.stack([beta[row] @ basis[row] + offset[row] for row in range(2)])
    assert torch.allclose(ours, theirs, atol=2e-3) and ours.abs().max() > 0.03
    batch = [questions[i] for i in first_loss[1][:8]]
    assert float(answer_loss(model, batch, torch.zeros(3, 64))) == pytest.approx(first_loss[0], rel=1e-2)


def test_questions_end_where_their_prompt_ends(llama, tokenizer):
    pairs = [Pair("Is it so? ", "yes", "yes, it is"), Pair("He ga", "ve up", "ve in"), Pair("x" * 300, "abc", "abd")]
    pairs.insert(1, Pair("Same. ", "a", "a"))  # equal tokens: left out
    one, seam, long = questions_of(Evidence(llama, tokenizer, pairs, "attention", None))
    assert [tokenizer.decode(q.answer) for q in (one, seam, long)] == ["yes", "gave up", "abc"]
    assert tokenizer.decode(one.prompt, skip_special_tokens=True) == "Is it so? "
    assert tokenizer.decode(seam.prompt, skip_special_tokens=True) == "He "
    assert len(long.prompt) + 3 == 256 and long.prompt[0] == tokenizer.bos_token_id  # the prompt's start is cut


def test_last_activations_equal_hooks(checkpoints, llama):
    texts = [*TEXTS, TEXTS[0]]
    rows, plain = last_activations(llama, texts), upstream(checkpoints, llama)
    for text, row in zip(texts, rows, strict=True):
        seen = {}
        with hooked(plain, "attention", lambda layer, x, seen=seen: seen.update({layer: x[0, -1].clone()})):
            plain(torch.tensor([text]))
        assert torch.allclose(row, torch.stack([seen[layer] for layer in range(3)]), atol=1e-5)


@pytest.fixture(scope="module")
def repaired(checkpoints):
    """Return a dense model, and evidence on its pruned copy."""
    dense = load(checkpoints, "llama")
    pruned = copy.deepcopy(dense)
    prune(pruned, "magnitude", 0.5)
    return dense, Evidence(pruned, byte_tokenizer(), MINE, "attention", None)


def test_training_lowers_the_loss_and_controls_are_like_it(repaired):
    dense, evidence = repaired
    method, settings = RestoreLCC(dense), {"share": 0.25, "rate": 0.03}
    prepared = method.prepare(evidence)
    plan = method.plan(prepared, settings)
    assert torch.equal(plan.shifts["attention"], method.plan(prepared, settings).shifts["attention"])
    none, ours = (
        float(answer_loss(evidence.model, prepared.questions, s))
        for s in (torch.zeros(3, 64), plan.shifts["attention"])
    )
    assert ours < none - 0.1
    assert plan.header["heads"] == sorted(prepared.order[:3].tolist()) and len(plan) == 48
    drawn = [RandomHeads(dense).plan(prepared, settings, draw) for draw in range(3)]
    assert len({tuple(p.header["heads"]) for p in drawn}) == 3 and all(len(p) == 48 for p in drawn)
    mean = MeanLost(dense).plan(prepared, {"share": 0.25, "alpha": 0.5})
    assert mean.header["heads"] == plan.header["heads"]
    prompts = [question.prompt for question in prepared.questions]
    lost = (last_activations(dense, prompts) - last_activations(evidence.model, prompts)).mean(0)
    touched = mean.shifts["attention"] != 0
    assert torch.allclose(mean.shifts["attention"], 0.5 * lost * touched, atol=1e-5) and touched.sum() == 48
    with steer(evidence.model, plan):  # the plan is for the pruned model only
        pass
    with pytest.raises(AUSteerError, match="other weights"), steer(dense, plan):
        pass


def test_heads_are_scored_by_the_dense_models_answers(repaired, checkpoints, tokenizer):
    dense, evidence = repaired
    prepared = RestoreLCC(dense).prepare(evidence)
    offered = head_rows(last_activations(evidence.model, [q.prompt for q in prepared.questions]), dense.config)
    orders = {}
    for name, model in (("dense", dense), ("pruned", evidence.model)):
        plain = upstream(checkpoints, model)
        answers = ([activations_of(plain, tokenizer, p.prompt + p[side], "attention") for p in MINE] for side in (1, 2))
        right, wrong = (head_rows(torch.stack(rows), dense.config) for rows in answers)
        orders[name] = best_first(probe_accuracy(offered + prepared.lost.component(1)[:, None], right, wrong))
    assert torch.equal(prepared.order, orders["dense"]) and not torch.equal(prepared.order, orders["pruned"])


def test_the_papers_and_the_codes_number_of_components(repaired):
    """c_K is the same for both answers and hardly affects the probe, so it takes a huge loss to show."""
    dense, _ = repaired
    far, seen = copy.deepcopy(dense), {}
    for layer in far.model.layers:
        layer.self_attn.v_proj.weight *= 100
    for components in ("paper", "code"):
        method = RestoreLCC(dense, components)
        prepared = method.prepare(Evidence(far, byte_tokenizer(), MINE, "attention", None))
        seen[components] = method.plan(prepared, {"share": 0.5, "rate": 1e-3})
    assert not torch.equal(seen["paper"].shifts["attention"], seen["code"].shifts["attention"])
    assert seen["code"].header["components"] == "code"
    with pytest.raises(AUSteerError, match="components 'all' is unknown"):
        RestoreLCC(dense, "all")


def test_grids_are_of_one_size_and_within_the_budget(llama):
    for kind, budget in BUDGET.items():
        grids = [method(llama).grid(kind) for method in (RestoreLCC, RandomHeads, MeanLost)]
        assert len({len(grid) for grid in grids}) == 1 and len(grids[0]) <= budget
        assert all(list(grid[0].values()) == [min(s[key] for s in grid) for key in grid[0]] for grid in grids)


def test_degenerate_evidence(repaired):
    dense, evidence = repaired

    def with_pairs(pairs, site="attention", model=evidence.model):
        return Evidence(model, evidence.tokenizer, [Pair(*pair) for pair in pairs], site, None)

    method = RestoreLCC(dense)
    for few in (PAIRS[:1], [PAIRS[0], ("Same. ", "a", "a")], [("Same. ", "a", "a")] * 3):
        with pytest.raises(AUSteerError, match="at least two pairs"):
            method.prepare(with_pairs(few))
    with pytest.raises(AUSteerError, match="acts at the attention site"):
        method.prepare(with_pairs(PAIRS, "ffn"))
    with pytest.raises(AUSteerError, match="inf or nan"):
        lost_components(torch.full((1, 2, 2), torch.nan))
    for pairs, model in ((PAIRS[:2], evidence.model), ([PAIRS[0]] * 4, evidence.model), (PAIRS, dense)):
        prepared = method.prepare(with_pairs(pairs, model=model))  # two pairs; four equal ones; nothing was pruned
        assert torch.isfinite(prepared.lost.alpha).all()
        plan = method.plan(prepared, {"share": 0.125, "rate": 1e-3})
        assert torch.isfinite(plan.shifts["attention"]).all()
    assert not prepared.lost.mean.any() and not MeanLost(dense).plan(prepared, {"share": 0.5, "alpha": 1.0}).aus()
    with pytest.raises(AUSteerError, match="use a lower rate"):
        train(evidence.model, prepared.questions, prepared.lost.basis[:1], torch.tensor([0]), rate=3e37)


def test_a_pair_needs_a_question(llama):
    bare = byte_tokenizer()
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # no BOS in front
    with pytest.raises(AUSteerError, match="every pair needs a prompt"):
        questions_of(Evidence(llama, bare, [Pair("", "3", "4")] * 2, "attention", None))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_a_restored_model_is_saved_by_folding(name, tmp_path):
    """Its architecture needs the bias (attention_bias); export refuses the others and says why."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON, **SPECIAL[name], attention_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    dense = rmodels.load(tmp_path / "dense", dtype="float32", device="cpu")
    dense.model.layers[0].self_attn.o_proj.bias.fill_(0.5)  # an existing bias stays
    pruned = copy.deepcopy(dense)
    prune(pruned, "magnitude", 0.5)
    pruned.save_pretrained(tmp_path / "pruned")
    method = MeanLost(dense)
    plan = method.plan(
        method.prepare(Evidence(pruned, byte_tokenizer(), MINE, "attention", None)), {"share": 0.5, "alpha": 1.0}
    )
    with steer(pruned, plan):
        live = pruned(IDS).logits
    fold(tmp_path / "pruned", plan, tmp_path / "restored", certificate=False)
    restored = rmodels.load(tmp_path / "restored", dtype="float32", device="cpu")
    assert torch.allclose(restored(IDS).logits, live, atol=1e-4) and not torch.equal(live, pruned(IDS).logits)
    with pytest.raises(AUSteerError, match="is folded already"):
        fold(tmp_path / "restored", plan, tmp_path / "twice", certificate=False)  # the shift would count twice


def test_an_architecture_without_the_bias_is_refused(checkpoints, tmp_path):
    plan = Plan({}, {"attention": torch.ones(3, 64)})
    with pytest.raises(AUSteerError, match=r"a shift becomes a bias, but .*o_proj.weight has none: .* steer live"):
        fold(checkpoints["llama"], plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_perplexity_equals_loops(checkpoints, llama):
    plain, logp, count = upstream(checkpoints, llama), 0.0, 0
    for text in TEXTS:
        predicted = plain(torch.tensor([text])).logits[0].double().log_softmax(-1)
        for t in range(1, len(text)):
            logp, count = logp + float(predicted[t - 1, text[t]]), count + 1
    assert restore.perplexity(llama, [*TEXTS, [1]]) == pytest.approx(torch.tensor(-logp / count).exp().item(), rel=1e-4)
    with pytest.raises(AUSteerError, match="at least two tokens"):
        restore.perplexity(llama, [[1]])


@pytest.fixture
def small_grid(monkeypatch):
    """Use few pairs and grid points, so that nothing takes long."""
    BENCHES.close()
    monkeypatch.setattr("eval.tasks.embedded.PAIRS", 100)
    for axis, values in (("SHARES", (0.25,)), ("RATES", (1e-2, 3e-2)), ("ALPHAS", (1.0, 2.0))):
        monkeypatch.setitem(getattr(restore_lcc, axis), "small", values)
    yield
    BENCHES.close()


def test_the_command_on_an_embedded_task(tmp_path, capsys, monkeypatch, small_grid):
    command = ["--data_name", "svamp", "--sparsity", "2:4", "--limit", "100", "--draws", "1", "--device", "cpu"]
    command += ["--results", str(tmp_path)]
    restore.main(command)
    output = capsys.readouterr().out
    assert "327,680 of 655,360 weights are zero (50.00 %)" in output and "accuracy on 100 items of test" in output
    (file,) = (tmp_path / "restore").glob("*.json")
    record = json.loads(file.read_text())
    rows = {row["label"]: row for row in record["rows"]}
    assert list(rows) == ["dense", "pruned", "RestoreLCC", "dense, trained alike", "random heads, trained alike, draw 1", "mean lost activation, untrained"]  # fmt: skip
    vanilla = computed(tmp_path / "cells", task="svamp", limit=100, method="vanilla")
    assert rows["dense"]["columns"] == vanilla["columns"]  # the dense model was left as it is
    ours = rows["RestoreLCC"]
    assert set(ours["grid_scores"]) == {"0.25,0.01", "0.25,0.03"} and ours["touched"] == 128
    assert ours["value"] > rows["pruned"]["value"] + 0.05
    assert sum(records.unpack(ours["columns"]["accuracy"])) == round(100 * ours["value"])
    for row in rows.values():
        assert row["n"] == 100 and row["perplexity"] > 1 and row["low"] <= row["value"] <= row["high"]
        assert f"| {row['label']} |" in output
    assert (tmp_path / "embedded-svamp-restore-wanda-2of4.md").read_text().strip() in output

    monkeypatch.setattr("experiments.store.Store.write", None)  # a finished record must not be computed again
    restore.main(command)
    assert capsys.readouterr().out == output


def test_nothing_is_done_where_nothing_beats_the_pruned_model(tmp_path, monkeypatch, small_grid):
    monkeypatch.setattr(restore, "full_grid", lambda ask, floor, grid: SearchResult(None, {}, {}, 0, len(floor)))
    record = restore.restore(bench_for(tmp_path, task="copa", limit=20), "magnitude", "0.5", "paper", 1)
    pruned, *others = [row for row in record["rows"] if row["label"] != "dense"]
    assert len(others) == 3 and all(row["columns"] == pruned["columns"] and not row["touched"] for row in others)


def test_the_command_on_a_checkpoint_and_ones_own_pairs(checkpoints, tmp_path, capsys, small_grid):
    lines = [{"prompt": f"Is {n} more than {n + 1}? ", "positive": "no", "negative": "yes"} for n in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("qwen3", "gemma2"):
        command = ["--model", str(checkpoints[name]), "--pairs", str(tmp_path / "mine.jsonl"), "--device", "cpu"]
        restore.main([*command, "--dtype", "float32", "--draws", "0", "--results", str(tmp_path / name)])
        output = capsys.readouterr().out
        assert "## mine" in output and "right answer preferred on" in output and "| RestoreLCC |" in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--sparsity", "2"], "give a share above 0"),
        (["--data_name", "gsm8k"], "the embedded models' tasks are boolq"),
        (["--pairs", "x.jsonl"], "--pairs needs --model"),
        (["--model", "some/model"], "--model needs --data_name"),
        (["--draws", "-1"], "--draws is -1"),
        (["--limit", "0"], "--limit must be at least 1"),
    ],
)
def test_wrong_inputs(tmp_path, command, message):
    with pytest.raises(AUSteerError, match=message):
        restore.main([*command, "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_claim_on_svamp(tmp_path):
    """Check that the restored model beats the pruned one and the untrained control, and even the dense model."""
    restore.main(["--data_name", "svamp", "--draws", "1", "--device", "cpu", "--results", str(tmp_path)])
    (file,) = (tmp_path / "restore").glob("*.json")
    rows = {row["label"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["RestoreLCC"]["low"] > max(rows["pruned"]["high"], rows["mean lost activation, untrained"]["high"])
    assert rows["RestoreLCC"]["low"] > rows["dense"]["high"]  # more than was lost, so this is also steering
