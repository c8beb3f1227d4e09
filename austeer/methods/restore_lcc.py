"""RestoreLCC (NeurIPS 2025): the lost components of a pruned model, given back at the attention site.

1. Lost activation of a head (equations 2-4): dZ = z_dense - z_pruned at the last token of the question, one row a
   question. dZ = U S V^T; alpha_i = mean over rows of s_i u_i; c_K = sum of alpha_i v_i over the first K.
2. Contrastive probing: per head a linear probe tells [z_pruned(q) + c_K ; z_dense(q r+)] from
   [z_pruned(q) + c_K ; z_dense(q r-)]. Its accuracy on held-out pairs is the head's score. (The first half is the same
   for both and the probe is linear, so it can only act as an offset of the question.)
3. Learned component of the best heads: c = sum of beta_i v_i + b with V frozen, trained on the right answers of the
   pruned model; z becomes z + c at every position. A constant, so it folds into a bias: W_o c.

The authors' code numbers heads as layer * (number of layers) + head, which is right only where a layer has as many
heads as the model has layers; here it is layer * heads + head. Their K is 10 in code and 1 in the paper: a switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import rmodels
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import input_device, read_at, tapped
from austeer.identity import check_made_for, model_header
from austeer.methods.base import Method, Settings
from austeer.methods.pruning import same_length_batches
from austeer.plan import Plan
from austeer.tokens import CLEAN, encode

SITE = "attention"
COMPONENTS = {"paper": 1, "code": 10}  # K of c_K in the probe's features
SEED, TRAIN_SHARE, PROBE_EPOCHS, PROBE_RATE = 42, 0.7, 200, 0.01
EPOCHS, BATCH, INIT = 3, 8, 1e-3
SHARES = (0.125, 0.25, 0.5)  # of all heads: 128, 256 and 512 of 1024 in the paper
RATES = {"small": (1e-3, 1e-2, 1e-1), "full": (1e-5, 1e-4, 1e-3)}
ALPHAS = {"small": (0.5, 1.0, 2.0), "full": (0.5, 1.0, 2.0)}  # of the control that is not trained


@dataclass(frozen=True)
class Lost:
    """What pruning took from every head, rows in order of layer, then head."""

    mean: Tensor  # (heads, d): c_K of all K
    basis: Tensor  # (heads, d, d): right singular vectors as rows, the largest first
    alpha: Tensor  # (heads, d)

    def component(self, k: int) -> Tensor:
        """c_K, (heads, d)."""
        return torch.einsum("hk,hkd->hd", self.alpha[:, :k], self.basis[:, :k])


@dataclass(frozen=True)
class Question:
    """Token ids of a question and of its right answer behind it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    model: PreTrainedModel  # whose components are trained
    questions: list[Question]
    lost: Lost
    order: Tensor  # heads, the best first
    header: dict


class RestoreLCC(Method):
    """Of a pruned model, with its dense one beside it: not a row on unpruned models, but a command of its own."""

    name, label = "restore-lcc", "RestoreLCC"
    paper = "RestoreLCC, NeurIPS 2025; repairs a pruned model: main.py restore"
    edits = "K heads, shifted"
    sites = (SITE,)
    trains = True

    def __init__(self, dense: PreTrainedModel, components: str = "paper"):
        if components not in COMPONENTS:
            raise AUSteerError(f"components {components!r} is unknown; use one of {', '.join(COMPONENTS)}")
        self.dense, self.components = dense, components

    def grid(self, kind: str) -> list[Settings]:
        return [{"share": share, "rate": rate} for share in SHARES for rate in RATES[kind]]

    def prepare(self, evidence: Evidence) -> Prepared:
        if evidence.site != SITE:
            raise AUSteerError(f"{self.label} acts at the {SITE} site, not at {evidence.site}")
        if rmodels.site_shape(self.dense, SITE) != rmodels.site_shape(evidence.model, SITE):
            raise AUSteerError("the dense and the pruned model differ in shape: prune a copy of the dense one")
        questions = questions_of(evidence)
        heads = evidence.model.config.num_attention_heads
        prompts = [question.prompt for question in questions]
        pruned = by_head(last_activations(evidence.model, prompts), heads)
        lost = lost_components(by_head(last_activations(self.dense, prompts), heads) - pruned)
        dense = Evidence(self.dense, evidence.tokenizer, evidence.pairs, SITE, evidence.ranks)
        right, wrong = (by_head(texts, heads) for texts in dense.activations("last"))
        offered = pruned + lost.component(COMPONENTS[self.components])[:, None]
        order = best_first(probe_accuracy(offered, right, wrong))
        header = {**model_header(evidence.model), "method": self.name, "components": self.components}
        return Prepared(evidence.model, questions, lost, order, header)

    def plan(self, prepared: Prepared, settings: Settings, draw: int = 0) -> Plan:
        heads = self.heads(prepared, settings, draw)
        return shift_plan(prepared, heads, self.shifts(prepared, heads, settings), settings)

    def heads(self, prepared: Prepared, settings: Settings, draw: int) -> Tensor:
        return prepared.order[: max(1, round(settings["share"] * len(prepared.order)))]

    def shifts(self, prepared: Prepared, heads: Tensor, settings: Settings) -> Tensor:
        return train(prepared.model, prepared.questions, prepared.lost.basis[heads], heads, settings["rate"])


