"""Seed ranges and the counter-based random numbers behind every scene.

A scene is a pure function of its seed. Drawing needs no generator state: each value is an integer hash of
(seed, stream name, counter), so one scene and a batch of scenes, on any device, see the same numbers, and a new
property of a scene gets its own stream without shifting the others.
"""

import zlib

import torch

HOLDOUT_SEEDS = range(0, 1_000_000)
TRAINING_SEEDS = range(1_000_000, 2**48)

_MASK = 0xFFFFFFFF


def holdout_seeds(start: int, count: int) -> torch.Tensor:
    """Consecutive seeds for evaluation and demos, never used in training.

    Returns
    -------
    torch.Tensor
        int64 of shape (count,).

    Raises
    ------
    ValueError
        If the seeds leave ``HOLDOUT_SEEDS``.
    """
    return _seed_range(start, count, HOLDOUT_SEEDS, "hold-out")


def training_seeds(start: int, count: int) -> torch.Tensor:
    """Consecutive seeds for training, disjoint from the hold-out ones; same contract as :func:`holdout_seeds`."""
    return _seed_range(start, count, TRAINING_SEEDS, "training")


def _seed_range(start: int, count: int, allowed: range, purpose: str) -> torch.Tensor:
    if count < 1 or start < allowed.start or start + count > allowed.stop:
        raise ValueError(
            f"{purpose} seeds must lie in [{allowed.start}, {allowed.stop}), got {count} from {start}; "
            "training and hold-out scenes are kept apart by these ranges"
        )
    return torch.arange(start, start + count, dtype=torch.int64)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """One round of a 32-bit integer hash held in int64.

    Both multipliers are below 2**31, so no product overflows int64 and the result is the same on every device.
    """
    state = ((state ^ (state >> 16)) * 0x21F0AAAD) & _MASK
    state = ((state ^ (state >> 15)) * 0x735A2D97) & _MASK
    return state ^ (state >> 15)


class Draws:
    """Named streams of random integers for a batch of seeds.

    Parameters
    ----------
    seeds : torch.Tensor
        int64 of shape (batch,), each in [0, 2**48).
    picture : int
        Unlike streams for several pictures of one seed.
    """

    def __init__(self, seeds: torch.Tensor, picture: int = 0):
        self._state = _mix(_mix((seeds & _MASK) ^ 0x5BD1E995) ^ (seeds >> 32))
        if picture:
            self._state = _mix(self._state ^ picture * 0x1B873593)

    def bits(self, stream: str, *shape: int) -> torch.Tensor:
        """Raw 32-bit values, int64 of shape (batch, *shape)."""
        count = int(torch.Size(shape).numel())
        keyed = _mix(self._state ^ zlib.crc32(stream.encode()))
        counter = torch.arange(count, device=keyed.device) * 0x9E3779B1 & _MASK
        return _mix(_mix(keyed[:, None] ^ counter)).reshape(-1, *shape)

    def integers(self, stream: str, low: int, high: int | torch.Tensor, *shape: int) -> torch.Tensor:
        """Integers in [low, high), int64 of shape (batch, *shape); ``high`` may be a tensor that broadcasts to it."""
        return low + (self.bits(stream, *shape) * (high - low) >> 32)

    def order_keys(self, stream: str, count: int) -> torch.Tensor:
        """Distinct sort keys, int64 of shape (batch, count): their argsort is a random permutation."""
        return self.bits(stream, count) * count + torch.arange(count, device=self._state.device)

    def permutation(self, stream: str, count: int) -> torch.Tensor:
        """Random permutations of range(count), int64 of shape (batch, count)."""
        return self.order_keys(stream, count).argsort(dim=1)
