"""EoRA (Liu et al., 2024): compensate pruning by a low-rank matrix beside each Linear, without training.

What pruning took from a Linear is E = W_dense - W_pruned. Of all matrices B A of rank r, EoRA takes the one that leaves
the smallest error on the inputs X that the Linear sees, || (E - B A) X^T ||. With the eigenvectors Q and eigenvalues L of
X^T X, that error is || (E - B A) Q sqrt(L) ||, so B A is the truncated SVD of E Q sqrt(L), taken back by 1/sqrt(L) Q^T.

X is what a Linear sees in the pruned model, before anything is compensated. The pruned weights stay sparse, and every
Linear needs two additional thin matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer.pruning.blocks import linears_of, through_blocks

Factors = dict[str, tuple[Tensor, Tensor]]  # Linear -> A (rank, inputs) and B (outputs, rank)


@torch.no_grad()
def eora(dense: PreTrainedModel, pruned: PreTrainedModel, calibration: Sequence[Sequence[int]], rank: int) -> Factors:
    """Return A and B for every Linear of the decoder blocks. For a smaller rank, take their first rows and columns."""
    originals = {name: linear.weight for block in linears_of(dense) for name, linear in block.items()}
    factors = {}
    for block in through_blocks(pruned, calibration, "EoRA"):
        grams = block.grams()
        for name, linear in block.linears.items():
            lost = originals[name].to(grams[name]) - linear.weight.to(grams[name])
            factors[name] = tuple(factor.to(linear.weight) for factor in best_factors(lost, grams[name], rank))
    return factors


def best_factors(lost: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the A and B whose product B A is closest to `lost` on inputs with these second moments."""
    values, vectors = torch.linalg.eigh(gram)
    seen = values > values.max() * torch.finfo(values.dtype).eps * len(values)  # directions in which any input lies
    root = vectors[:, seen] * values[seen].sqrt()
    left, sizes, right = torch.linalg.svd(lost @ root, full_matrices=False)
    inverse = (vectors[:, seen] / values[seen].sqrt()).T
    return right[:rank] @ inverse, left[:, :rank] * sizes[:rank]


@contextmanager
def compensated(model: PreTrainedModel, factors: Factors, rank: int) -> Iterator[PreTrainedModel]:
    """Add the low-rank compensation to the output of every Linear while the context is open."""
    with ExitStack() as undo:
        for block in linears_of(model):
            for name, linear in block.items():
                a, b = factors[name]

                def add(linear, args, out, a=a[:rank], b=b[:, :rank]):
                    return out + (args[0] @ a.T) @ b.T

                undo.callback(linear.register_forward_hook(add).remove)
        yield model