class RandomHeads(RestoreLCC):
    """Control: as many heads, drawn by lot, trained alike."""

    name, label, draws = "restore-random", "random heads, trained alike", True

    def heads(self, prepared: Prepared, settings: Settings, draw: int) -> Tensor:
        drawn = torch.randperm(len(prepared.order), generator=torch.Generator().manual_seed(draw))
        return drawn[: max(1, round(settings["share"] * len(prepared.order)))]


class MeanLost(RestoreLCC):
    """Control: the best heads get their mean lost activation, alpha times; nothing is trained."""

    name, label, trains = "restore-mean", "mean lost activation, untrained", False

    def grid(self, kind: str) -> list[Settings]:
        return [{"share": share, "alpha": alpha} for share in SHARES for alpha in ALPHAS[kind]]

    def shifts(self, prepared: Prepared, heads: Tensor, settings: Settings) -> Tensor:
        return settings["alpha"] * prepared.lost.mean[heads]


def questions_of(evidence: Evidence) -> list[Question]:
    """Of pairs that differ in tokens, in order. A token that begins in the question and ends in the answer is the
    answer's."""
    made = []
    for pair in evidence.pairs:
        found, _ = encode([pair], evidence.tokenizer, CLEAN, evidence.model.config.max_position_embeddings)
        if not found:
            continue
        text = (*found[0].prefix, *found[0].positive)
        asked, uncut = (evidence.tokenizer(t)["input_ids"] for t in (pair.prompt, pair.prompt + pair.positive))
        shared = next(
            (i for i, (a, b) in enumerate(zip(asked, uncut, strict=False)) if a != b), min(len(asked), len(uncut))
        )
        prompt = len(text) - max(1, len(uncut) - shared)
        if prompt < 1:
            raise AUSteerError("RestoreLCC reads the last token of the question: every pair needs a prompt")
        made.append(Question(text[:prompt], text[prompt:]))
    if len(made) < 2:
        raise AUSteerError(
            f"RestoreLCC needs at least two pairs that differ in tokens, not {len(made)}: one to hold out"
        )
    return made


