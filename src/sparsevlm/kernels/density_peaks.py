"""Density peaks of several samples filled up to one size, out of the products of their centred states.

Squared distances are ``|p_i|² + |p_j|² − 2 p_i · p_j``; what rounding leaves of none is none, and none is exactly 0.
Products come in blocks of rows: ``first`` is the index of the first row of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton
from .score_order import place_by_score_reference

# Sums of products are exact to about 1e-7 in float32: squared distances below this share of the lengths are none.
NOISE = 1e-6


def centred_points(states: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """States minus their mean over √hidden_size, and their squared lengths; 0 where a row only fills up.

    Parameters
    ----------
    states : Tensor of shape (batch, n, hidden_size)
    valid : Tensor of shape (batch, n), bool

    Returns
    -------
    points : Tensor of the same shape, float32
    squares : Tensor of shape (batch, n), float32
    """
    if use_triton(states):
        from .triton.density_peaks import centred_points as triton_version

        return triton_version(states, valid)
    return centred_points_reference(states, valid)


def centred_points_reference(states: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    counting = torch.where(valid[..., None], states.float(), 0.0)
    mean = counting.sum(dim=1, keepdim=True) / valid.sum(dim=1).clamp_min(1)[:, None, None]
    points = torch.where(valid[..., None], counting - mean, 0.0) / states.shape[-1] ** 0.5
    return points, points.square().sum(dim=-1)


def log_densities(
    products: Tensor, squares: Tensor, valid: Tensor, n_clusters: Tensor, most: int, first: int
) -> Tensor:
    """``log ρ_i = −1/k Σ_{kNN} d_ij²`` for the k = ``n_clusters`` nearest, or all others if these are fewer.

    Sums are taken in float64: rows with the same distances are equally dense in whichever order these come.

    Parameters
    ----------
    products : Tensor of shape (batch, n_rows, n), float32
        Of some rows with all.
    squares : Tensor of shape (batch, n), float32
    valid : Tensor of shape (batch, n), bool
    n_clusters : Tensor of shape (batch,), int64
        At most ``most``.
    most, first : int

    Returns
    -------
    Tensor of shape (batch, n_rows), float32
        Any number for rows that only fill up; -inf where there is no other.
    """
    if use_triton(products):
        from .triton.density_peaks import log_densities as triton_version

        return triton_version(products, squares, valid, n_clusters, first)
    return log_densities_reference(products, squares, valid, n_clusters, most, first)


def log_densities_reference(
    products: Tensor, squares: Tensor, valid: Tensor, n_clusters: Tensor, most: int, first: int
) -> Tensor:
    """Reference in plain torch."""
    n = products.shape[2]
    k = torch.minimum(n_clusters, valid.sum(dim=1) - 1).clamp_min(1)
    if n == 1:
        return torch.full_like(products[..., 0], -torch.inf)
    most_near = max(1, min(most, n - 1))
    near = torch.arange(most_near, device=k.device) < k[:, None]
    distances = _squared_distances(products, squares, first).masked_fill_(~valid[:, None], torch.inf)
    nearest = distances.topk(most_near + 1, dim=-1, largest=False).values[..., 1:]
    total = torch.where(near[:, None], nearest, 0.0).sum(dim=-1, dtype=torch.float64)
    return -(total / k[:, None]).float()


def peak_scores(products: Tensor, squares: Tensor, valid: Tensor, log_density: Tensor, first: int) -> Tensor:
    """``log ρ_i + log δ_i``, δ the distance to the nearest denser row, or of the densest to the farthest.

    Of equally dense rows those with the lower index count as denser.

    Parameters
    ----------
    products : Tensor of shape (batch, n_rows, n), float32
        Of some rows with all.
    squares, log_density : Tensor of shape (batch, n), float32
    valid : Tensor of shape (batch, n), bool
        False for rows that only fill a sample up, behind the others.
    first : int

    Returns
    -------
    Tensor of shape (batch, n_rows), float32
        Any number for rows that only fill up.
    """
    if use_triton(products):
        from .triton.density_peaks import peak_scores as triton_version

        return triton_version(products, squares, valid, log_density, first)
    return peak_scores_reference(products, squares, valid, log_density, first)


def peak_scores_reference(products: Tensor, squares: Tensor, valid: Tensor, log_density: Tensor, first: int) -> Tensor:
    """Reference in plain torch."""
    rows = slice(first, first + products.shape[1])
    # Place 0 is the densest; the stable sort breaks ties by index, so that "denser" is a strict order.
    place = place_by_score_reference(log_density, valid)
    distances = _squared_distances(products, squares, first)
    denser = (place[:, None, :] < place[:, rows, None]) & valid[:, None]
    nearest = distances.masked_fill(~denser, torch.inf).amin(dim=-1)
    farthest = distances.masked_fill(~valid[:, None], 0.0).amax(dim=-1)
    separation = torch.where(place[:, rows] == 0, farthest, nearest)
    return (log_density[:, rows].double() + 0.5 * separation.double().log()).float()


def _squared_distances(products: Tensor, squares: Tensor, first: int) -> Tensor:
    """Of some rows to all, (batch, n_rows, n)."""
    rows = slice(first, first + products.shape[1])
    lengths = squares[:, rows, None] + squares[:, None]
    distances = lengths - 2.0 * products
    distances.masked_fill_(distances <= NOISE * lengths, 0.0)
    columns = torch.arange(products.shape[2], device=products.device)
    return distances.masked_fill_(columns[rows, None] == columns, 0.0)
