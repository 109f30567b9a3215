"""Partial orthogonalisation by power iteration: A = U S V^T to U_k V_k^T of its k largest singular values."""

import torch
from torch import Tensor

from zoscale.noise.generator import Key, Noise, Range

_SWEEPS = 3
_NOISE = 1e-5  # singular values below this share of the largest are the rounding of the arithmetic
_TINY = torch.finfo(torch.float32).tiny


def partially_orthogonalize(matrix: Tensor, *, rank: int) -> Tensor:
    """U V^T over the dominant singular directions of a matrix, or of each of many; a zero matrix gives zero.

    ZO-MOPI (arXiv 2605.09034): V <- QR(A^T (A V)), U from A V. Full orthogonalisation lifts the noise of an estimate to
    the size of its signal; this leaves the small directions out. The paper keeps V from step to step, sweeps once and
    normalises the columns of A V. Here V starts from the same Gaussian each time and is swept `_SWEEPS` times, so
    there is nothing to store, shard or restore; U is the polar factor of A V, which is the same once V has converged
    and needs V's span alone before. On a GPU the host waits for the singular values, once for all matrices.

    Args:
        matrix: [..., m, n], floating point; the arithmetic is float32.
        rank: number k of singular directions; of a smaller matrix, all.

    Returns:
        [..., m, n] of the same dtype, of rank k at most, its non-zero singular values about 1.
    """
    k = min(rank, *matrix.shape[-2:])
    (start,) = Noise(0).normal(Key(0), [Range(0, 0, matrix.shape[-1] * k)], matrix.device)
    v = start.view(-1, k)
    a = matrix.float()
    a = a / a.abs().amax((-2, -1), keepdim=True).clamp(min=_TINY)
    for _ in range(_SWEEPS):
        v = torch.linalg.qr(a.mT @ (a @ v)).Q
    left, values, right = torch.linalg.svd(a @ v, full_matrices=False)
    kept = values > _NOISE * values.amax(-1, keepdim=True)
    found: Tensor = (left * kept[..., None, :]) @ right @ v.mT
    return found.to(matrix.dtype)
