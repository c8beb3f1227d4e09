"""RestoreLCC (NeurIPS 2025): give a pruned model its lost components back, at the attention site.

1. Lost activation of a head (equations 2-4): dZ = z_dense - z_pruned at the last token of the question, one row per
   question. dZ = U S V^T; alpha_i = mean over rows of s_i u_i; c_K = sum of alpha_i v_i over the first K.
2. Contrastive probing: per head a linear probe tells [z_pruned(q) + c_K ; z_dense(q r+)] from
   [z_pruned(q) + c_K ; z_dense(q r-)]. Its accuracy on held-out pairs is the head's score. (The first half is the same
   for both and the probe is linear, so it can only act as an offset of the question.)
3. Learned component of the best heads: c = sum of beta_i v_i + b with V frozen, trained on the pruned model's loss on
   right answers; z becomes z + c at every position. c is constant, so austeer/export folds it into a bias, W_o c.

The authors' code numbers heads as layer * (number of layers) + head, which is right only if a layer has as many heads
as the model has layers; here it is layer * heads + head. Their K is 10 in code and 1 in the paper: an option here.
Heads that structured pruning removed cannot be shifted, and are never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

import rmodels
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import input_device, read_at, tapped
from austeer.methods.base import ORIGINAL, GridPoint, Method
from austeer.methods.choice import by_head
from austeer.plan import Plan
from austeer.pruning.blocks import same_length_batches
from austeer.tokens import CLEAN, common_length, encode

SITE = "attention"
COMPONENTS = {"paper": 1, "code": 10}  # K of c_K in the probe's features
SEED, TRAIN_SHARE, PROBE_EPOCHS, PROBE_RATE = 42, 0.7, 200, 0.01
EPOCHS, BATCH, INIT = 3, 8, 1e-3
SHARES = dict.fromkeys(("small", "full"), (0.125, 0.25, 0.5))  # of all heads: 128, 256 and 512 of 1024 in the paper
RATES = {"small": (1e-3, 1e-2, 1e-1), "full": (1e-5, 1e-4, 1e-3)}
ALPHAS = dict.fromkeys(("small", "full"), (0.5, 1.0, 2.0))  # of the control that is not trained


@dataclass(frozen=True)
class Recipe:
    """Say how components are found and trained, where the published code differs from what we do by default."""

    components: str = "paper"
    decay: bool = False  # the rate falls linearly to 0, without warm-up
    clip: float | None = None  # largest norm of all gradients together
    max_tokens: int | None = None  # of a question and its answer, in training
    probed: int | None = None  # number of questions that heads and components are found with; all are trained on


# of RestoreLCC_train.py; decay and clip are what transformers' Trainer does unless told otherwise
RECIPES = {"ours": Recipe(), ORIGINAL: Recipe("code", decay=True, clip=1.0, max_tokens=500, probed=1000)}


@dataclass(frozen=True)
class LostComponents:
    """Hold what pruning took from every head, in order of layer, then head."""

    mean: Tensor  # (heads, d): c_K for K = d
    basis: Tensor  # (heads, d, d): right singular vectors as rows, largest singular value first
    alpha: Tensor  # (heads, d)

    def component(self, k: int) -> Tensor:
        """Return c_K, (heads, d)."""
        return torch.einsum("hk,hkd->hd", self.alpha[:, :k], self.basis[:, :k])


@dataclass(frozen=True)
class Question:
    """Hold the token ids of a question and of its right answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def cut(self, max_tokens: int | None) -> Question:
        """Cut question and answer after `max_tokens` tokens, as the authors' trainer does."""
        if max_tokens is None:
            return self
        return replace(self, answer=self.answer[: max(0, max_tokens - len(self.prompt))])


@dataclass(frozen=True)
class Prepared:
    model: PreTrainedModel  # the pruned one
    questions: list[Question]
    lost: LostComponents
    order: Tensor  # the heads that survived pruning, best first
    header: dict


