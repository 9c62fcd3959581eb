"""Float8 copies of the decoder's weights, which decode steps read in half the time; prompts read the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.skinny_linear import FLOAT8, LinearWeights, check_float8, round_to_float8
from ..models.decoder import BlockModules
from .fused_weights import is_plain


class _Copy:
    """Linear layers as one, in float8."""

    def __init__(self, *parts: nn.Linear) -> None:
        self._parts = parts
        self._sources = [weight for part in parts for weight in part.parameters()]
        self._versions: list[int] | None = None
        like, n_out = parts[0].weight.data, sum(part.weight.shape[0] for part in parts)
        self.weight = like.new_empty((n_out, like.shape[1]), dtype=FLOAT8)
        self.scale = like.new_empty(n_out, dtype=torch.float32)
        self.bias = like.new_zeros(n_out) if any(part.bias is not None for part in parts) else None

    def refresh(self) -> None:
        """Round again what has changed, into the same memory, which captured graphs read."""
        versions = [_version(weight) for weight in self._sources]
        if versions == self._versions:
            return
        start = 0
        for part in self._parts:
            rows = slice(start, start + part.weight.shape[0])
            round_to_float8(part.weight.data, self.weight[rows], self.scale[rows])
            if self.bias is not None and part.bias is not None:
                self.bias[rows] = part.bias.data
            start = rows.stop
        self._versions = versions


class Float8Weights:
    """Copies of all linear layers of a decoder, those that read the same rows as one.

    Parameters
    ----------
    blocks : list of BlockModules
    head : nn.Module
        Copied as well, if it is an ordinary linear layer.

    Raises
    ------
    NotImplementedError
        On a GPU that does not read float8.
    """

    def __init__(self, blocks: list[BlockModules], head: Any) -> None:
        check_float8(blocks[0].query.weight.device)
        self.blocks = blocks
        self._copies: dict[nn.Module, _Copy] = {}
        for block in blocks:
            self._copies[block.attention] = _Copy(block.query, block.key, block.value)
            self._copies[block.output] = _Copy(block.output)
            self._copies[block.mlp] = _Copy(block.gate, block.up)
            self._copies[block.down] = _Copy(block.down)
        if is_plain(head):
            self._copies[head] = _Copy(head)

    def refresh(self) -> None:
        """Bring copies up to date whose weights have changed in place; torch counts no changes by ``weight.data``."""
        for copy in self._copies.values():
            copy.refresh()

    def products(self, owner: nn.Module, parts: Sequence[nn.Linear]) -> list[LinearWeights]:
        """Linear layers that read the same rows, see :class:`~sparsevlm.engine.fused_weights.DecodeWeights`."""
        copy = self._copies[owner]
        return [LinearWeights(copy.weight, copy.bias, copy.scale)]


def _version(weight: Tensor) -> int:
    """How often it was changed in place."""
    try:
        return weight._version
    except RuntimeError:  # tensors that were made in inference mode do not count that
        return 0
