"""ITI: Li et al., Inference-Time Intervention, NeurIPS 2023, section 3 and equation 2.

For each head of each layer, a logistic probe learns to tell right from wrong texts by the head's output at the last
token. The K heads whose probes are best on held-out pairs are shifted, before o_proj, by alpha standard deviations:

    x -> x + alpha * sigma * theta

theta: unit direction from the mean of wrong to the mean of right texts ("mass-mean", the paper's choice), or the
probe's weights. sigma: standard deviation of all texts along theta. The prompt's last token and every new token are
shifted. Unlike in the authors' code, sigma comes from the same pairs as the directions, and ties of accuracy go to the
lower layer, then the lower head (their sort is not stable).

preset="original" cuts the pairs into their two folds, in order. Each has probes of its own, fitted and judged inside it,
and a head's accuracy is the mean over both. (They test each fold's heads on the questions of the other; our test items
are apart from all pairs, so one plan serves them all.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.base import GridPoint, Method, is_original
from austeer.methods.choice import by_head, highest
from austeer.plan import Plan

HELD_OUT = 0.2  # the share of pairs that probes are judged on
KS = {"small": (2, 4, 8), "full": (4, 16, 48)}  # heads; the authors' default is K = 48, alpha = 15
THEIR_KS = {"small": (2, 4, 8, 16), "full": (2, 4, 8, 16, 32, 48, 64)}  # the range of AUSteer's comparison
FOLDS = 2  # of the original
ALPHAS = {"small": (1.0, 3.0, 5.0, 10.0, 15.0), "full": (1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 20.0)}
DIRECTIONS = ("mass-mean", "probe")
STDS = {"n-1": 1, "n": 0}  # the authors' scripts differ


@dataclass(frozen=True)
class Heads:
    accuracy: Tensor  # (layers, heads), of the probes on held-out pairs
    direction: Tensor  # (layers, heads, head_dim), of length one, or zero where right and wrong do not differ
    sigma: Tensor  # (layers, heads)
    header: dict


class ITI(Method):
    name, label = "iti", "ITI"
    paper = "Li et al., NeurIPS 2023"
    edits = "k heads, shifted"
    sites = ("attention",)
    foldable = False  # new tokens only: a bias of o_proj would shift the prompt too
    axes = {"heads": KS, "alpha": ALPHAS}

    def __init__(self, direction: str = "mass-mean", std: str = "n-1", preset: str | None = None):
        if direction not in DIRECTIONS or std not in STDS:
            raise AUSteerError(f"direction must be one of {', '.join(DIRECTIONS)}, and std one of {', '.join(STDS)}")
        self.direction, self.std, self.preset = direction, std, preset
        if is_original(preset):
            self.axes = {"heads": THEIR_KS, "alpha": ALPHAS}
        if direction == "probe":
            self.name, self.label = "iti-probe", "ITI, probe direction"

    def prepare(self, evidence: Evidence) -> Heads:
        right, wrong = (by_head(x, evidence.model.config).double() for x in evidence.activations("last"))
        probes = [probe(right, wrong, *one) for one in folds(len(right), FOLDS if self.preset else 1, evidence.seed)]
        accuracy, weights = (torch.stack(each).mean(0) for each in zip(*probes, strict=True))
        direction = unit(weights if self.direction == "probe" else right.mean(0) - wrong.mean(0))
        sigma = spread(torch.cat([right, wrong]), direction, STDS[self.std])
        return Heads(accuracy, direction.float(), sigma.float(), {**evidence.header(), "method": self.name})

    def plan(self, prepared: Heads, point: GridPoint, draw: int = 0) -> Plan:
        mask = highest(prepared.accuracy, point["heads"], "heads")
        shift = point["alpha"] * (mask * prepared.sigma)[..., None] * prepared.direction
        return Plan({}, {"attention": shift.flatten(-2)}, "last", {**prepared.header, **point})


def folds(pairs: int, number: int, seed: int) -> list[tuple[Tensor, ...]]:
    """Cut the pairs into `number` folds, in order, and split each fold."""
    parts = torch.arange(pairs).tensor_split(number)
    return [tuple(fold[part] for part in split(len(fold), seed)) for fold in parts]


def split(pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split pairs into those that probes are fitted on and those that judge them. A pair's texts stay together."""
    if pairs < 2:
        raise AUSteerError(
            "ITI needs at least two pairs, and with preset=original two in each half: its probes are fitted on some and "
            "judged on the others"
        )
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(HELD_OUT * pairs))
    return order[held_out:], order[:held_out]


def probe(right: Tensor, wrong: Tensor, training: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return accuracy on held-out pairs (layers, heads) and weights (layers, heads, head_dim) of a probe per head."""
    accuracy, weights = [], []
    for layer in range(right.shape[1]):  # one at a time: all Hessians of a large model at once would not fit
        x, y = _texts(right[training, layer], wrong[training, layer])
        weight, bias = logistic(x, y)
        x, truth = _texts(right[held_out, layer], wrong[held_out, layer])
        verdicts = (x @ weight[..., None])[..., 0] + bias[:, None] > 0
        accuracy.append((verdicts == truth.bool()).double().mean(1))
        weights.append(weight)
    return torch.stack(accuracy), torch.stack(weights)


def _texts(right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Return texts as (heads, texts, head_dim), and their labels: 1 for right, 0 for wrong."""
    labels = torch.cat([torch.ones(len(right)), torch.zeros(len(wrong))]).to(right.dtype)
    return torch.cat([right, wrong]).transpose(0, 1), labels


def logistic(x: Tensor, y: Tensor, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Fit an L2 logistic regression of y (texts) on x (heads, texts, dims) for all heads: return weights and biases.

    It minimises sum log(1 + exp(-+z)) + |w|^2 / 2, z = w x + b, without a penalty on b: the authors' library's default.
    Newton's method from zero halves steps that do not lower the loss enough, and is deterministic.
    """
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    penalty = torch.ones(x.shape[-1], dtype=x.dtype)
    penalty[-1] = 1e-9  # practically none, but the Hessian is never singular
    sign = 2 * y - 1

    def loss(w: Tensor) -> Tensor:
        return softplus(-sign * (x @ w[..., None])[..., 0]).sum(1) + (penalty * w.square()).sum(1) / 2

    w = x.new_zeros(len(x), x.shape[-1])
    for _ in range(steps):
        p = torch.sigmoid((x @ w[..., None])[..., 0])
        gradient = ((p - y)[:, None] @ x)[:, 0] + penalty * w
        hessian = (x * (p * (1 - p))[..., None]).transpose(1, 2) @ x + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        decrement = (gradient * step).sum(1)  # twice what the step can gain
        if bool((decrement < 1e-12).all()):
            break
        size, before = torch.ones_like(decrement), loss(w)
        for _ in range(40):
            enough = loss(w - size[:, None] * step) <= before - 0.25 * size * decrement
            if bool(enough.all()):
                break
            size = torch.where(enough, size, size / 2)
        w = w - size[:, None] * step
    return w[:, :-1], w[:, -1]


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors to length one; zero stays zero."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors / length, 0.0)


def spread(x: Tensor, direction: Tensor, correction: int) -> Tensor:
    """Return the standard deviation of x (texts, layers, heads, head_dim) along the direction, (layers, heads)."""
    return (x * direction).sum(-1).std(0, correction=correction)


METHODS = (ITI(), ITI("probe"))
