"""A few tokens of every image of a sample at least, within the number that goes on.

A selector that compares the tokens of all images of a sample may keep nothing of one of them (a blank one, say). So
every image has a floor. Along an order of picks this has a closed form, :func:`choose_by_order`, which takes a batch
and waits for no value of the device; a selector without an order is asked again, by :func:`keep_of_every_image`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .context import Selection


def floors_within(left: Tensor, n_keep: Tensor, min_keep: Tensor) -> Tensor:
    """Floors of the images of each sample: ``min(min_keep, left)``, or even shares of ``n_keep`` if that is less.

    Even shares are ``min(ℓ, floor)`` with the largest ℓ whose sum fits in ``n_keep``, and one more for the first images
    that lack some until all of ``n_keep`` is shared out: 4, 1 and 4 in 7 become 3, 1 and 3; in 8, 4, 1 and 3.

    Parameters
    ----------
    left : Tensor of shape (n_samples, n_images), int64
        Tokens of each image that are left; 0 for places without an image.
    n_keep, min_keep : Tensor of shape (n_samples,), int64
        Tokens of a sample that go on, and the floor that is asked for.

    Returns
    -------
    Tensor of shape (n_samples, n_images), int64
        Their sum is at most ``n_keep``.
    """
    floors, n_keep = torch.minimum(left, min_keep[:, None]), n_keep[:, None]
    n_images = floors.shape[1]
    # With the j smallest floors in full, ⌊(n_keep − their sum) / (n_images − j)⌋ is left for each other: ℓ for some j.
    smallest = floors.sort(dim=1).values
    others = n_images - torch.arange(n_images, device=left.device)
    level = ((n_keep - smallest.cumsum(dim=1) + smallest) // others).amax(dim=1, keepdim=True)
    shares = torch.minimum(floors, level)
    lacking = floors > level
    shares += lacking & (lacking.cumsum(dim=1) <= n_keep - shares.sum(dim=1, keepdim=True))
    return torch.where(floors.sum(dim=1, keepdim=True) > n_keep, shares, floors)


def choose_by_order(
    picks: Tensor, image_idx: Tensor, valid: Tensor, n_keep: Tensor, min_keep: Tensor, n_images: int
) -> Tensor:
    """Choice along an order of picks, with a floor for every image.

    A pick is taken if its image is below its floor, or if fewer than ``n_keep − Σ floors`` others were taken. What an
    image still lacks after the first ``n_keep`` picks is filled up by :func:`fill_up`.

    Parameters
    ----------
    picks : Tensor of shape (n_samples, n_picks), int64
        Rows, the best first. The first ``n_keep`` of a sample are distinct and valid, later ones are not looked at.
    image_idx : Tensor of shape (n_samples, n_visual), int64
        Image of each row, below ``n_images``.
    valid : Tensor of shape (n_samples, n_visual), bool
        False for rows that only fill a sample up.
    n_keep : Tensor of shape (n_samples,), int64
        At most the number of valid rows.
    min_keep : Tensor of shape (n_samples,), int64
        0 for samples without floors, whose choice is the first ``n_keep`` picks.
    n_images : int

    Returns
    -------
    Tensor of shape (n_samples, n_visual), bool
        True for ``n_keep`` rows of each sample.
    """
    n_visual = image_idx.shape[1]
    floors = floors_within(count_per_image(image_idx, valid, n_images), n_keep, min_keep)
    walked = torch.arange(picks.shape[1], device=picks.device) < n_keep[:, None]
    of_pick = image_idx.gather(1, torch.where(walked, picks, 0))
    reserved = walked & (_place_in_image(of_pick, walked, n_images) < floors.gather(1, of_pick))
    other = walked & ~reserved
    free = n_keep[:, None] - floors.sum(dim=1, keepdim=True)
    taken = reserved | (other & (other.cumsum(dim=1) <= free))
    # Picks that are not taken are written to one place behind the end.
    chosen = valid.new_zeros((valid.shape[0], n_visual + 1))
    chosen = chosen.scatter(1, torch.where(taken, picks, n_visual), True)[:, :n_visual]
    return fill_up(chosen, image_idx, valid, floors)


def fill_up(chosen: Tensor, image_idx: Tensor, valid: Tensor, floors: Tensor) -> Tensor:
    """Add to the chosen rows what images lack of their floors, evenly spaced over their other rows.

    Parameters
    ----------
    chosen, valid : Tensor of shape (n_samples, n_visual), bool
    image_idx : Tensor of shape (n_samples, n_visual), int64
    floors : Tensor of shape (n_samples, n_images), int64
        At most the number of valid rows of an image.

    Returns
    -------
    Tensor of shape (n_samples, n_visual), bool
    """
    n_images, rest = floors.shape[1], valid & ~chosen
    lacking = (floors - count_per_image(image_idx, chosen, n_images)).clamp_min(0).gather(1, image_idx)
    n_rest = count_per_image(image_idx, rest, n_images).gather(1, image_idx)
    return chosen | (rest & evenly_spaced(_place_in_image(image_idx, rest, n_images), n_rest, lacking))


def evenly_spaced(place: Tensor, n: Tensor, k: Tensor) -> Tensor:
    """Membership in ``k`` of ``n`` places in even steps: ⌊(i + ½) n / k⌋ for i in 0..k − 1, as the selector ``grid``.

    ``k`` ≤ ``n``. Whole numbers only: ``c(j) = ⌊(2 k j + n − 1) / 2n⌋`` of these places lie below j.

    Parameters
    ----------
    place, n, k : Tensor of int64
        Of one shape, or such that broadcast.

    Returns
    -------
    Tensor of bool
    """
    n = n.clamp_min(1)
    return (2 * k * (place + 1) + n - 1) // (2 * n) > (2 * k * place + n - 1) // (2 * n)


def keep_of_every_image(
    first: Selection, ask: Callable[[Tensor, int], Selection], image_idx: Tensor, floors: Sequence[int]
) -> Selection:
    """Selection with a floor for every image, by a selector that has no order.

    Images of which too few are kept are set apart: the selector is asked for the rest of the number among the rest of
    the rows, until that leaves no other image short, and for the floor of each image that is set apart among its rows
    alone. At most one round per image; each asks for fewer rows than there are.

    Parameters
    ----------
    first : Selection
        What the selector keeps of all rows.
    ask : callable
        ``ask(rows, k)`` gives the checked selection of ``k`` of some rows, as indices into them; 1 ≤ k < their number.
    image_idx : Tensor of shape (n_visual,), int64
        Image of each row.
    floors : sequence of int
        Of each image, at most its number of rows; in all at most the number of kept rows.

    Returns
    -------
    Selection
        Of as many rows as ``first``. A recycled row counts for the image in whose place it goes on.
    """
    n_images, k = len(floors), first.keep_idx.shape[0]
    rows, selection, apart = torch.arange(image_idx.shape[0], device=image_idx.device), first, []
    while True:
        kept = torch.bincount(image_idx[rows[selection.keep_idx]], minlength=n_images).tolist()
        short = [i for i in range(n_images) if i not in apart and kept[i] < floors[i]]
        if not short:
            break
        apart += short
        k -= sum(floors[i] for i in short)
        rows = (~torch.isin(image_idx, image_idx.new_tensor(apart))).nonzero().squeeze(-1)
        selection = ask(rows, k) if k else Selection(rows[:0])
    if not apart:
        return first
    parts = [(rows, selection)]
    for i in sorted(apart):
        own = (image_idx == i).nonzero().squeeze(-1)
        all_of_it = torch.arange(own.shape[0], device=own.device)
        parts.append((own, ask(own, floors[i]) if floors[i] < own.shape[0] else Selection(all_of_it)))
    return _joined(parts, image_idx.shape[0])


def _joined(parts: list[tuple[Tensor, Selection]], n_visual: int) -> Selection:
    """One selection out of those of disjoint rows."""
    keep_idx = torch.cat([rows[one.keep_idx] for rows, one in parts]).sort().values
    recycled = [rows[one.recycled_idx] for rows, one in parts if one.recycled_idx is not None]
    recycled_idx = torch.cat(recycled) if recycled else None
    if all(one.merge_target is None for _, one in parts):
        return Selection(keep_idx, recycled_idx=recycled_idx)
    target = keep_idx.new_full((n_visual,), -1)
    target[keep_idx] = keep_idx
    weight = (target >= 0).float()
    for rows, one in parts:
        if one.merge_target is not None and one.weight is not None:
            target[rows] = torch.where(one.merge_target >= 0, rows[one.merge_target.clamp_min(0)], -1)
            weight[rows] = one.weight
    return Selection(keep_idx, target, weight, recycled_idx)


def count_per_image(image_idx: Tensor, counts: Tensor, n_images: int) -> Tensor:
    """Rows of each image that count, (n_samples, n_images)."""
    return image_idx.new_zeros((image_idx.shape[0], n_images)).scatter_add(1, image_idx, counts.long())


def _place_in_image(image_idx: Tensor, counts: Tensor, n_images: int) -> Tensor:
    """How many earlier rows of its image count, for each row that counts itself, (n_samples, n)."""
    # By a stable sort: a cumulative sum over (n_samples, n, n_images) would take n_images times the memory.
    group = torch.where(counts, image_idx, n_images)
    ordered, order = group.sort(dim=1, stable=True)
    sizes = group.new_zeros((group.shape[0], n_images + 1)).scatter_add(1, group, torch.ones_like(group))
    starts = sizes.cumsum(dim=1) - sizes
    place = torch.arange(group.shape[1], device=group.device) - starts.gather(1, ordered)
    return torch.empty_like(group).scatter_(1, order, place)
