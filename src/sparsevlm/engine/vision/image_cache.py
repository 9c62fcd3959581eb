"""Encoded images that are kept over calls, by their pixels."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...models import Grid
from .program import VisionOutput, VisionPrograms
from .tables import Grids

# Independent sums of a digest on the device, of 64 bits each.
_SUMS = 4
_HALF = 0xFFFFFFFF
# Bytes of the widened pixels that are hashed at once.
_CHUNK_BYTES = 1 << 27
# Numbers of each matrix that are compared from call to call.
_SAMPLED = 64

Key = tuple[bytes, Grid, torch.dtype]


class PixelDigest:
    """Digests of images: SHA-256 on the host; on a device sums of products with random numbers.

    There, the 32-bit words of a row are multiplied by random numbers of 64 bits and summed, modulo 2**64, and so are
    the halves of the rows' sums: images that differ have the same sum with a probability of at most 2**-32 (multilinear
    hashing: Lemire and Kaser, "Strongly universal string hashing is fast", section 2), and all four sums with 2**-128.
    The numbers are drawn anew in every process, so that nobody can make pixels for them.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._of_words = torch.zeros((0, _SUMS), dtype=torch.int64, device=device)
        self._of_rows = torch.zeros((0, 2 * _SUMS), dtype=torch.int64, device=device)

    def __call__(self, patches: Tensor, sizes: Sequence[int], flag: Tensor) -> tuple[list[bytes], bool]:
        """Digest images, waiting for the device once.

        Parameters
        ----------
        patches : Tensor of shape (n_patches, size)
        sizes : sequence of int
            Patches of each image.
        flag : Tensor of shape (), bool
            Read with the same wait.

        Returns
        -------
        digests : list of bytes
        flag : bool
        """
        patches = patches.contiguous()
        if patches.device.type == "cpu":
            images = (image.view(torch.uint8).numpy() for image in patches.split(list(sizes)))
            return [hashlib.sha256(image.data).digest() for image in images], bool(flag)
        read = torch.cat([self.sums(patches, sizes).flatten(), flag.long().view(1)]).cpu()
        return [one.numpy().tobytes() for one in read[:-1].split(_SUMS)], bool(read[-1])

    def sums(self, patches: Tensor, sizes: Sequence[int]) -> Tensor:
        """The sums of every image, (n_images, 4), int64, modulo 2**64; waits for nothing."""
        words = patches.view(torch.int32 if patches.shape[1] * patches.element_size() % 4 == 0 else torch.uint8)
        self._of_words = _at_least(self._of_words, words.shape[1])
        self._of_rows = _at_least(self._of_rows, max(sizes))
        of_words = self._of_words[: words.shape[1]].T
        by_row = []
        for part in words.split(max(1, _CHUNK_BYTES // (8 * words.shape[1]))):
            some = part.long()
            by_row.append(torch.stack([(some * numbers).sum(dim=1) for numbers in of_words], dim=1))
        sums = torch.cat(by_row)
        halves = torch.cat([sums & _HALF, (sums >> 32) & _HALF], dim=1)
        products = halves * torch.cat([self._of_rows[:size] for size in sizes])
        running = products.unflatten(1, (2, _SUMS)).sum(dim=1).cumsum(dim=0)
        ends = running[[end - 1 for end in itertools.accumulate(sizes)]]
        return ends.diff(dim=0, prepend=ends.new_zeros(1, _SUMS))


def _at_least(numbers: Tensor, n: int) -> Tensor:
    """Random numbers with at least ``n`` rows: those that there are, and new ones."""
    missing = n - numbers.shape[0]
    if missing <= 0:
        return numbers
    drawn = torch.frombuffer(bytearray(os.urandom(8 * missing * numbers.shape[1])), dtype=torch.int64)
    return torch.cat([numbers, drawn.view(missing, -1).to(numbers.device)])


class WeightWatch:
    """Tells whether weights have changed where they lie.

    Torch counts what is written into a parameter. What is written past its count, into ``parameter.data``, is seen by
    the first numbers of each matrix.

    Parameters
    ----------
    module : nn.Module
    """

    def __init__(self, module: nn.Module) -> None:
        self._weights = list(module.parameters())
        self._counts: list[int] = []
        self._numbers: Tensor | None = None

    def look(self) -> tuple[bool, Tensor]:
        """Whether the counts differ from those of the last look, and, on the device, whether numbers do."""
        counts = [0 if weight.is_inference() else weight._version for weight in self._weights]
        matrices = (weight.data for weight in self._weights if weight.ndim > 1)
        numbers = torch.cat([matrix[(0,) * (matrix.ndim - 1)][:_SAMPLED] for matrix in matrices])
        before = numbers if self._numbers is None else self._numbers
        differ, self._counts, self._numbers = counts != self._counts, counts, numbers
        return differ, (numbers != before).any()


class ImageCache:
    """Rows of the vision tower by image, those used last kept.

    Parameters
    ----------
    tower : nn.Module

    Attributes
    ----------
    n_bytes : int
        That it holds.
    """

    def __init__(self, tower: nn.Module) -> None:
        self._digest = PixelDigest(next(tower.parameters()).device)
        self._watch = WeightWatch(tower)
        self._rows: OrderedDict[Key, Tensor] = OrderedDict()
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget all images."""
        self._rows.clear()
        self.n_bytes = 0

    def encode(
        self, programs: VisionPrograms, patches: Tensor, grids: Grids, patches_per_token: int, most_bytes: int
    ) -> VisionOutput:
        """Encode the images that it does not hold; waits for the device once.

        Parameters
        ----------
        programs : VisionPrograms
        patches : Tensor of shape (n_patches, size)
        grids : tuple of (t, h, w)
            In visual tokens.
        patches_per_token : int
        most_bytes : int
            That it may hold afterwards.

        Returns
        -------
        VisionOutput
        """
        n_tokens = [t * h * w for t, h, w in grids]
        sizes = [n * patches_per_token for n in n_tokens]
        counts_differ, numbers_differ = self._watch.look()
        digests, is_other = self._digest(patches, sizes, numbers_differ)
        if counts_differ or is_other:
            self.clear()
        keys = [(digest, grid, patches.dtype) for digest, grid in zip(digests, grids, strict=True)]
        missing = {key: i for i, key in enumerate(keys) if key not in self._rows}  # once, however often a call has it
        found = {key: self._rows[key] for key in keys if key in self._rows}
        for key in found:
            self._rows.move_to_end(key)
        if missing:
            images, places = patches.split(sizes), list(missing.values())
            some = patches if len(places) == len(grids) else torch.cat([images[i] for i in places])
            encoded = programs(some, tuple(grids[i] for i in places))
            parts = (rows.split([n_tokens[i] for i in places]) for rows in (encoded.tokens, *encoded.late))
            for key, part in zip(missing, zip(*parts, strict=True), strict=True):
                found[key] = self._keep(key, torch.stack(part), most_bytes)
        self._shrink(most_bytes)
        tokens, *late = found[keys[0]] if len(keys) == 1 else torch.cat([found[key] for key in keys], dim=1)
        return VisionOutput(tokens, n_cached=len(keys) - len(missing), late=tuple(late))

    def _keep(self, key: Key, rows: Tensor, most_bytes: int) -> Tensor:
        n_bytes = rows.numel() * rows.element_size()
        if n_bytes <= most_bytes:
            self._shrink(most_bytes - n_bytes)
            self._rows[key] = rows
            self.n_bytes += n_bytes
        return rows

    def _shrink(self, most_bytes: int) -> None:
        while self.n_bytes > most_bytes:
            _, rows = self._rows.popitem(last=False)
            self.n_bytes -= rows.numel() * rows.element_size()
