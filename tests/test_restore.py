"""Pruning, and RestoreLCC, which gives a pruned model its lost components back."""

import copy

import pytest
import torch
from conftest import PAIRS, byte_tokenizer
from reference import hooked
from reference import last_activations as activations_of
from tokenizers import processors
from torch import nn
from transformers import AutoConfig, get_linear_schedule_with_warmup
from upstream import TEXTS, load, upstream

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.identity import fingerprint
from austeer.methods import restore_lcc
from austeer.methods.base import BUDGET
from austeer.methods.restore_lcc import (
    RECIPES,
    MeanLost,
    Question,
    RandomHeads,
    Recipe,
    RestoreLCC,
    answer_loss,
    best_first,
    fit,
    head_rows,
    last_activations,
    learned_component,
    lost_components,
    probe_accuracy,
    questions_of,
    train,
)
from austeer.pairs import Pair
from austeer.pruning.prune import prune
from austeer.steering import steer

IDS = torch.tensor([TEXTS[2]])
MINE = [Pair(*pair) for pair in PAIRS]


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
    heads = head_rows(activations, AutoConfig.for_model("llama", num_attention_heads=4))
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
        method = RestoreLCC(dense, Recipe(components))
        prepared = method.prepare(Evidence(far, byte_tokenizer(), MINE, "attention", None))
        seen[components] = method.plan(prepared, {"share": 0.5, "rate": 1e-3})
    assert not torch.equal(seen["paper"].shifts["attention"], seen["code"].shifts["attention"])
    assert seen["code"].header["components"] == "code"


def test_the_original_schedule_is_that_of_transformers_trainer():
    """A linear decay from the first step on, gradients clipped together, and texts cut after so many tokens."""
    drawn = torch.Generator().manual_seed(1)
    numbers = torch.randn(11, 2, generator=drawn)
    questions = [Question((1,) * (5 + 30 * n), tuple(range(300))) for n in range(11)] + [Question((1,) * 500, (7,))]
    ours, theirs = (torch.tensor([4.0, -3.0], requires_grad=True) for _ in range(2))
    seen = []

    def loss(weight, batch):
        rows = numbers[[(len(question.prompt) - 5) // 30 for question in batch]]
        return ((weight - rows) ** 2 * torch.tensor([9.0, 1.0])).mean()

    def count(batch):
        seen.extend(len(question.prompt) + len(question.answer) for question in batch)
        return loss(ours, batch)

    fit([ours], count, questions, 0.1, RECIPES["original"], 3, torch.Generator().manual_seed(42))
    adam = torch.optim.Adam([theirs], lr=0.1)
    schedule, drawn = get_linear_schedule_with_warmup(adam, 0, 6), torch.Generator().manual_seed(42)
    for _ in range(3):
        for batch in torch.randperm(11, generator=drawn).split(8):  # the last question has no answer within 500 tokens
            adam.zero_grad()
            loss(theirs, [questions[i] for i in batch]).backward()
            nn.utils.clip_grad_norm_([theirs], 1.0)
            adam.step()
            schedule.step()
    assert torch.allclose(ours, theirs, atol=1e-6) and max(seen) == 500 and min(seen) == 305
    constant = torch.tensor([4.0, -3.0], requires_grad=True)
    fit([constant], lambda batch: loss(constant, batch), questions[:11], 0.1, Recipe(), 3, torch.Generator().manual_seed(42))  # fmt: skip
    assert not torch.allclose(ours, constant, atol=1e-3)
    with pytest.raises(AUSteerError, match="no answer begins within 500 tokens"):
        fit([ours], count, questions[11:], 0.1, RECIPES["original"], 1, drawn)


def test_the_original_recipe_probes_the_first_questions_and_trains_on_all(repaired):
    dense, evidence = repaired
    prepared = RestoreLCC(dense, Recipe(probed=9)).prepare(evidence)
    few = RestoreLCC(dense).prepare(Evidence(evidence.model, evidence.tokenizer, MINE[:9], "attention", None))
    assert torch.equal(prepared.lost.mean, few.lost.mean) and torch.equal(prepared.order, few.order)
    assert len(prepared.questions) == 16 and len(few.questions) == 9


def test_heads_that_were_removed_are_never_shifted(repaired):
    dense, evidence = repaired
    pruned = copy.deepcopy(dense)
    prune(pruned, "structured", 0.5, TEXTS)
    prepared = RestoreLCC(dense).prepare(Evidence(pruned, evidence.tokenizer, MINE, "attention", None))
    there = [
        4 * index + head
        for index, layer in enumerate(pruned.model.layers)
        for head in range(4)
        if layer.self_attn.o_proj.weight[:, 16 * head : 16 * head + 16].any()
    ]
    assert sorted(prepared.order.tolist()) == there and len(there) == 6
    for method in (MeanLost(dense), RandomHeads(dense)):
        plan = method.plan(prepared, {"share": 1.0, "rate": 1e-3, "alpha": 1.0})
        assert plan.header["heads"] == there and plan.shape("attention") == (3, 64)


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
