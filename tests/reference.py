"""The oracle: the paper's formulas as plain loops and forward hooks on the *upstream* model, batch 1."""

from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence


@contextmanager
def hooked(model, site, change):
    """Call change(layer, x) at a site of an unpatched model; what it returns (if anything) replaces x."""
    handles, experts = [], []
    for index, layer in enumerate(model.model.layers):
        if site == "neuron" and hasattr(layer.mlp, "experts"):
            experts.append(layer.mlp.experts)
            shape = {}
            note = lambda module, args, shape=shape: shape.update(batch=args[0].shape[:2])  # noqa: E731
            handles.append(layer.mlp.register_forward_pre_hook(note))
            layer.mlp.experts.forward = partial(plain_experts, layer.mlp.experts, partial(change, index), shape)
        elif site in ("attention", "neuron"):
            before = lambda module, args, i=index: (out,) if (out := change(i, args[0])) is not None else None  # noqa: E731
            projection = layer.self_attn.o_proj if site == "attention" else layer.mlp.down_proj
            handles.append(projection.register_forward_pre_hook(before))
        else:
            after = lambda module, args, out, i=index: change(i, out)  # noqa: E731
            handles.append((layer.mlp if site == "ffn" else layer).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts:
            del module.forward


def plain_experts(experts, change, shape, hidden, index, weights):
    """Run fused experts token by token; change(x) sees their inner activations as (batch, tokens, experts * inner)."""
    inner = experts.down_proj.shape[-1]
    x = hidden.new_zeros(len(hidden), experts.num_experts, inner)
    for token, chosen in enumerate(index.tolist()):
        for expert in chosen:
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            x[token, expert] = experts.act_fn(gate) * up
    flat = x.view(*shape["batch"], -1)
    changed = change(flat)
    x = (flat if changed is None else changed).view(x.shape)
    out = torch.zeros_like(hidden)
    for token, chosen in enumerate(index.tolist()):
        for expert, weight in zip(chosen, weights[token], strict=True):
            out[token] += weight * (experts.down_proj[expert] @ x[token, expert])
    return out


def hook_steering(model, plan):
    """Steer an upstream model by hooks: x + x * scale + shift."""
    (site,) = plan.sites

    def change(layer, x):
        x = x + x * plan.scale(site, layer)[: x.shape[-1]].to(x.dtype)
        return x + plan.shift(site, layer)[: x.shape[-1]].to(x.dtype)

    return hooked(model, site, change)


@torch.no_grad()
def last_activations(model, tokenizer, text, site):
    """(layers, width) at the last token of a text."""
    rows = {}
    with hooked(model, site, lambda layer, x: rows.__setitem__(layer, x[0, -1].clone())):
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    return pad_sequence([rows[layer] for layer in sorted(rows)], batch_first=True)  # layers may differ in width


def activation_scores(model, tokenizer, pairs, site, half=False):
    """Equation 2 and the score of section 4.1, one AU at a time; half: rounded first, as the authors' code."""
    x = [
        [last_activations(model, tokenizer, prompt + answer, site) for answer in answers] for prompt, *answers in pairs
    ]
    if half:
        x = [[activation.half() for activation in two] for two in x]
    layers, width = x[0][0].shape
    score = torch.zeros(layers, width)
    for layer in range(layers):
        for dim in range(width):
            momenta = [float(right[layer, dim] - wrong[layer, dim]) for right, wrong in x]
            r_pos = sum(m > 0 for m in momenta) / len(pairs)
            r_neg = sum(m < 0 for m in momenta) / len(pairs)
            score[layer, dim] = -r_neg if r_pos < r_neg else max(r_pos, r_neg)
    return score


@torch.no_grad()
def log_odds(model, tokenizer, prompt, right, wrong):
    """log p(right | prompt) - log p(wrong | prompt), by full forwards."""
    two = [tokenizer(prompt + answer)["input_ids"] for answer in (right, wrong)]
    shared = 0
    while shared < min(map(len, two)) and two[0][shared] == two[1][shared]:
        shared += 1
    total = []
    for ids in two:
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total.append(sum(float(logp[t - 1, ids[t]]) for t in range(shared, len(ids))))
    return total[0] - total[1]