class RestoreLCC(Method):
    """Repair a pruned model with the help of its dense original: a command of its own, not a row of the comparison."""

    name, label = "restore-lcc", "RestoreLCC"
    paper = "RestoreLCC, NeurIPS 2025; repairs a pruned model: main.py restore"
    edits = "K heads, shifted"
    sites = (SITE,)
    trains = True
    axes = {"share": SHARES, "rate": RATES}

    def __init__(self, dense: PreTrainedModel, recipe: Recipe = RECIPES["ours"]):
        self.dense, self.recipe = dense, recipe

    def prepare(self, evidence: Evidence) -> Prepared:
        if evidence.site != SITE:
            raise AUSteerError(f"{self.label} acts at the {SITE} site, not at {evidence.site}")
        if rmodels.site_shape(self.dense, SITE) != rmodels.site_shape(evidence.model, SITE):
            raise AUSteerError("the dense and the pruned model differ in shape; prune a copy of the dense one")
        questions = questions_of(evidence)
        probed = replace(evidence, pairs=evidence.pairs[: self.recipe.probed])
        config, prompts = evidence.model.config, [question.prompt for question in questions_of(probed)]
        pruned = head_rows(last_activations(evidence.model, prompts), config)
        lost = lost_components(head_rows(last_activations(self.dense, prompts), config) - pruned)
        right, wrong = (head_rows(texts, config) for texts in replace(probed, model=self.dense).activations("last"))
        repaired = pruned + lost.component(COMPONENTS[self.recipe.components])[:, None]
        order = best_first(probe_accuracy(repaired, right, wrong))
        header = evidence.header() | {"method": self.name, "components": self.recipe.components}
        return Prepared(evidence.model, questions, lost, order[remaining_heads(evidence.model)[order]], header)

    def plan(self, prepared: Prepared, point: GridPoint, draw: int = 0) -> Plan:
        heads = self.heads(prepared, point, draw)
        return shift_plan(prepared, heads, self.shifts(prepared, heads, point), point)

    def heads(self, prepared: Prepared, point: GridPoint, draw: int) -> Tensor:
        return prepared.order[: max(1, round(point["share"] * len(prepared.order)))]

    def shifts(self, prepared: Prepared, heads: Tensor, point: GridPoint) -> Tensor:
        basis = prepared.lost.basis[heads]
        return train(prepared.model, prepared.questions, basis, heads, point["rate"], self.recipe)


class RandomHeads(RestoreLCC):
    """Train the same number of random heads in the same way, as a control."""

    name, label, draws = "restore-random", "random heads, trained alike", True

    def heads(self, prepared: Prepared, point: GridPoint, draw: int) -> Tensor:
        heads = prepared.order.sort().values
        heads = heads[torch.randperm(len(heads), generator=torch.Generator().manual_seed(draw))]
        return heads[: max(1, round(point["share"] * len(prepared.order)))]


class MeanLost(RestoreLCC):
    """Give the best heads alpha times their mean lost activation, as a control: nothing is trained."""

    name, label, trains = "restore-mean", "mean lost activation, untrained", False
    axes = {"share": SHARES, "alpha": ALPHAS}

    def shifts(self, prepared: Prepared, heads: Tensor, point: GridPoint) -> Tensor:
        return point["alpha"] * prepared.lost.mean[heads]


def questions_of(evidence: Evidence) -> list[Question]:
    """Return the questions of pairs that differ in tokens, in order. A token that spans the seam between question and
    answer belongs to the answer."""
    questions = []
    for pair in evidence.pairs:
        encoded, _ = encode([pair], evidence.tokenizer, CLEAN, rmodels.context_length(evidence.model))
        if not encoded:
            continue
        text = (*encoded[0].prefix, *encoded[0].positive)
        prompt, whole = (evidence.tokenizer(t)["input_ids"] for t in (pair.prompt, pair.prompt + pair.positive))
        seam = len(text) - max(1, len(whole) - common_length(prompt, whole))
        if seam < 1:
            raise AUSteerError("RestoreLCC reads the last token of the question: every pair needs a prompt")
        questions.append(Question(text[:seam], text[seam:]))
    if len(questions) < 2:
        count = len(questions)
        raise AUSteerError(f"RestoreLCC needs at least two pairs that differ in tokens, one to hold out, not {count}")
    return questions


