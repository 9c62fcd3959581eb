"""Greedy subset selection: farthest points, determinantal point process, coverage.

Each step picks ``argmax_i gain_i`` among the tokens that are left, ties to the lower index, and updates the gains by
what the picked token changes. On a GPU one kernel makes all picks, from a matrix of all pairs, as long as that fits in
bounded memory; what runs here step by step holds none, however many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.coverage import coverage
from ..kernels.dispatch import use_triton
from ..kernels.farthest_points import farthest_points as farthest_points_of_gram
from ..kernels.gram_matrix import gram_matrix
from ..kernels.pivoted_cholesky import pivoted_cholesky
from ..kernels.pivoted_cholesky import spanning_picks as spanning_picks_of_gram
from .similarity import cosines, row_chunks

# Cosines are exact to about 1e-7 in float32: what is nearer to 0 than this is 0, so that identical tokens tie.
_NOISE = 1e-6
# Gains of coverage, as a share of the largest: rounding of float64 sums must not rank what has nothing to add.
_NO_GAIN = 1e-12
# Values that are always held: 64 Mi float32 = 256 MiB, all pairs of 8192 tokens.
_MAX_HELD_ELEMENTS = 1 << 26
# Products of all rows: 256 Mi float32 = 1 GiB, 16384 tokens.
_MAX_GRAM_ELEMENTS = 1 << 28


def farthest_points(unit: Tensor, n_keep: int) -> Tensor:
    """Greedy max-min diversity: ``argmax_i min_{j∈S} d_ij`` with ``d_ij = 1 − cos(x_i, x_j)``.

    The first pick has the largest distance to its nearest neighbour. O(n²) products for it, O(n) per further pick.

    Parameters
    ----------
    unit : Tensor of shape (n, size)
        From :func:`~sparsevlm.selection.similarity.unit_rows`.
    n_keep : int
        In [1, n).

    Returns
    -------
    Tensor of shape (n_keep,), int64
        Sorted.
    """
    n = unit.shape[0]
    if use_triton(unit) and n**2 <= _MAX_GRAM_ELEMENTS:
        valid = torch.ones((1, n), dtype=torch.bool, device=unit.device)
        return farthest_points_of_gram(gram_matrix(unit[None]), valid, n_keep, _NOISE)[0].sort().values
    nearest = []
    for rows in row_chunks(n, n):
        similarity = unit[rows] @ unit.T
        similarity.diagonal(offset=rows.start).fill_(-torch.inf)
        nearest.append(similarity.amax(dim=-1))
    gain, distance = _distance(torch.cat(nearest)), unit.new_full((n,), torch.inf)
    picks = _Picks(unit, n_keep)
    for step in range(n_keep):
        pick = picks.take(step, gain)
        gain = distance = torch.minimum(distance, _distance(unit @ unit.index_select(0, pick).squeeze(0)))
    return picks.sorted()


def farthest_points_padded(unit: Tensor, valid: Tensor, n_keep: int) -> Tensor:
    """:func:`farthest_points` of samples filled up to one size, without waiting for any value of the device.

    Parameters
    ----------
    unit : Tensor of shape (batch, n, size)
        From :func:`~sparsevlm.selection.similarity.padded_unit_rows`.
    valid : Tensor of shape (batch, n), bool
    n_keep : int
        In [1, n].

    Returns
    -------
    Tensor of shape (batch, n_keep), int64
        In the order of the picks, rows that fill up behind.
    """
    orders = [
        farthest_points_of_gram(gram_matrix(unit[some]), valid[some], n_keep, _NOISE)
        for some in _samples_at_once(unit.shape[0], unit.shape[1] ** 2, _MAX_GRAM_ELEMENTS)
    ]
    return torch.cat(orders)


def _samples_at_once(batch: int, n_elements: int, most: int) -> list[slice]:
    """Slices of a batch, each sample of which takes ``n_elements`` out of ``most``."""
    at_once = max(1, most // n_elements)
    return [slice(first, first + at_once) for first in range(0, batch, at_once)]


def dpp_map(rows: Tensor, quality: Tensor, n_keep: int, rounds: bool = False) -> Tensor:
    """The picks of :func:`dpp_order` in the order of the tokens, by :func:`dpp_order_by_gram` where that pays."""
    return _dpp_search(rows, quality, n_keep, rounds).sort(dim=-1).values


def _dpp_search(rows: Tensor, quality: Tensor, n_keep: int, rounds: bool) -> Tensor:
    search = dpp_order_by_gram if gram_pays(rows) else dpp_order
    return search(rows, quality, n_keep, rounds)


def gram_pays(rows: Tensor) -> bool:
    """Tells whether rows are on a GPU, and the products of all take little memory: that of 8192, or twice the rows'."""
    n, size = rows.shape[-2:]
    return rows.is_cuda and (n <= 2 * size or n**2 <= _MAX_HELD_ELEMENTS)