@torch.inference_mode()
def last_activations(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """At the last token of each text, (texts, layers, width) float32 on the CPU."""
    rows: dict[int, Tensor] = {}
    for batch in same_length_batches(texts):
        with read_at(model, [SITE], lambda x: x[:, -1].float().cpu()) as collected:
            model.base_model(
                input_ids=torch.tensor([texts[index] for index in batch], device=input_device(model)), use_cache=False
            )
        together = torch.stack([collected[place][0] for place in sorted(collected)], dim=1)
        rows.update(zip(batch, together, strict=True))
    return torch.stack([rows[index] for index in range(len(texts))])


def by_head(activations: Tensor, heads: int) -> Tensor:
    """(texts, layers, heads * d) -> (layers * heads, texts, d). d comes from the site: hidden / heads may differ."""
    texts, layers, width = activations.shape
    return activations.view(texts, layers * heads, width // heads).transpose(0, 1).contiguous()


def lost_components(delta: Tensor) -> Lost:
    """Of the lost activations, (heads, questions, d)."""
    if not torch.isfinite(delta).all():
        raise AUSteerError("activations are inf or nan; load the model in bfloat16 or float32")
    # full: fewer questions than d still give a basis of d vectors, of which training uses all
    basis = torch.stack([torch.linalg.svd(one.double(), full_matrices=len(one) < one.shape[1])[2] for one in delta])
    mean = delta.double().mean(1)
    alpha = torch.einsum("hkd,hd->hk", basis, mean)  # mean of s_i u_i, since dZ v_i = s_i u_i; no sign to choose
    return Lost(mean.float(), basis.float(), alpha.float())


def probe_accuracy(offered: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Accuracy of each head's probe on the held-out pairs, (heads,). All are (heads, pairs, d).

    One Adam moves the probes of all heads: it works number by number, so each moves as it would alone.
    """
    heads, pairs, d = right.shape
    drawn = torch.Generator().manual_seed(SEED)
    order = torch.randperm(pairs, generator=drawn)
    train = min(max(1, round(TRAIN_SHARE * pairs)), pairs - 1)
    bound = (2 * d) ** -0.5  # what nn.Linear draws from
    weight = ((2 * torch.rand(heads, 2 * d, 1, generator=drawn) - 1) * bound).requires_grad_()
    bias = ((2 * torch.rand(heads, 1, generator=drawn) - 1) * bound).requires_grad_()

    def logits(rows: Tensor) -> Tensor:
        question = torch.bmm(offered[:, rows], weight[:, :d])
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


def best_first(score: Tensor) -> Tensor:
    """Heads by score; ties go to the lower layer, then head."""
    return score.sort(descending=True, stable=True).indices


def learned_component(beta: Tensor, basis: Tensor, offset: Tensor) -> Tensor:
    """c = sum of beta_i v_i + b, (heads, d); the v_i are the rows of `basis`."""
    return torch.einsum("hk,hkd->hd", beta, basis) + offset


def train(
    model: PreTrainedModel,
    questions: Sequence[Question],
    basis: Tensor,
    heads: Tensor,
    rate: float,
    epochs: int = EPOCHS,
) -> Tensor:
    """The learned components of these heads, (heads, d). The loss is on the answers only."""
    drawn = torch.Generator().manual_seed(SEED)
    layers, width = rmodels.site_shape(model, SITE)
    d, device = basis.shape[-1], input_device(model)
    # b alone could express any c: beta and b are kept apart because the paper trains both, which Adam feels
    beta, offset = ((torch.randn(len(heads), d, generator=drawn) * INIT).to(device).requires_grad_() for _ in "12")
    basis, heads = basis.to(device), heads.to(device)
    adam = torch.optim.Adam([beta, offset], lr=rate)
    for _ in range(epochs):
        for some in torch.randperm(len(questions), generator=drawn).split(BATCH):
            with torch.enable_grad():
                component = learned_component(beta, basis, offset)
                shift = component.new_zeros(layers * width // d, d).index_copy(0, heads, component).view(layers, width)
                loss = answer_loss(model, [questions[index] for index in some.tolist()], shift)
            if not torch.isfinite(loss):
                raise AUSteerError(
                    f"training the lost components ended in inf or nan at rate {rate:g}; use a lower one"
                )
            adam.zero_grad()
            loss.backward()
            adam.step()
    return learned_component(beta, basis, offset).detach().cpu()


def answer_loss(model: PreTrainedModel, batch: Sequence[Question], shift: Tensor) -> Tensor:
    """Mean cross-entropy of all answer tokens of a batch, with `shift`, (layers, width), added at every position."""
    texts = [question.prompt + question.answer for question in batch]
    width = max(map(len, texts))
    # padded on the right: no token sees what comes behind it
    ids = torch.tensor([text + (0,) * (width - len(text)) for text in texts], device=shift.device)
    column = torch.arange(width)
    begin = torch.tensor([len(question.prompt) for question in batch])[:, None]
    end = torch.tensor([len(text) for text in texts])[:, None]
    wanted = ids.masked_fill(((column < begin) | (column >= end)).to(ids.device), -100)

    def through(gate):
        return lambda x: x + shift[gate.layer].to(device=x.device, dtype=x.dtype)

    first = int(begin.min())  # no answer begins before it
    with tapped(model, [SITE], through):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=width - first + 1).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), wanted[:, first:].flatten().to(logits.device))


def shift_plan(prepared: Prepared, heads: Tensor, shifts: Tensor, settings: Settings) -> Plan:
    layers, width = rmodels.site_shape(prepared.model, SITE)
    table = torch.zeros(len(prepared.order), shifts.shape[1])
    table[heads] = shifts.float()
    header = {**prepared.header, **settings, "heads": sorted(heads.tolist())}
    return Plan({}, {SITE: table.view(layers, width)}, "all", header)


@torch.no_grad()
def fold_into_bias(model: PreTrainedModel, plan: Plan) -> None:
    """Put a plan of shifts at the attention site into the bias of each `o_proj`, W_o c: exact, and free at inference.

    In memory every family can hold it. A standard checkpoint holds the bias only where the architecture has one
    (Llama, Gemma-2 and Qwen3 with `attention_bias`): elsewhere, as in Qwen3 without it, loading would drop the bias
    without a word, so the folded model then refuses to be saved.
    """
    if plan.sites != [SITE] or plan.tokens != "all" or any(scale.any() for scale in plan.scales.values()):
        raise AUSteerError(
            f"only shifts at the {SITE} site, at all positions, fold into a bias; steer with this plan live"
        )
    check_made_for(model, {SITE: plan.shape(SITE)}, plan.header, "this plan was")
    outputs = [layer.self_attn.o_proj for layer in model.base_model.layers]
    if any(not linear.weight.is_floating_point() or linear.weight.is_meta for linear in outputs):
        raise AUSteerError("the plan does not fold into quantised or offloaded weights; steer with it live")
    created = False
    for index, linear in enumerate(outputs):
        shift = plan.shift(SITE, index)
        if not shift.any():
            continue
        bias = linear.weight.double() @ shift.to(linear.weight.device).double()
        if linear.bias is None:
            created = True
            linear.bias = torch.nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
        else:
            linear.bias.copy_(linear.bias.double() + bias)
    if created:
        model.save_pretrained = _refuse_to_save


def _refuse_to_save(*args, **kwargs) -> None:
    raise AUSteerError(
        "this model's architecture has no o_proj bias (attention_bias is off), so a checkpoint would lose the folded "
        "plan when it is loaded: save the plan instead, or export it to an architecture that has one"
    )


OWN_COMMAND = (RestoreLCC,)  # it repairs a pruned model, which the others do not have: main.py restore
