"""EoRA (Liu et al., 2024): compensate pruning by a low-rank matrix beside each Linear, without training.

What pruning took from a Linear is E = W_dense - W_pruned. Of all matrices B A of rank r, EoRA takes the one that leaves
the smallest error on the inputs X that the Linear sees, || (E - B A) X^T ||. With the eigenvectors Q and eigenvalues L of
X^T X, that error is || (E - B A) Q sqrt(L) ||, so B A is the truncated SVD of E Q sqrt(L), taken back by 1/sqrt(L) Q^T.

Inputs are those of the pruned model, with no Linear compensated yet. The pruned weights stay sparse; each Linear costs
two thin products more.
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
    """Return the factors of every Linear of the decoder blocks. Of a smaller rank they are the first rows and columns."""
    originals = {name: linear.weight for block in linears_of(dense) for name, linear in block.items()}
    factors = {}
    for block in through_blocks(pruned, calibration, "EoRA"):
        grams = block.grams()
        for name, linear in block.linears.items():
            lost = originals[name].to(grams[name]) - linear.weight.to(grams[name])
            factors[name] = tuple(factor.to(linear.weight) for factor in best_factors(lost, grams[name], rank))
    return factors


def best_factors(lost: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B for which B A is nearest to `lost` on inputs with these second moments."""
    values, vectors = torch.linalg.eigh(gram)
    seen = values > values.max() * torch.finfo(values.dtype).eps * len(values)  # directions in which any input lies
    root = vectors[:, seen] * values[seen].sqrt()
    left, sizes, right = torch.linalg.svd(lost @ root, full_matrices=False)
    inverse = (vectors[:, seen] / values[seen].sqrt()).T
    return right[:rank] @ inverse, left[:, :rank] * sizes[:rank]


@contextmanager
def compensated(model: PreTrainedModel, factors: Factors, rank: int) -> Iterator[PreTrainedModel]:
    """Add the factors to the Linears' outputs for the length of a `with`."""
    with ExitStack() as undo:
        for block in linears_of(model):
            for name, linear in block.items():
                a, b = factors[name]

                def add(linear, args, out, a=a[:rank], b=b[:, :rank]):
                    return out + (args[0] @ a.T) @ b.T

                undo.callback(linear.register_forward_hook(add).remove)
        yield model