def dpp_order(
    rows: Tensor,
    quality: Tensor,
    n_keep: int,
    rounds: bool = False,
    ends: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Greedy MAP of the determinantal point process with kernel ``L = diag(r) · X Xᵀ · diag(r)``.

    ``det L_{S+i} / det L_S = r_i² δ_i``, where δ_i is what the picked directions leave of x_i: its squared distance
    from their span. It is kept up to date by Gram-Schmidt on the picked rows, which is the incremental Cholesky
    factor of Chen et al. (arXiv 1709.05135, algorithm 1) for a kernel of inner products, in memory O(n_keep · size)
    instead of O(n_keep · n). With r = 1 these are the pivots of a QR decomposition of Xᵀ with column pivoting (Businger
    and Golub 1965). Once the picks span every token all determinants are 0; the quality then decides.

    Parameters
    ----------
    rows : Tensor of shape (..., n, size), float32
        X. From :func:`~sparsevlm.selection.similarity.unit_rows`, ``X Xᵀ`` holds the cosines.
    quality : Tensor of shape (..., n), float32
        r, in [0, 1].
    n_keep : int
        In [1, n).
    rounds : bool
        Once the picks span every token, go on as if none had been picked: what is left of the longest rows comes
        first again, copies of earlier picks among them.
    ends : tuple of Tensor of shape (...,), optional
        As ``enough``, ``least`` and ``most`` of :func:`~sparsevlm.kernels.pivoted_cholesky.spanning_picks`: the picks
        end where no row has more left than ``enough``, with -1 behind them. Each pick waits for the device.

    Returns
    -------
    Tensor of shape (..., n_keep), int64
        In the order in which they were picked, so that fewer are a part from the left. Rows of length 0 and quality 0
        come last: a batch may be filled up with them.
    """
    if rows.ndim > 2 and rows.device.type == "cpu":  # where batched products of one vector each are the slower way
        alone = [
            dpp_order(own, rated, n_keep, rounds, None if ends is None else (ends[0][b], ends[1][b], ends[2][b]))
            for b, (own, rated) in enumerate(zip(rows, quality, strict=True))
        ]
        return torch.stack(alone)
    residual = length = torch.linalg.vector_norm(rows, dim=-1).square()
    batch, size = rows.shape[:-2], rows.shape[-1]
    basis, in_round = rows.new_zeros((*batch, n_keep, size)), rows.new_ones((*batch, 1, n_keep))
    picks = _Picks(rows, n_keep)
    stops = length.new_full(batch, n_keep, dtype=torch.int64) if ends is None else ends[2]
    for step in range(n_keep):
        spanned = residual <= _NOISE * length
        if ends is not None:
            is_over = residual.masked_fill(picks.taken | spanned, 0.0).amax(dim=-1) <= ends[0]
            stops = torch.where(is_over, torch.minimum(stops, ends[1].clamp_min(step)), stops)
            if bool((stops <= step).all()):
                break
        if rounds:
            over = (spanned | picks.taken).all(dim=-1, keepdim=True)
            residual = torch.where(over, length, residual)
            in_round[..., :step].masked_fill_(over.unsqueeze(-1), 0.0)
            spanned = residual <= _NOISE * length
        pick = picks.take(step, torch.where(spanned, quality - 2.0, quality.square() * residual))
        direction = rows.gather(-2, pick.unsqueeze(-1).expand(*batch, 1, size))
        earlier = basis[..., :step, :]
        for _ in range(2):  # once leaves rounding errors in the direction of earlier picks
            direction = direction - (direction @ earlier.mT * in_round[..., :step]) @ earlier
        direction /= direction.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        basis[..., step : step + 1, :] = direction.masked_fill(spanned.gather(-1, pick).unsqueeze(-1), 0.0)
        residual = residual - (rows @ basis[..., step, :, None]).squeeze(-1).square()
    if ends is not None:
        picks.order.masked_fill_(torch.arange(n_keep, device=rows.device) >= stops.unsqueeze(-1), -1)
    return picks.order


def dpp_order_by_gram(
    rows: Tensor, quality: Tensor, n_keep: int, rounds: bool = False, counts: Tensor | None = None
) -> Tensor:
    """As :func:`dpp_order`, from the products of all rows: one kernel for all picks where Triton runs.

    For more tokens than their products fit in memory this is :func:`dpp_order` itself. ``counts``, of shape (...,),
    int64: picks of each sample that are looked at; those behind may be any rows.
    """
    n = rows.shape[-2]
    if n**2 > _MAX_GRAM_ELEMENTS:
        return dpp_order(rows, quality, n_keep, rounds)
    flat, ratings = rows.reshape(-1, n, rows.shape[-1]), quality.reshape(-1, n)
    stops = None if counts is None else counts.reshape(-1)
    orders = [
        pivoted_cholesky(
            gram_matrix(flat[some]), ratings[some], n_keep, rounds, _NOISE, None if stops is None else stops[some]
        )
        for some in _samples_at_once(flat.shape[0], n**2, _MAX_GRAM_ELEMENTS)
    ]
    together = orders[0] if len(orders) == 1 else torch.cat(orders)
    return together.reshape(*rows.shape[:-2], n_keep)


def spanning_picks(
    rows: Tensor, n_valid: Tensor, unexplained: float, least: Tensor, most: Tensor, n_picks: int
) -> tuple[Tensor, Tensor]:
    """The picks of :func:`dpp_order` in rounds, all of quality 1, until little is left of any row.

    On a GPU without waiting for it, as long as the products of all rows fit in memory.

    Parameters
    ----------
    rows : Tensor of shape (batch, n, size), float32
    n_valid : Tensor of shape (batch,), int64
        Rows of each sample; those that fill it up are 0.
    unexplained : float
        Squared length that may be left of a row, relative to the mean of the sample's rows.
    least, most : Tensor of shape (batch,), int64
        Picks of each sample at least and at most; ``most`` wins.
    n_picks : int
        No sample has more; in [1, n].

    Returns
    -------
    order : Tensor of shape (batch, n_picks), int64
        Behind the picks of a sample anything.
    counts : Tensor of shape (batch,), int64
        How many picks there are.
    """
    total, n_pairs = torch.linalg.vector_norm(rows, dim=-1).square().sum(dim=-1), rows.shape[1] ** 2
    enough = max(unexplained, _NOISE) * total / n_valid.clamp_min(1)
    if not rows.is_cuda or n_pairs > _MAX_GRAM_ELEMENTS:
        order = dpp_order(rows, rows.new_ones(rows.shape[:2]), n_picks, True, (enough, least, most))
        return order, (order >= 0).sum(dim=-1)
    parts = [
        spanning_picks_of_gram(gram_matrix(rows[some]), enough[some], least[some], most[some], n_picks, _NOISE)
        for some in _samples_at_once(rows.shape[0], n_pairs, _MAX_GRAM_ELEMENTS)
    ]
    orders, counts = zip(*parts, strict=True)
    return torch.cat(orders), torch.cat(counts)


def cover(
    covered: Tensor,
    unit: Tensor,
    n_keep: int,
    factor: Tensor | None = None,
    value: Callable[[Tensor, Tensor | slice], Tensor] | None = None,
) -> Tensor:
    """Greedy facility location: ``gain_i = factor_i · Σ_u max(0, v_ui − cur_u)``, ``cur_u = max(0, max_{j∈S} v_uj)``.

    A pick j lowers the gains only through the rows u that it covers better than all before, about n_covered / |S| of
    them, and only these are looked at: all steps together cost O(n_covered · n · log n_keep). Without the kernel, how
    many they are has to be known on the host: one synchronisation per step, far cheaper than reading all pairs.

    Parameters
    ----------
    covered : Tensor of shape (n_covered, size)
        What is to be covered, from :func:`~sparsevlm.selection.similarity.unit_rows`.
    unit : Tensor of shape (n, size)
        The candidates, likewise.
    n_keep : int
        In [1, n).
    factor : Tensor of shape (n,), float32, optional
        Weight of a candidate's gain, not negative.
    value : callable, optional
        ``value(cosine, rows)`` makes v from the cosines of the rows ``rows`` (indices or a slice) of ``covered``, of
        shape (n_rows, n_candidates). Without it v is the cosine.

    Returns
    -------
    Tensor of shape (n_keep,), int64
        Sorted.
    """
    if use_triton(unit) and covered.shape[0] * unit.shape[0] <= _MAX_HELD_ELEMENTS:
        cosine = cosines(covered, unit)
        held = (cosine if value is None else value(cosine, slice(None)))[None]
        weight = (unit.new_ones(unit.shape[0]) if factor is None else factor)[None]
        valid = torch.ones_like(weight, dtype=torch.bool)
        return coverage(held, weight, valid, n_keep, _NO_GAIN)[0].sort().values
    values = _Values(covered, unit, value)
    everything = torch.arange(covered.shape[0], device=unit.device)
    current = unit.new_zeros(covered.shape[0])
    gain = values.sum_between(everything, current, current.new_full(current.shape, torch.inf))
    nothing = _NO_GAIN * gain.max()
    picks = _Picks(unit, n_keep)
    for step in range(n_keep):
        score = torch.where(gain > nothing, gain, 0.0)
        pick = picks.take(step, score if factor is None else score * factor)
        reached = values.column(pick)
        better = (reached > current).nonzero().squeeze(-1)
        gain -= values.sum_between(better, current[better], reached[better])
        current = torch.maximum(current, reached)
    return picks.sorted()


def cover_padded(
    covered: Tensor,
    unit: Tensor,
    valid: Tensor,
    n_keep: int,
    factor: Tensor | None = None,
    value: Callable[[Tensor, slice], Tensor] | None = None,
) -> Tensor:
    """:func:`cover` of samples filled up to one size, without waiting for any value of the device.

    All values are held, whatever memory they take; those of several samples, where these fit.

    Parameters
    ----------
    covered : Tensor of shape (batch, n_covered, size)
        What is to be covered; rows that fill up are 0.
    unit : Tensor of shape (batch, n, size)
        From :func:`~sparsevlm.selection.similarity.padded_unit_rows`.
    valid : Tensor of shape (batch, n), bool
    n_keep : int
        In [1, n].
    factor : Tensor of shape (batch, n), float32, optional
    value : callable, optional
        ``value(cosine, samples)`` makes v, 0 for rows that fill up, from cosines of shape (n_samples, n_covered, n),
        which it may overwrite.

    Returns
    -------
    Tensor of shape (batch, n_keep), int64
        In the order of the picks, rows that fill up behind.
    """
    orders = []
    weight = valid.float() if factor is None else factor
    for some in _samples_at_once(unit.shape[0], covered.shape[1] * unit.shape[1], _MAX_HELD_ELEMENTS):
        rows = unit[some]
        cosine = gram_matrix(rows if covered is unit else covered[some], rows)
        values = cosine if value is None else value(cosine, some)
        orders.append(coverage(values, weight[some], valid[some], n_keep, _NO_GAIN))
    return torch.cat(orders)


class _Values:
    """The values v_ui, as many rows held as fit in memory, the others computed when they are asked for."""

    def __init__(self, covered: Tensor, unit: Tensor, value: Callable[[Tensor, Tensor | slice], Tensor] | None):
        self._covered, self._unit, self._value = covered, unit, value
        n_held = min(covered.shape[0], _MAX_HELD_ELEMENTS // unit.shape[0])
        self._held = unit.new_empty((n_held, unit.shape[0]))
        for chunk in row_chunks(n_held, unit.shape[0]):
            self._held[chunk] = self._compute(chunk, unit)

    def column(self, pick: Tensor) -> Tensor:
        """v_ui of all rows u for one candidate, given as a tensor of shape (1,)."""
        later = slice(self._held.shape[0], self._covered.shape[0])
        computed = self._compute(later, self._unit.index_select(0, pick))
        return torch.cat([self._held.index_select(1, pick), computed]).squeeze(-1)

    def sum_between(self, rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``Σ_u max(0, min(v_ui, high_u) − low_u)`` over some rows u, ascending; float64 of shape (n,)."""
        total = self._unit.new_zeros(self._unit.shape[0], dtype=torch.float64)
        for chunk in row_chunks(rows.shape[0], self._unit.shape[0]):
            part = torch.minimum(self._rows(rows[chunk]), high[chunk, None]).double()
            total += (part - low[chunk, None]).clamp_min_(0).sum(dim=0)
        return total

    def _rows(self, rows: Tensor) -> Tensor:
        n_held = self._held.shape[0]
        if n_held == self._covered.shape[0]:
            return self._held[rows]
        return torch.cat([self._held[rows[rows < n_held]], self._compute(rows[rows >= n_held], self._unit)])

    def _compute(self, rows: Tensor | slice, candidates: Tensor) -> Tensor:
        cosine = self._covered[rows] @ candidates.T
        return cosine if self._value is None else self._value(cosine, rows)


class _Picks:
    """The tokens picked so far, out of rows of shape (..., n, size); all on the device, so that a step waits for
    nothing."""

    def __init__(self, rows: Tensor, n_keep: int):
        batch, n = rows.shape[:-2], rows.shape[-2]
        self.order = torch.empty((*batch, n_keep), dtype=torch.long, device=rows.device)
        self.taken = torch.zeros((*batch, n), dtype=torch.bool, device=rows.device)

    def take(self, step: int, gain: Tensor) -> Tensor:
        """Pick the largest gain, of shape (..., n), among those that are left, as a tensor of shape (..., 1)."""
        pick = gain.masked_fill(self.taken, -torch.inf).argmax(dim=-1, keepdim=True)
        self.taken.scatter_(-1, pick, True)
        self.order[..., step : step + 1] = pick
        return pick

    def sorted(self) -> Tensor:
        """The picks in the order of the tokens."""
        return self.order.sort(dim=-1).values


def _distance(cosine: Tensor) -> Tensor:
    return torch.nn.functional.threshold(1.0 - cosine, _NOISE, 0.0)
