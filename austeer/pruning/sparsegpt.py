"""SparseGPT (Frantar and Alistarh, ICML 2023): zero a weight, and let the weights to its right make up for it.

One row w of a Linear, with inputs X (a row per token) and H = X^T X: removing w_q changes the output least if the other
weights move by -w_q / [H^-1]_qq times column q of H^-1; the output's squared error then grows by w_q^2 / [H^-1]_qq
(Optimal Brain Surgeon). SparseGPT goes through the columns from left to right and lets only those to the right move, so
that all rows share one inverse per column, of H without the columns passed. Row q of the upper Cholesky factor U of
H^-1 holds what column q needs: [H^-1]_qq = U_qq^2, and its column is U_qq U_q.

A share is chosen among the errors of 128 columns and all rows at once; n:m at the first column of each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from austeer.pruning.masks import Sparsity, lowest

COLUMNS = 128  # whose mask is chosen together, and whose errors move the columns behind them in one product
DAMPING = 0.01  # of the mean of H's diagonal, added to it


def sparsegpt(weight: Tensor, gram: Tensor, sparsity: Sparsity, columns: int = COLUMNS) -> Tensor:
    """Return the pruned weight, (outputs, inputs), in the dtype and at the place of the given one. gram: X^T X."""
    new = weight.to(gram.device, gram.dtype, copy=True)
    dead = gram.diagonal() == 0  # features that are never on: their weights do nothing
    new[:, dead] = 0
    factor = inverse_factor(gram, dead)
    group = sparsity[1] if isinstance(sparsity, tuple) else 1
    step = max(group, columns // group * group)  # no group lies across two blocks of columns
    for start in range(0, new.shape[1], step):
        end = min(start + step, new.shape[1])
        part, own = new[:, start:end], factor[start:end, start:end]  # part is a view: changed in place
        scale = own.diagonal().square()
        if group == 1:
            mask = lowest(part.square() / scale, sparsity, by_row=False)
        else:
            mask = torch.zeros_like(part, dtype=torch.bool)
        errors = torch.zeros_like(part)
        for column in range(end - start):
            if group > 1 and column % group == 0:
                near = slice(column, column + group)
                mask[:, near] = lowest(part[:, near].square() / scale[near], sparsity, by_row=True)
            errors[:, column] = part[:, column] * mask[:, column] / own[column, column]
            part[:, column:] -= errors[:, column, None] * own[column, column:]
        part[mask] = 0  # what rounding left
        new[:, end:] -= errors @ factor[start:end, end:]
    return new.to(weight.device, weight.dtype)


def inverse_factor(gram: Tensor, dead: Tensor) -> Tensor:
    """Return U, upper triangular, with U^T U = H^-1 for the damped H."""
    damped = gram + torch.diag(dead.to(gram.dtype) + DAMPING * gram.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
