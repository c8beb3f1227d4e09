"""Steer2Edit: a steering vector becomes rank-1 edits of the heads' o_proj and the neurons' down_proj, in closed form.

Sun, Yan, Wang and Weng, arXiv 2602.09870. A component W_i is a head's columns of o_proj, or a neuron's column of down_proj.
v is the steering vector of its block: the mean difference between right and wrong texts of what o_proj or down_proj writes,
over the tokens of the answer. mu_i is the mean of what enters W_i, over the answers of both kinds. Then

    W_i -> W_i + lambda_i u k_i^T,     u = v / |v|,     k_i = W_i^T v / |W_i^T v|,     c_i = cos(v, W_i mu_i)
    lambda_i = sign(c_i) max(|c_i| - rho s, 0) / (rho (1 - s))

The last line maximises sum_i c_i lambda_i - rho (s |lambda|_1 + (1 - s) |lambda|_2^2 / 2), an elastic net. The paper calls the
share s alpha; here alpha is a strength in all methods. It has one rho for heads and one for neurons; here both are equal.

This is no plan: an edit adds v to what is written, whatever the scale of an AU. But all components of a block share u, so
the edits of one projection are together of rank one: an adapter whose `up` is u, and whose `down` holds lambda_i k_i side
by side. For a neuron k_i is a sign, and its edit is u times a number that is added to its column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from austeer.change import Adapter, projections
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.forward import input_device
from austeer.methods.base import TOGETHER, GridPoint, Method, header_of, sites_of
from austeer.methods.choice import by_head
from austeer.methods.iti import unit
from rmodels import linear_maps
from rmodels.structural import projection_widths

RHOS = {"small": (0.6, 0.5, 0.4, 0.3, 0.2), "full": (0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15)}
SPARSITIES = {"small": (0.9, 0.8, 0.7), "full": (0.9, 0.85, 0.8, 0.75, 0.7, 0.65)}


@dataclass
class Directions:
    """Hold the directions of one projection's edits."""

    out_of: Tensor  # u, (outputs,)
    into: Tensor  # k_i, (components, inputs of each)
    importance: Tensor  # c_i, (components,)


class Steer2Edit(Method):
    name, label = "steer2edit", "Steer2Edit"
    paper = "Sun et al., arXiv 2602.09870"
    edits = "projections, by head or neuron"
    sites = ("attention", "ffn", "neuron", *TOGETHER)
    foldable = False  # it is no plan
    axes = {"rho": RHOS, "sparsity": SPARSITIES}

    def prepare(self, evidence: Evidence) -> tuple[dict[str, Directions], dict]:
        model, sites = evidence.model, sites_of(evidence.site)
        modules, directions, read = projections(model, sites), {}, {}
        for layer, inside, _, linear in linear_maps(model):
            name = linear.weight.removesuffix(".weight")
            if name not in modules:
                continue
            if inside is None:
                raise AUSteerError(f"{self.name} edits no experts; use site attention")
            if inside not in read:
                read[inside] = replace(evidence, site=inside).activations("answer")
            right, wrong = (texts[:, layer].mean(0) for texts in read[inside])
            weight = transposed_weight(model, modules[name])
            width = len(weight)  # layers may differ in width
            mean, difference = ((right + wrong) / 2)[:width], (right - wrong)[:width]
            components = by_head(mean, model.config) if inside == "attention" else mean[:, None]
            directions[name] = directions_of(weight, components, difference)
        return directions, header_of(evidence) | {"method": self.name}

    def plan(self, prepared: tuple[dict[str, Directions], dict], point: GridPoint, draw: int = 0) -> Adapter:
        directions, header = prepared
        factors, edited = {}, 0
        for name, one in directions.items():
            size = elastic_net(one.importance, point["rho"], point["sparsity"])
            factors[name] = (size[:, None] * one.into).flatten()[None], one.out_of[:, None]
            edited += int((size != 0).sum())
        return Adapter(factors, header=header | point | {"k": edited})


def directions_of(weight: Tensor, mean: Tensor, difference: Tensor) -> Directions:
    """Return the directions of one projection: weight (inputs, outputs), mean (components, inputs of each)."""
    vector = difference @ weight  # what the projection writes is linear in what enters it: a bias cancels
    parts = weight.unflatten(0, mean.shape)
    written = (parts * mean[..., None]).sum(1)
    importance = cosine_similarity(written, vector[None], dim=1)
    return Directions(unit(vector), unit(parts @ vector), importance)


def elastic_net(importance: Tensor, rho: float, sparsity: float) -> Tensor:
    return importance.sign() * (importance.abs() - rho * sparsity).clamp(min=0) / (rho * (1 - sparsity))


@torch.inference_mode()
def transposed_weight(model: PreTrainedModel, module: nn.Module) -> Tensor:
    """Return a projection's weight as (inputs, outputs), whatever its class and quantisation: its outputs for unit inputs."""
    units = torch.eye(projection_widths(module)[0], dtype=model.dtype, device=input_device(model))
    return (module(units) - module(torch.zeros_like(units[:1]))).float().cpu()


METHODS = (Steer2Edit(),)
