"""Mark the weights with the lowest scores: a share of them, or n of every m neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

Sparsity = float | tuple[int, int]  # a share of the weights, or (n, m): n zeros of every m


def lowest(score: Tensor, sparsity: Sparsity, by_row: bool) -> Tensor:
    """Mark the lowest scores of a matrix; among ties the first ones, so that the count is exact.

    by_row: a share is that of each row, not of the matrix; n:m is always within rows.
    """
    if isinstance(sparsity, tuple):
        groups, count = score.reshape(-1, sparsity[1]), sparsity[0]
    else:
        groups = score if by_row else score.reshape(1, -1)
        count = int(groups.shape[1] * sparsity)
    places = groups.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, places, True).view_as(score)
