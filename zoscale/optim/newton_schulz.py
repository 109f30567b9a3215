"""Orthogonalisation of matrices: A = U S V^T to about U V^T, by Newton-Schulz iteration or of the dominant part."""

import math
from typing import Literal

import torch
from torch import Tensor

from zoscale.optim.power_iteration import partially_orthogonalize

Iteration = Literal["quintic", "cubic", "power"]
Scale = Literal["none", "spectral", "rms"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
_CUBIC = (1.5, -0.5, 0.0)
_EPS = 1e-7


def orthogonalize(matrix: Tensor, *, iteration: Iteration = "quintic", power_rank: int = 16) -> Tensor:
    """The nearly orthonormal factor of a matrix, or of each of many; a zero matrix gives zero.

    Quintic (Muon, K. Jordan 2024; 5 iterations): singular values above 0.01 of the Frobenius norm land in [0.68, 1.13].
    Cubic (arXiv 2506.04430; 10 iterations): slower, converges to 1. Power (arXiv 2605.09034): the dominant singular
    directions only, see `partially_orthogonalize`.

    Args:
        matrix: [..., m, n], floating point; in 16 bits every product is rounded.
        iteration: the polynomial, or `power`.
        power_rank: singular directions that `power` keeps.

    Returns:
        [..., m, n] of the same dtype.
    """
    if iteration == "power":
        return partially_orthogonalize(matrix, rank=power_rank)
    (a, b, c), num_iterations = (_QUINTIC, 5) if iteration == "quintic" else (_CUBIC, 10)
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + _EPS)).reshape(-1, *x.shape[-2:])
    for _ in range(num_iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram, x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)


def update_scale(rows: int, columns: int, scale: Scale) -> float:
    """The factor of the orthogonalised update of an m x n matrix.

    `none`: 1 (arXiv 2506.04430); `spectral`: sqrt(max(1, m / n)) (Muon); `rms`: 0.2 sqrt(max(m, n)), which matches the
    root mean square of AdamW's updates (arXiv 2502.16982).
    """
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    if scale == "rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return 1.0
