"""STA, steering target atoms (ACL 2025): the atoms of an SAE that tell right answers from wrong ones, in size and in
how often they fire, back in the residual stream.

    a = mean over pairs of z(right) - z(wrong)          amplitude; z averaged over the answer's tokens
    f = pairs where it fires on the right answer - pairs where it fires on the wrong one
    v = (a where atom is kept) W_dec,   scaled to the norm of the mean difference of activations (CAA's vector)

An atom is kept if it is among the largest |a| and the largest |f|, and f counts only where its sign is a's. Added to
the layer that the SAE reads, times alpha, at every position. The setting `keep` is the share kept by either criterion:
STA's `trim`; EasyEdit's `trim` is 1 - keep. The answer's tokens are those that the two answers do not share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from austeer.errors import AUSteerError
from austeer.evidence import Evidence
from austeer.identity import model_header
from austeer.methods.base import Method, Settings
from austeer.plan import Plan
from austeer.sae import SITE, find_sae, token_activations
from rmodels import site_shape

KEEPS = {"small": (0.05, 0.2, 0.35), "full": (0.05, 0.1, 0.2, 0.35, 0.5)}  # the paper: 0.35
# answers that balance out, such as the A and B of copa, have a short mean difference, whose norm is matched: hence 256
ALPHAS = {"small": (1.0, 2.0, 4.0, 32.0, 256.0), "full": (0.5, 1.0, 2.0, 4.0)}  # the paper: 1


@dataclass(frozen=True)
class Atoms:
    amplitude: Tensor  # (latents,)
    frequency: Tensor  # (latents,), in pairs
    W_dec: Tensor
    norm: float  # of CAA's vector
    layer: int
    shape: tuple[int, int]  # of the site
    header: dict


@dataclass(frozen=True)
class STA(Method):
    sae: str | None = None  # for baselines.sae.find_sae

    name, label = "sta", "STA"
    paper = "STA, ACL 2025"
    edits = "one layer, shifted along SAE atoms"
    sites = (SITE,)
    foldable = False

    def grid(self, kind: str) -> list[Settings]:
        return [{"keep": keep, "alpha": alpha} for alpha, keep in product(ALPHAS[kind], KEEPS[kind])]

    def prepare(self, evidence: Evidence) -> Atoms:
        sae = find_sae(evidence, self.sae)
        differences = []

        def answers() -> Iterator[tuple[Tensor, Tensor]]:
            for _, right, wrong in token_activations(evidence, sae.layer):
                differences.append((right.float().mean(0) - wrong.float().mean(0)).cpu())
                yield sae.encode(right).mean(0), sae.encode(wrong).mean(0)

        amplitude, frequency = contrast(answers())
        if not amplitude.any():
            raise AUSteerError("no atom of the SAE fires differently on right and wrong answers; is it of this model?")
        norm = float(torch.stack(differences).mean(0).norm())
        header = {**model_header(evidence.model), "method": self.name, "sae": sae.header.get("source", self.sae)}
        shape = site_shape(evidence.model, SITE)
        return Atoms(amplitude.cpu(), frequency.cpu(), sae.W_dec.cpu(), norm, sae.layer, shape, header)

    def plan(self, prepared: Atoms, settings: Settings, draw: int = 0) -> Plan:
        kept = keep_atoms(prepared.amplitude, prepared.frequency, settings["keep"])
        shift = torch.zeros(prepared.shape)
        shift[prepared.layer] = settings["alpha"] * target_vector(
            prepared.amplitude, kept, prepared.W_dec, prepared.norm
        )
        return Plan({}, {SITE: shift}, "all", {**prepared.header, **settings, "atoms": int(kept.sum())})


def contrast(answers: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Amplitude and frequency from every pair's z(right) and z(wrong), each (latents,)."""
    amplitude, frequency, pairs = 0, 0, 0
    for right, wrong in answers:
        amplitude = amplitude + (right.double() - wrong.double())
        frequency = frequency + ((right > 0).long() - (wrong > 0).long())
        pairs += 1
    return amplitude / pairs, frequency


def scores(amplitude: Tensor, frequency: Tensor) -> Tensor:
    """Frequency where its sign is the amplitude's, else zero; 1 at most.

    (Theirs is min-max normalised first, which changes nothing once one atom of the SAE is silent.)
    """
    agreed = torch.where(amplitude.sign() == frequency.sign(), frequency, 0).double()
    return agreed / frequency.abs().max().clamp(min=1)


def keep_atoms(amplitude: Tensor, frequency: Tensor, keep: float) -> Tensor:
    """In the best share `keep` by score and by amplitude. Ties at a threshold are kept: where fewer atoms than that
    have a score at all, its threshold is zero and it filters nothing, signs included."""
    if not 0 < keep < 1:
        raise AUSteerError(f"keep is the share of atoms kept, above 0 and below 1, not {keep}")
    sizes = scores(amplitude, frequency).abs(), amplitude.abs()
    by_frequency, by_amplitude = (size >= size.sort(descending=True).values[int(keep * len(size))] for size in sizes)
    return by_frequency & by_amplitude


def target_vector(amplitude: Tensor, kept: Tensor, W_dec: Tensor, norm: float) -> Tensor:
    """Of this norm; zero where no kept atom has an amplitude."""
    vector = torch.where(kept, amplitude, 0).to(W_dec) @ W_dec
    length = vector.norm()
    return vector * (norm / length) if length > 0 else vector


METHODS = (STA(),)
