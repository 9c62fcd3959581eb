"""Farthest points of a Gram matrix: each pick is the row of the largest distance to the picks before it."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton

# Squared length below which a row is similar to nothing.
_LEAST_LENGTH = 1e-30


def farthest_points(gram: Tensor, valid: Tensor, n_keep: int, noise: float) -> Tensor:
    """``argmax_i min_{j∈S} d_ij`` with ``d_ij = 1 − x_i · x_j / (‖x_i‖ ‖x_j‖)``; ties to the lower index.

    The first pick has the largest distance to its nearest neighbour. Waits for no value of the device.

    Parameters
    ----------
    gram : Tensor of shape (batch, n, n), float32
        Of rows of any length, which it is divided by: the products may come with an error in common, as those of
        :func:`~sparsevlm.kernels.gram_matrix.gram_matrix` do. A row of length 0 has distance 1 to all.
    valid : Tensor of shape (batch, n), bool
        False for rows that only fill a sample up: they are no neighbours, and picked after all others, in order.
    n_keep : int
        In [1, n].
    noise : float
        Distances up to this are 0.

    Returns
    -------
    Tensor of shape (batch, n_keep), int64
        In the order of the picks.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(_LEAST_LENGTH).rsqrt()
    if use_triton(gram):
        from .triton.farthest_points import farthest_points as triton_version

        return triton_version(gram, scale, valid, n_keep, noise)
    return farthest_points_reference(gram, scale, valid, n_keep, noise)


def farthest_points_reference(gram: Tensor, scale: Tensor, valid: Tensor, n_keep: int, noise: float) -> Tensor:
    """Reference in plain torch.

    Parameters
    ----------
    gram, valid, n_keep, noise
        As in :func:`farthest_points`.
    scale : Tensor of shape (batch, n), float32
        One over the length of each row.
    """
    batch, n = valid.shape
    order = torch.empty((batch, n_keep), dtype=torch.int64, device=gram.device)
    itself = torch.eye(n, dtype=torch.bool, device=gram.device)
    cosine = gram * scale[:, :, None] * scale[:, None, :]
    nearest = cosine.masked_fill(itself | ~valid[:, None], -torch.inf).amax(dim=-1)
    # Rows that fill up are nearer than any other, and picked ones nearer than those.
    distance = torch.where(valid, torch.inf, -1.0)
    gain = torch.where(valid, _distance(nearest, noise), distance)
    for step in range(n_keep):
        pick = gain.argmax(dim=-1, keepdim=True)
        order[:, step] = pick[:, 0]
        similarity = gram.gather(1, pick[:, None].expand(-1, 1, n))[:, 0] * scale * scale.gather(1, pick)
        distance = torch.minimum(distance, _distance(similarity, noise)).scatter(1, pick, -2.0)
        gain = distance
    return order


def _distance(cosine: Tensor, noise: float) -> Tensor:
    return torch.nn.functional.threshold(1.0 - cosine, noise, 0.0)
