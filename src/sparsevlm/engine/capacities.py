"""Capacities: the few sizes that programs are made for."""

from __future__ import annotations

from collections.abc import Iterator

# Up to this many rows capacities are multiples of the step, above there are eight to an octave.
_STEP, STEPPED = 64, 1024
MOST_TILES = 32  # of a tower that is recorded as it is: more keep a GPU busy for longer than it takes to launch them


def row_capacity(n_rows: int) -> int:
    """The smallest capacity of at least ``n_rows``: at most 63 rows, or an eighth, are left empty."""
    step = max(_STEP, 1 << max(0, (n_rows - 1).bit_length() - 4)) if n_rows > STEPPED else _STEP
    return max(step, -(-n_rows // step) * step)


def capacities(most: int) -> Iterator[int]:
    """All capacities, up to that of ``most`` rows."""
    rows = 0
    while rows < most:
        rows = row_capacity(rows + 1)
        yield rows


def power_of_two(n: int) -> int:
    """The smallest power of two of at least ``n``: batches, and rows of the longest of several samples."""
    return 1 << max(0, n - 1).bit_length()


def tile_capacity(n_tiles: int) -> int:
    """The smallest capacity of at least ``n_tiles``: exact up to eight, above there are four to an octave."""
    step = 1 << max(0, (n_tiles - 1).bit_length() - 3)
    return -(-n_tiles // step) * step
