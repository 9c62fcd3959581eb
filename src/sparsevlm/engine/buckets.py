"""Sizes that programs are made for."""

from __future__ import annotations


def round_up(n: int) -> int:
    """To a multiple of 16, or of an eighth of the power of two below: at most an eighth is left empty."""
    step = step_of(n)
    return -(-n // step) * step


def step_of(n: int) -> int:
    """Distance of the buckets around ``n``."""
    return max(16, 1 << max(0, n.bit_length() - 4))
