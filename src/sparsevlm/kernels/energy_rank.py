"""Energy ranks of several matrices, on their device and without waiting for it.

The rank asks how the eigenvalues of the Gram matrix add up, not for eigenvectors: a tridiagonal form and counts of the
eigenvalues above some points tell it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton

# Longest short side that the Triton version takes: one program reads the Gram matrix once for each of its rows.
LARGEST = 1024
# Smaller ones ask for more than float32 can tell.
LEAST_TOLERANCE = 1e-4
# Sums of equal terms must not miss a threshold that they meet exactly: relative, in float64.
_ROUNDING = 1e-12


def is_quick(like: Tensor, shape: tuple[int, int], tolerance: float | str) -> bool:
    """Tells whether ranks of matrices of this shape, beside a tensor, are found without waiting for the device."""
    resolved = not isinstance(tolerance, str) and tolerance >= LEAST_TOLERANCE
    return resolved and 0 < min(shape) <= LARGEST and use_triton(like)


def sketch_rank(matrices: Tensor, tolerance: float | str) -> Tensor:
    """Smallest r whose top singular values hold (1 − tolerance) of the energy Σσ², of each matrix.

    The ranks are those of :func:`sparsevlm.selection.rank.sketch_rank`. On a CUDA device, with a tolerance of at least
    :data:`LEAST_TOLERANCE` and a short side up to :data:`LARGEST`, nothing is waited for, and eigenvalues are found in
    float32: a rank may then differ where the leading values that it counts, or one less, hold a share of the energy
    within 1e-5 of (1 − tolerance). Otherwise eigenvalues are computed in float64, and the device is waited for.

    Parameters
    ----------
    matrices : Tensor of shape (batch, n_raters, n_visual), float32
        Rows and columns beyond what a sample has are zero.
    tolerance : float in (0, 1) or "machine"
        Energy left out, or the numerical rank: σ > σ_max · max(n_raters, n_visual) · eps(float32).

    Returns
    -------
    Tensor of shape (batch,), int64
        0 for a zero matrix, -1 for one that holds NaN or infinity.
    """
    if not isinstance(tolerance, str) and is_quick(matrices, (matrices.shape[1], matrices.shape[2]), tolerance):
        from .triton.energy_rank import sketch_rank as triton_version

        return triton_version(matrices, tolerance)
    return sketch_rank_plain(matrices, tolerance)


def sketch_rank_plain(matrices: Tensor, tolerance: float | str) -> Tensor:
    """The same from all eigenvalues."""
    if matrices.numel() == 0:
        return torch.zeros(matrices.shape[0], dtype=torch.int64, device=matrices.device)
    products = gram_matrices(matrices)
    energy = products.diagonal(dim1=1, dim2=2).sum(dim=1)
    usable = energy.isfinite() & (energy > 0)
    share = torch.where(usable[:, None, None], products / energy[:, None, None], 0.0)
    eigenvalues = torch.linalg.eigvalsh(share).flip(1).clamp_min(0.0)
    if isinstance(tolerance, str):
        cutoff = max(matrices.shape[1:]) * torch.finfo(torch.float32).eps
        ranks = (eigenvalues > eigenvalues[:, :1] * cutoff**2).sum(dim=1)
    else:
        wanted = (1.0 - tolerance) * (1.0 - _ROUNDING)
        ranks = ((eigenvalues.cumsum(dim=1) < wanted).sum(dim=1) + 1).clamp_max(eigenvalues.shape[1])
    return torch.where(usable, ranks, torch.where(energy.isfinite(), 0, -1))


def gram_matrices(matrices: Tensor) -> Tensor:
    """Gram matrices of the shorter side, (batch, n, n), in float64."""
    short = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    short = short.double()
    return short @ short.mT
