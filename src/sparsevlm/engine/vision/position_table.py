"""Learned positions of a square of patches, interpolated to images of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def interpolated(table: nn.Embedding, positions: Tensor, sizes: Tensor) -> Tensor:
    """Position embeddings of patches: bilinear between four learned ones, corners on corners; waits for nothing.

    The numbers are those of transformers' ``get_vision_interpolation_indices_and_weights``, which makes them where the
    grids are.

    Parameters
    ----------
    table : nn.Embedding
        Of ``side²`` positions, row by row.
    positions, sizes : Tensor of shape (n_patches, 2), int64
        Row and column of each patch, and how many of both its image has.

    Returns
    -------
    Tensor of shape (n_patches, size), float32
        Or in what the table has, if that is wider.
    """
    side = math.isqrt(table.num_embeddings)
    exact = positions.float() * (side - 1) / (sizes - 1).clamp_min(1)
    below = exact.floor()
    places = below.long()[..., None] + torch.arange(2, device=positions.device)
    weights = (1 - (exact[..., None] - places).abs()).clamp_min(0)
    (row, column), (row_weight, column_weight) = places.clamp(0, side - 1).unbind(1), weights.unbind(1)
    index = (row[:, :, None] * side + column[:, None, :]).flatten(1)
    weight = (row_weight[:, :, None] * column_weight[:, None, :]).flatten(1)
    return (table(index) * weight[..., None]).sum(dim=1)
