"""STA, steering target atoms (ACL 2025): SAE atoms that tell right answers from wrong ones, both by how strongly and by
how often they fire, are decoded and added to the residual stream.

    a = mean over pairs of z(right) - z(wrong)          amplitude; z averaged over the answer's tokens
    f = pairs where it fires on the right answer - pairs where it fires on the wrong one
    v = (a of the atoms kept) W_dec,   scaled to the norm of the mean difference of activations (CAA's vector)

An atom is kept if it is among the largest |a| and the largest |f|, where f counts only if its sign is a's. alpha v
is added to the layer that the SAE reads, at every position. `keep` is the share kept by each criterion: STA's `trim`;
EasyEdit's `trim` is 1 - keep. The answer's tokens are those that the two texts do not share.

preset="original" reads the pairs in the model's chat format, if it has one, and takes the authors' keep and alpha
without a search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from austeer.chat import is_in_chat, pairs_in_chat
from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.methods.base import GridPoint, Method, every_kind, is_original
from austeer.plan import Plan
from austeer.sae import SITE, files_beside, find_sae, token_activations
from rmodels import site_shape

KEEPS = {"small": (0.05, 0.2, 0.35), "full": (0.05, 0.1, 0.2, 0.35, 0.5)}  # the paper: 0.35
# answers that balance out, such as copa's A and B, have a short mean difference, whose norm v takes: hence 256
ALPHAS = {"small": (1.0, 2.0, 4.0, 32.0, 256.0), "full": (0.5, 1.0, 2.0, 4.0)}  # the paper: 1


@dataclass(frozen=True)
class Atoms:
    amplitude: Tensor  # (latents,)
    frequency: Tensor  # (latents,), the difference between two counts of pairs
    W_dec: Tensor
    norm: float  # the length of CAA's vector
    layer: int
    shape: tuple[int, int]  # (layers, width) of the site
    header: dict


class STA(Method):
    name, label = "sta", "STA"
    paper = "STA, ACL 2025"
    edits = "one layer, shifted along SAE atoms"
    sites = (SITE,)
    foldable = False
    axes = {"keep": KEEPS, "alpha": ALPHAS}

    def __init__(self, sae: str | None = None, preset: str | None = None):
        """Take options: sae is the name that `austeer.sae.find_sae` looks up."""
        self.sae, self.preset = sae, preset
        if is_original(preset):
            self.axes = every_kind(keep=(0.35,), alpha=(1.0,))

    def grid(self, kind: str) -> list[GridPoint]:
        return sorted(super().grid(kind), key=lambda point: point["alpha"])  # gentlest first: all vectors are as long

    def files(self, model):
        return {} if self.sae else files_beside(model)

    def prepare(self, evidence: Evidence) -> Atoms:
        sae = find_sae(evidence, self.sae)
        texts = in_chat(evidence) if self.preset else evidence
        differences = []

        def answers() -> Iterator[tuple[Tensor, Tensor]]:
            for _, right, wrong in token_activations(texts, sae.layer):
                differences.append((right.float().mean(0) - wrong.float().mean(0)).cpu())
                yield sae.encode(right).mean(0).cpu(), sae.encode(wrong).mean(0).cpu()

        amplitude, frequency = contrast(answers())
        if not amplitude.any():
            raise AUSteerError("no atom of the SAE fires differently on right and wrong answers; is it of this model?")
        norm = float(torch.stack(differences).mean(0).norm())
        header = evidence.header() | {"method": self.name, "sae": sae.header.get("source", self.sae)}
        shape = site_shape(evidence.model, SITE)
        return Atoms(amplitude, frequency, sae.W_dec.cpu(), norm, sae.layer, shape, header)

    def plan(self, prepared: Atoms, point: GridPoint, draw: int = 0) -> Plan:
        atoms = keep_atoms(prepared.amplitude, prepared.frequency, point["keep"])
        shift = torch.zeros(prepared.shape)
        shift[prepared.layer] = point["alpha"] * target_vector(prepared.amplitude, atoms, prepared.W_dec, prepared.norm)
        return Plan({}, {SITE: shift}, "all", {**prepared.header, **point, "atoms": int(atoms.sum())})


def in_chat(evidence: Evidence) -> Evidence:
    """Return the pairs in the model's chat format, or as they are if it has none, or if a task put them there already."""
    tokenizer, pairs = evidence.tokenizer, evidence.pairs
    if not tokenizer.chat_template or is_in_chat(tokenizer, pairs[0].prompt):
        return evidence
    return replace(evidence, pairs=pairs_in_chat(tokenizer, pairs))


def contrast(answers: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return amplitude and frequency from every pair's z(right) and z(wrong), each (latents,)."""
    amplitude, frequency, pairs = 0, 0, 0
    for right, wrong in answers:
        amplitude = amplitude + (right.double() - wrong.double())
        frequency = frequency + ((right > 0).long() - (wrong > 0).long())
        pairs += 1
    return amplitude / pairs, frequency


def scores(amplitude: Tensor, frequency: Tensor) -> Tensor:
    """Return the frequency where it has the amplitude's sign, else zero; 1 at most.

    (The authors first normalise it by min and max, which changes nothing if at least one atom is silent.)
    """
    agreeing = torch.where(amplitude.sign() == frequency.sign(), frequency, 0).double()
    return agreeing / frequency.abs().max().clamp(min=1)


def keep_atoms(amplitude: Tensor, frequency: Tensor, keep: float) -> Tensor:
    """Mark the atoms that are in the best share `keep` both by score and by amplitude. Ties at a threshold are kept: if
    fewer atoms have a score, its threshold is zero and it filters nothing, not even by sign."""
    if not 0 < keep < 1:
        raise AUSteerError(f"keep, the share of atoms kept, must be above 0 and below 1, not {keep}")
    sizes = scores(amplitude, frequency).abs(), amplitude.abs()
    by_frequency, by_amplitude = (size >= size.sort(descending=True).values[int(keep * len(size))] for size in sizes)
    return by_frequency & by_amplitude


def target_vector(amplitude: Tensor, atoms: Tensor, W_dec: Tensor, norm: float) -> Tensor:
    """Decode these atoms into a vector of this norm, or zero if none of them has an amplitude."""
    vector = torch.where(atoms, amplitude, 0).to(W_dec) @ W_dec
    length = vector.norm()
    return vector * (norm / length) if length > 0 else vector


METHODS = (STA(),)
