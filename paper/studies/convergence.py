"""Figure 3: is there a distribution of its own to which the output comes, the more strongly a single AU is steered?

params: site, layer, head; dims (two of them, or None: the worst and the best of a sweep on validation, which needs
    step, alpha and n); strengths, ascending; prompts (how many test items to average over).

Rows are strengths s. KL(p_s || p_S) of the next token, S the largest strength, for either AU; and KL(p_s of the one ||
p_s of the other), which tells whether both came to the same. The paper shows "normalized" divergences, whose largest
in the whole picture is 1: all are divided by it. The record has them in nats. At s = S the first two are 0 whatever
the model does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from austeer.errors import AUSteerError
from experiments.bench import Bench
from paper.studies import picture
from paper.studies.block import Block, extremes, next_token


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    model, tokenizer, task = bench.model, bench.tokenizer, bench.task
    block, strengths, dims = Block.of(model, params), params["strengths"], params["dims"]
    if dims is None:
        found = extremes(bench, block, params, progress)
        dims = [found["worst"], found["best"]]
    if len(dims) != 2 or len(strengths) < 2 or sorted(strengths) != list(strengths):
        raise AUSteerError("convergence is of two dims, over two or more ascending strengths")
    plans = [block.plan({dim: strength}) for dim in dims for strength in strengths]
    prompts = [item.prompt for item in task.test[: params["prompts"]]]
    total = torch.zeros(len(strengths), 3, dtype=torch.float64)
    for prompt in tqdm(prompts, desc=f"{task.name}, {block}", unit=" prompts", disable=not progress):
        one, other = next_token(model, tokenizer, prompt, plans).chunk(2)
        total += torch.stack([kl(one, one[-1:]), kl(other, other[-1:]), kl(one, other)], 1)
    return {
        "task": bench.task_spec.label,
        "where": str(block),
        "dims": dims,
        "strengths": list(strengths),
        "prompts": len(prompts),
        "nats": (total / len(prompts)).tolist(),
    }


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities, row by row."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def draw(found: dict, params: dict, path: Path) -> None:
    nats = np.array(found["nats"])
    values = nats / (nats.max() or 1.0)
    figure, axis = picture.subplots(size=(7.6, 5.0))
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    texts = [[f"{value:.3f}" for value in row] for row in values]
    texts[-1][:2] = ["0, with itself"] * 2
    picture.write_labels(axis, values, image, texts)
    one, other = (f"AU {dim}" for dim in found["dims"])
    last = f"{found['strengths'][-1]:g}"
    axis.set_xticks(
        range(3), [f"{one}: at s\nand at {last}", f"{other}: at s\nand at {last}", f"{one} and {other},\nboth at s"]
    )
    axis.set_yticks(range(len(values)), [f"{strength:g}" for strength in found["strengths"]])
    axis.set(ylabel="strength s", title=f"{found['task']}: {found['where']}, mean of {found['prompts']} prompts")
    figure.colorbar(image, ax=axis, label=f"KL / largest ({nats.max():.3g} nats)")
    picture.save(figure, path)


def note(found: dict, params: dict) -> str:
    """How far each still is from its end one strength before it, and both from each other."""
    nats = np.array(found["nats"])
    values = nats / (nats.max() or 1.0)
    before, last = (f"{strength:g}" for strength in found["strengths"][-2:])
    one, other = found["dims"]
    apart = values[:, 2]
    most = int(apart.argmax())
    return (
        f"In shares of the largest divergence: at strength {before} AU {one} is {values[-2, 0]:.3f} from its output at "
        f"{last}, and AU {other} {values[-2, 1]:.3f} from its own. "
        f"The two are {apart[0]:.3f} apart at {found['strengths'][0]:g}, "
        f"at most {apart[most]:.3f} (at {found['strengths'][most]:g}), and {apart[-1]:.3f} at {last}."
    )
