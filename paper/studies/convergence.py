"""Figure 3: does the output converge to a distribution of its own as a single AU is steered ever more strongly?

params: site, layer, head; dims (two, or None: the worst and the best of a sweep on validation, which needs step,
    alpha and n); strengths, ascending; prompts (how many test items to average over).

Rows are strengths s. Columns are KL(p_s || p_S) of the next token for either AU, where S is the largest strength, and
KL(p_s of one AU || p_s of the other), which tells whether both converge to the same distribution. As in the paper, all
are divided by the largest in the picture; the record has them in nats. At s = S the first two are 0 by construction.

printed: the paper's values, a row per strength, written below ours.
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
from paper.studies.block import Block, extremes, n_dims, next_token
from paper.studies.counting import place


def measure(bench: Bench, params: dict, progress: bool) -> dict:
    model, tokenizer, task = bench.model, bench.tokenizer, bench.task
    block, strengths, dims = Block.of(model, params), params["strengths"], params["dims"]
    if dims is None:
        chosen = extremes(bench, block, params, progress)
        dims = [chosen["worst"], chosen["best"]]
    if len(dims) != 2 or len(strengths) < 2 or sorted(strengths) != list(strengths):
        raise AUSteerError("convergence needs two dims and at least two strengths, in ascending order")
    plans = [block.plan({dim: strength}) for dim in dims for strength in strengths]
    prompts = [item.prompt for item in task.test[: params["prompts"]]]
    total = torch.zeros(len(strengths), 3, dtype=torch.float64)
    for prompt in tqdm(prompts, desc=f"{task.name}, {block}", unit=" prompts", disable=not progress):
        one, other = next_token(model, tokenizer, prompt, plans).chunk(2)
        total += torch.stack([kl(one, one[-1:]), kl(other, other[-1:]), kl(one, other)], 1)
    return {
        "task": bench.task_spec.label,
        "dims": dims,
        "strengths": list(strengths),
        "prompts": len(prompts),
        "nats": (total / len(prompts)).tolist(),
    }


def n_prompts(params: dict, n_pairs: int, n_validation: int) -> int:
    return n_dims(params) * len(params["strengths"]) * params["prompts"]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, row by row, of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def draw(result: dict, params: dict, path: Path, printed: list) -> None:
    nats = np.array(result["nats"])
    values = nats / (nats.max() or 1.0)
    figure, axis = picture.subplots(size=(7.6, 5.0))
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    texts = [[f"{value:.3f}" for value in row] for row in values]
    texts[-1][:2] = ["0, with itself"] * 2
    texts = picture.with_printed(texts, [[f"paper {value:.3f}" for value in row] for row in printed])
    picture.write_labels(axis, values, image, texts)
    one, other = (f"AU {dim}" for dim in result["dims"])
    last = f"{result['strengths'][-1]:g}"
    axis.set_xticks(
        range(3), [f"{one}: at s\nand at {last}", f"{other}: at s\nand at {last}", f"{one} and {other},\nboth at s"]
    )
    axis.set_yticks(range(len(values)), [f"{strength:g}" for strength in result["strengths"]])
    axis.set(ylabel="strength s", title=f"{result['task']}: {place(params)}, mean of {result['prompts']} prompts")
    figure.colorbar(image, ax=axis, label=f"KL / largest ({nats.max():.3g} nats)")
    picture.save(figure, path)


def note(result: dict, params: dict) -> str:
    """Say how far each AU is from its last output one strength earlier, and the two from each other."""
    nats = np.array(result["nats"])
    values = nats / (nats.max() or 1.0)
    before, last = (f"{strength:g}" for strength in result["strengths"][-2:])
    one, other = result["dims"]
    apart = values[:, 2]
    most = int(apart.argmax())
    return (
        f"In shares of the largest divergence: at strength {before} AU {one} is {values[-2, 0]:.3f} from its output at "
        f"{last}, and AU {other} {values[-2, 1]:.3f} from its own. "
        f"The two are {apart[0]:.3f} apart at {result['strengths'][0]:g}, "
        f"at most {apart[most]:.3f} (at {result['strengths'][most]:g}), and {apart[-1]:.3f} at {last}."
    )
