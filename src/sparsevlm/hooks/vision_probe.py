"""Reads in the vision tower which tokens are attended to, and hands it out to the samples' visual tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models import Vision
from ..request.step import VisionRows
from ..selection.scoring import received_attention
from .attention_probe import AttentionInputs, AttentionProbe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VisionProbe:
    """Reads blocks with full attention during one run of the vision tower: the one nearest to the middle of the tower
    (of two as near, the earlier) and the last.

    Column sums are taken as queries and keys come by, image by image (or frame by frame); these are not kept.

    Parameters
    ----------
    vision : Vision
    needs : frozenset of str
        Out of ``vision_attention`` and ``vision_keys``.
    order : Tensor of shape (n_visual,), int64, optional
        Index in reading order of each visual token, in the order in which the tower works; ``None``: the same.
    patch_grids : sequence of (h, w), optional
        Patches of each image, where the tower has them row by row: one image behind the other, or each in a row of its
        own that may be filled up behind them.
    tp_group : ProcessGroup, optional
        Ranks over which the model is tensor-parallel.
    """

    def __init__(
        self,
        vision: Vision,
        needs: frozenset[str],
        order: Tensor | None,
        patch_grids: Sequence[tuple[int, int]] | None = None,
        tp_group: ProcessGroup | None = None,
    ):
        self._vision, self._order, self._grids = vision, order, patch_grids
        (_, middle), (_, self._last) = vision.read_blocks
        self._scored = (middle, self._last) if "vision_attention" in needs else ()
        self._received: dict[Any, list[Tensor]] = {block: [] for block in self._scored}
        self._keys: list[Tensor] | None = [] if "vision_keys" in needs else None
        blocks = dict.fromkeys((*self._scored, self._last))  # in an order that is the same on all ranks
        self._probes = [AttentionProbe(block, partial(self._read, block), tp_group) for block in blocks]

    def disarm(self) -> None:
        """Leave the tower as it was."""
        for probe in self._probes:
            probe.disarm()

    @torch.no_grad()
    def _read(self, block: Any, inputs: AttentionInputs) -> None:
        grids, n_images = self._grids or (), inputs.query.shape[0]
        # An image in a row of its own may be filled up behind its patches.
        ends = [self._vision.n_prefix + h * w for h, w in grids] if len(grids) == n_images else [None] * n_images
        for end, all_queries, all_keys in zip(ends, inputs.query, inputs.key, strict=True):
            query, key = all_queries[:, :end], all_keys[:, :end]
            bounds = self._bounds(query.shape[1], inputs.cu_seqlens)
            for begin, stop in itertools.pairwise(bounds) if block in self._received else ():
                received = received_attention(query[:, begin:stop], key[:, begin:stop], inputs.scaling)
                self._received[block].append(self._of_patches(received))
            if block is self._last and self._keys is not None:
                self._keys.append(key.float().mean(dim=0)[self._vision.n_prefix :])

    def _bounds(self, length: int, cu_seqlens: Tensor | None) -> list[int]:
        """Where the images begin that are packed into one row of some length."""
        if cu_seqlens is not None:
            return cu_seqlens.tolist()
        ends = list(itertools.accumulate((height * width for height, width in self._grids or ()), initial=0))
        return ends if ends[-1] == length else [0, length]

    def _of_patches(self, received: Tensor) -> Tensor:
        """Without what goes before the patches of an image, and 1 on average again."""
        if not self._vision.n_prefix:
            return received
        own = received[self._vision.n_prefix :]
        return own / own.mean().clamp_min(1e-30)

    def rows(self) -> VisionRows:
        """Readings in reading order; to be called after the run."""
        order = slice(None) if self._order is None else torch.argsort(self._order)
        patches: Any = slice(None) if self._grids is None else neighbours(self._grids, self._vision.patches_per_token)
        attention = keys = None
        if self._scored:
            received = {block: torch.cat(parts) for block, parts in self._received.items()}
            attention = torch.stack(
                [
                    received[block][patches].view(-1, self._vision.patches_per_token).mean(dim=1)
                    for block in self._scored
                ]
            )
            attention = attention[:, order]
        if self._keys is not None:
            of_patches = torch.cat(self._keys)[patches]
            keys = of_patches.view(-1, self._vision.patches_per_token, of_patches.shape[-1]).mean(dim=1)[order]
        return VisionRows(attention, keys)


def neighbours(patch_grids: Sequence[tuple[int, int]], patches_per_token: int) -> Tensor:
    """Index of each patch, so that those of one visual token follow each other, (n_patches,).

    A last row or column that is too narrow for a token is left out, as mergers do.

    Parameters
    ----------
    patch_grids : sequence of (h, w)
        Of images whose patches lie row by row, one image behind the other.
    patches_per_token : int
        A square number.
    """
    side, start, parts = math.isqrt(patches_per_token), 0, []
    for height, width in patch_grids:
        rows, columns = height // side, width // side
        index = torch.arange(start, start + height * width, device="cpu").view(height, width)
        blocks = index[: rows * side, : columns * side].reshape(rows, side, columns, side)
        parts.append(blocks.transpose(1, 2).flatten())
        start += height * width
    return torch.cat(parts)


def hand_out(
    read: Mapping[str, VisionRows], masks: Mapping[str, Tensor], positions: Sequence[Tensor], needs: frozenset[str]
) -> list[VisionRows]:
    """Give every sample the rows of its visual tokens.

    The tower's tokens fill the placeholders of their kind row by row of the batch. They may be those of a batch before
    it was expanded for beams: then every group of equal rows shares them.

    Parameters
    ----------
    read : mapping
        Per kind (image, video), what was read.
    masks : mapping
        Per kind, of shape (batch, q_len), bool: its placeholders.
    positions : sequence of Tensor of shape (n_visual,), int64
        Per sample, its visual tokens.
    needs : frozenset of str
        What to hand out.

    Raises
    ------
    ValueError
        If the numbers of tokens do not fit.
    """
    index: Any = 0
    n_before = 0
    for kind, mask in masks.items():
        counts, n_read = mask.sum(dim=1), read[kind].n_visual
        copies, rest = divmod(int(counts.sum()), n_read)
        if rest or not torch.equal(counts[::copies].repeat_interleave(copies), counts):
            raise ValueError(
                f"the vision tower encoded {n_read} {kind} tokens, but the prompts hold {counts.tolist()}. Pass the "
                "pixels along with the prompts that they belong to."
            )
        first = counts[::copies].cumsum(dim=0) - counts[::copies]
        rows = first.repeat_interleave(copies)[:, None] + mask.cumsum(dim=1) - 1 + n_before
        index = torch.where(mask, rows, index)
        n_before += n_read
    joined = VisionRows.joined([read[kind].only(needs) for kind in masks])
    return [joined.at(index[b, found]) for b, found in enumerate(positions)]