@torch.inference_mode()
def last_activations(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return activations at the last token of each text, (texts, layers, width) float32 on the CPU."""
    rows: dict[int, Tensor] = {}
    for batch in same_length_batches(texts):
        with read_at(model, [SITE], lambda x: x[:, -1].float().cpu()) as collected:
            model.base_model(
                input_ids=torch.tensor([texts[index] for index in batch], device=input_device(model)), use_cache=False
            )
        layers = torch.stack([collected[place][0] for place in sorted(collected)], dim=1)
        rows.update(zip(batch, layers, strict=True))
    return torch.stack([rows[index] for index in range(len(texts))])


def head_rows(activations: Tensor, config: PretrainedConfig) -> Tensor:
    """Turn (texts, layers, heads * d) into (layers * heads, texts, d)."""
    return by_head(activations, config).flatten(1, 2).transpose(0, 1).contiguous()


def lost_components(delta: Tensor) -> LostComponents:
    """Decompose the lost activations, (heads, questions, d)."""
    if not torch.isfinite(delta).all():
        raise AUSteerError("activations are inf or nan; load the model in bfloat16 or float32")
    # full_matrices: fewer questions than d still give a basis of d vectors, and training uses them all
    basis = torch.stack([torch.linalg.svd(dZ.double(), full_matrices=len(dZ) < dZ.shape[1])[2] for dZ in delta])
    mean = delta.double().mean(1)
    alpha = torch.einsum("hkd,hd->hk", basis, mean)  # mean of s_i u_i, since dZ v_i = s_i u_i; whatever the sign of v_i
    return LostComponents(mean.float(), basis.float(), alpha.float())


def probe_accuracy(repaired: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Return the accuracy of each head's probe on the held-out pairs, (heads,). All arguments are (heads, pairs, d).

    One Adam trains the probes of all heads: it updates each number by itself, so each probe moves as it would alone.
    """
    heads, pairs, d = right.shape
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(pairs, generator=generator)
    train = min(max(1, round(TRAIN_SHARE * pairs)), pairs - 1)
    bound = (2 * d) ** -0.5  # as nn.Linear initialises
    weight = ((2 * torch.rand(heads, 2 * d, 1, generator=generator) - 1) * bound).requires_grad_()
    bias = ((2 * torch.rand(heads, 1, generator=generator) - 1) * bound).requires_grad_()

    def logits(rows: Tensor) -> Tensor:
        question = torch.bmm(repaired[:, rows], weight[:, :d])
        both = [question + torch.bmm(answer[:, rows], weight[:, d:]) for answer in (right, wrong)]
        return torch.cat(both, dim=1)[..., 0] + bias  # (heads, 2 * rows)

    def labels(rows: Tensor) -> Tensor:
        return torch.cat([torch.ones(len(rows)), torch.zeros(len(rows))]).expand(heads, -1)

    adam = torch.optim.Adam([weight, bias], lr=PROBE_RATE)
    with torch.enable_grad():
        for _ in range(PROBE_EPOCHS):
            adam.zero_grad()
            loss = F.binary_cross_entropy_with_logits(logits(order[:train]), labels(order[:train]), reduction="none")
            loss.mean(1).sum().backward()
            adam.step()
    with torch.no_grad():
        return ((logits(order[train:]) > 0) == labels(order[train:]).bool()).float().mean(1)


def remaining_heads(model: PreTrainedModel) -> Tensor:
    """Return for each head whether the last projection of attention still reads it, (heads,) bool."""
    maps = [linear for _, inside, _, linear in rmodels.linear_maps(model) if inside == SITE]
    read = torch.stack([model.get_parameter(linear.weight).any(linear.outputs).cpu() for linear in maps])
    return by_head(read, model.config).any(-1).flatten()


def best_first(score: Tensor) -> Tensor:
    """Order heads by score; ties go to the lower layer, then head."""
    return score.sort(descending=True, stable=True).indices


def learned_component(beta: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
    """Return c = sum of beta_i v_i + b, (heads, d); the v_i are the rows of `basis`."""
    return torch.einsum("hk,hkd->hd", beta, basis) + offset


def train(
    model: PreTrainedModel,
    questions: Sequence[Question],
    basis: Tensor,
    heads: Tensor,
    rate: float,
    recipe: Recipe = RECIPES["ours"],
    epochs: int = EPOCHS,
) -> Tensor:
    """Train the components of these heads, (heads, d), on the loss of the answers."""
    generator = torch.Generator().manual_seed(SEED)
    layers, width = rmodels.site_shape(model, SITE)
    d, device = basis.shape[-1], input_device(model)
    # b alone could express any c, but the paper trains beta and b apart, and Adam then takes other steps
    beta, offset = ((torch.randn(len(heads), d, generator=generator) * INIT).to(device).requires_grad_() for _ in "12")
    basis, heads = basis.to(device), heads.to(device)

    def loss(batch: Sequence[Question]) -> Tensor:
        component = learned_component(beta, basis, offset)
        shift = component.new_zeros(layers * width // d, d).index_copy(0, heads, component).view(layers, width)
        return answer_loss(model, batch, shift)

    fit([beta, offset], loss, questions, rate, recipe, epochs, generator)
    return learned_component(beta, basis, offset).detach().cpu()


def fit(
    parameters: Sequence[Tensor],
    loss_of: Callable[[Sequence[Question]], Tensor],
    questions: Sequence[Question],
    rate: float,
    recipe: Recipe,
    epochs: int,
    generator: torch.Generator,
) -> None:
    """Train parameters in place with Adam, on batches of the questions."""
    questions = [question.cut(recipe.max_tokens) for question in questions]
    questions = [question for question in questions if question.answer]
    if not questions:
        raise AUSteerError(f"no answer begins within {recipe.max_tokens} tokens: there is nothing to train on")
    adam = torch.optim.Adam(parameters, lr=rate)
    steps, step = epochs * math.ceil(len(questions) / BATCH), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(questions), generator=generator).split(BATCH):
            with torch.enable_grad():
                loss = loss_of([questions[index] for index in batch.tolist()])
            if not torch.isfinite(loss):
                raise AUSteerError(f"training ended in inf or nan at rate {rate:g}; use a lower rate")
            adam.zero_grad()
            loss.backward()
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            if recipe.decay:
                adam.param_groups[0]["lr"] = rate * (1 - step / steps)
            adam.step()
            step += 1


def answer_loss(model: PreTrainedModel, batch: Sequence[Question], shift: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of a batch's answer tokens, with `shift` (layers, width) added everywhere."""
    texts = [question.prompt + question.answer for question in batch]
    width = max(map(len, texts))
    # padded on the right: no token sees what comes after it
    ids = torch.tensor([text + (0,) * (width - len(text)) for text in texts], device=input_device(model))
    column = torch.arange(width)
    begin = torch.tensor([len(question.prompt) for question in batch])[:, None]
    end = torch.tensor([len(text) for text in texts])[:, None]
    targets = ids.masked_fill(((column < begin) | (column >= end)).to(ids.device), -100)

    def add_shift(gate):
        return lambda x: x + shift[gate.layer].to(device=x.device, dtype=x.dtype)

    first = int(begin.min())  # no answer begins before this column
    with tapped(model, [SITE] if shift is not None else [], add_shift):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - first + 1).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets[:, first:].flatten().to(logits.device))


def shift_plan(prepared: Prepared, heads: Tensor, shifts: Tensor, point: GridPoint) -> Plan:
    layers, width = rmodels.site_shape(prepared.model, SITE)
    table = torch.zeros(layers * width // shifts.shape[1], shifts.shape[1])
    table[heads] = shifts.float()
    header = {**prepared.header, **point, "heads": sorted(heads.tolist())}
    return Plan({}, {SITE: table.view(layers, width)}, "all", header)


OWN_COMMAND = (RestoreLCC,)  # it needs a pruned model, so it is not compared with the others: main.py restore
