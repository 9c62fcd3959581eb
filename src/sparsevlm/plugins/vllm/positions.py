"""M-RoPE positions of prompts whose images hold only some of their tokens.

Kept tokens stay where they were in the grid, and text goes on behind the whole image, as if nothing were dropped. Which
tokens are kept is known when the tower has run, so their coordinates travel beside the features, in channels of the
features' dtype; the rest is known from the prompt and the sizes of its images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_BASE, _DIGITS = 256, 3  # whole numbers up to 256 are exact in bfloat16
N_CHANNELS = 3 * _DIGITS


def grid_coordinates(grid: Sequence[int], seconds: float = 1.0) -> Tensor:
    """Coordinates (time, row, column) of all tokens of an image or video from where it begins.

    Parameters
    ----------
    grid : sequence of int
        Frames, rows and columns, of tokens.
    seconds : float
        Steps of the time axis from frame to frame; their product with the number of the frame is rounded down.

    Returns
    -------
    Tensor of shape (3, n_visual), int64
    """
    frames, rows, columns = (torch.arange(n) for n in grid)
    if seconds != 1.0:
        frames = (frames.double() * seconds).long()
    return torch.stack([axis.flatten() for axis in torch.meshgrid(frames, rows, columns, indexing="ij")])


def to_channels(coordinates: Tensor, dtype: torch.dtype) -> Tensor:
    """Coordinates, (3, n), below 256³, as digits that every float dtype holds exactly, (n, 9)."""
    digits = [coordinates // _BASE**place % _BASE for place in range(_DIGITS)]
    return torch.cat(digits).T.to(dtype)


def from_channels(channels: Tensor) -> Tensor:
    """The coordinates, (3, n), int64, of which :func:`to_channels` has made digits."""
    digits = channels.T.long().view(_DIGITS, 3, -1)
    weights = torch.tensor([_BASE**place for place in range(_DIGITS)], device=digits.device)
    return (digits * weights[:, None, None]).sum(dim=0)


def prompt_positions(is_visual: Sequence[bool], extents: Sequence[int]) -> tuple[Tensor, int]:
    """Positions of a prompt: those of its text as they will be, those of its images where these begin.

    Parameters
    ----------
    is_visual : sequence of bool
        Which tokens stand for features; at least one text token stands between images.
    extents : sequence of int
        By runs of such tokens, positions that the whole image (or frame) takes.

    Returns
    -------
    positions : Tensor of shape (3, n_tokens), int64
    delta : int
        The position of the next token less the number of tokens.
    """
    left = iter(extents)
    positions: list[int] = []
    following = 0
    for visual, run in itertools.groupby(is_visual):
        n_tokens = len(list(run))
        if visual:
            positions += [following] * n_tokens
            following += next(left)
        else:
            positions += range(following, following + n_tokens)
            following += n_tokens
    return torch.tensor(positions, dtype=torch.long).repeat(3, 1), following - len(positions)


def place_visual(positions: Tensor, is_visual: Tensor, coordinates: Tensor, n_computed: int) -> Tensor:
    """Positions of a prompt with those of visual tokens that are computed now.

    Parameters
    ----------
    positions : Tensor of shape (3, n_tokens), int64
        Of :func:`prompt_positions`, or as this function has left them.
    is_visual : Tensor of shape (n_tokens,), bool
    coordinates : Tensor of shape (3, n), int64
        From where their image begins, of the first n visual tokens that are not computed yet.
    n_computed : int
        Tokens at the front whose keys and values are there.

    Returns
    -------
    Tensor of shape (3, n_tokens), int64
    """
    columns = is_visual.nonzero().squeeze(-1)
    columns = columns[columns >= n_computed][: coordinates.shape[1]]
    # An image begins one behind the text in front of it, whose positions nobody changes.
    places = torch.arange(is_visual.shape[0], device=is_visual.device)
    text = torch.where(is_visual, -1, places).cummax(0).values[columns]
    begins = torch.where(text >= 0, positions[0, text.clamp_min(0)] + 1, 0)
    positions = positions.clone()
    positions[:, columns] = begins + coordinates
    return positions
