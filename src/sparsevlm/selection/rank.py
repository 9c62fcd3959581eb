"""Rank of the rater attention: a deterministic sketch that agrees with the singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import energy_rank as kernel
from .similarity import NOT_FINITE

_SKETCH_WIDTH = 64
_DIRECT_SIZE = 4 * _SKETCH_WIDTH
_POWER_STEPS = 3
_ROUNDING = 1e-12  # float64 sums of equal terms must not miss a threshold that they meet exactly


def sketch_ranks(matrices: Sequence[Tensor], tolerance: float | str) -> list[int]:
    """:func:`sketch_rank` of several matrices.

    On a CUDA device they are computed together and waited for once, in the precision that
    :func:`sparsevlm.kernels.energy_rank.sketch_rank` tells of.

    Parameters
    ----------
    matrices : sequence of Tensor of shape (n_raters, n_visual)
        On one device; shapes may differ.
    tolerance : float in (0, 1) or "machine"

    Returns
    -------
    list of int

    Raises
    ------
    ValueError
        If a matrix holds NaN or infinity.
    """
    if not matrices:
        return []
    height, width = (max(matrix.shape[side] for matrix in matrices) for side in (0, 1))
    if isinstance(tolerance, str) or not kernel.is_quick(matrices[0], (height, width), tolerance):
        return [sketch_rank(matrix, tolerance) for matrix in matrices]
    together = matrices[0].new_zeros((len(matrices), height, width), dtype=torch.float32)
    for place, matrix in zip(together, matrices, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    ranks = kernel.sketch_rank(together, tolerance).tolist()
    if min(ranks) < 0:
        raise ValueError(NOT_FINITE)
    return ranks


def sketch_rank(matrix: Tensor, tolerance: float | str) -> int:
    """Smallest r whose top singular values hold (1 − tolerance) of the energy Σσ².

    Works on the Gram matrix G of the shorter side in float64, whose trace is the total energy. A short side up to
    256 is diagonalised as it is. A longer one is sketched: block power iteration from a fixed cosine basis Q gives
    Ritz values, whose leading sums never exceed those of the eigenvalues (Ky Fan). With B the part of GQ outside Q
    and C the rest of G, the leading m eigenvalues sum to at most the leading m Ritz values plus √m ‖B‖_F as long as
    trace(C) is below the m-th Ritz value. The sketch answers only when these two bounds prove the rank; otherwise
    all eigenvalues are computed. The result is therefore that of an SVD, and the same in every run.

    Parameters
    ----------
    matrix : Tensor of shape (n_raters, n_visual)
        Finite; float16 and bfloat16 are taken as they are and computed in float64.
    tolerance : float in (0, 1) or "machine"
        Energy left out, or the numerical rank: σ > σ_max · max(shape) · eps(float32), as ``matrix_rank`` has it.

    Returns
    -------
    int
        0 for a zero or empty matrix.

    Raises
    ------
    ValueError
        If the matrix holds NaN or infinity.

    Source: the paper (sparsification level adaptation) takes rank(P); the energy threshold is ours, as a softmax
    matrix is nearly always of full numerical rank.
    """
    if matrix.numel() == 0:
        return 0
    gram = _gram(matrix)
    energy = float(gram.diagonal().sum())
    if not math.isfinite(energy):
        raise ValueError(NOT_FINITE)
    if energy <= 0.0:
        return 0
    if tolerance == "machine":
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
        cutoff = max(matrix.shape) * torch.finfo(torch.float32).eps
        return int((eigenvalues > eigenvalues[0] * cutoff**2).sum())
    wanted = (1.0 - float(tolerance)) * energy * (1.0 - _ROUNDING)
    if gram.shape[0] > _DIRECT_SIZE:
        certified = _certified_rank(gram, wanted)
        if certified is not None:
            return certified
    return _count_to(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0), wanted)


def _gram(matrix: Tensor) -> Tensor:
    """Gram matrix of the shorter side, float64, scaled so that tiny attention does not underflow."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    short = short.double()
    peak = short.abs().amax()
    if bool(peak > 0):
        short = short / peak
    return short @ short.T


def _count_to(eigenvalues: Tensor, wanted: float) -> int:
    """Number of leading values whose sum reaches ``wanted``."""
    short_of = torch.cumsum(eigenvalues, dim=0) < wanted
    return min(int(short_of.sum()) + 1, eigenvalues.shape[0])


def _certified_rank(gram: Tensor, wanted: float) -> int | None:
    """Rank proven by a sketch of the spectrum, or None where the sketch cannot tell."""
    size = gram.shape[0]
    grid = torch.arange(size, device=gram.device, dtype=gram.dtype) + 0.5
    frequencies = torch.arange(_SKETCH_WIDTH, device=gram.device, dtype=gram.dtype)
    basis = torch.cos(math.pi / size * grid[:, None] * frequencies[None, :])
    # A sketch that stands orthogonal to a leading direction would miss it; the largest row of the matrix adds it.
    basis[:, 0] += gram[:, int(gram.diagonal().argmax())]
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(gram @ basis).Q
    image = gram @ basis
    ritz, vectors = torch.linalg.eigh(basis.T @ image)
    ritz, vectors = ritz.flip(0), vectors.flip(1)
    lower = torch.cumsum(ritz, dim=0)
    reached = lower >= wanted
    if not bool(reached.any()):
        return None
    rank = int((~reached).sum()) + 1
    residual = image @ vectors - (basis @ vectors) * ritz
    outside = float(torch.linalg.matrix_norm(residual, ord="fro"))
    rest = float(gram.diagonal().sum()) - float(lower[-1])
    if rank > 1:
        upper = float(lower[rank - 2]) + math.sqrt(rank - 1) * outside
        if upper >= wanted or rest > float(ritz[rank - 2]):
            return None
    return rank
