"""Projections that read the same rows, side by side in memory: one product in the place of two or three.

No weight is held twice: the model's own parameters become views of what is joined, with their names, shapes and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..kernels.skinny_linear import LinearWeights
from ..models import ModelAdapter
from ..models.decoder import BlockModules

if TYPE_CHECKING:
    from .float8_weights import Float8Weights

# Widths that fast matrix kernels take.
_ALIGNMENT = 64


@dataclass(frozen=True)
class FusedLinear:
    """Projections as one: a view of where their weights lie, which it does not keep alive.

    Attributes
    ----------
    first : nn.Linear
        The first of them; the others lie behind it.
    sizes : tuple of int
        Outputs of each, zeros behind its own included.
    n_in : int
        Inputs, zeros behind its own included.
    """

    first: nn.Linear
    sizes: tuple[int, ...]
    n_in: int

    @property
    def weights(self) -> LinearWeights:
        """Those of all, as one linear layer."""
        n_out, bias = sum(self.sizes), self.first.bias
        weight = self.first.weight.data.as_strided((n_out, self.n_in), (self.n_in, 1))
        return LinearWeights(weight, None if bias is None else bias.data.as_strided((n_out,), (1,)))

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Outputs of all, as views of one tensor."""
        whole = self.weights
        return linear(rows, whole.weight, whole.bias).split(self.sizes, dim=-1)


class DecodeWeights(Protocol):
    """Weights that a decode step reads.

    Attributes
    ----------
    blocks : list of BlockModules
        Of the decoder, by layer.
    """

    blocks: list[BlockModules]

    def products(self, owner: nn.Module, parts: Sequence[nn.Linear]) -> list[LinearWeights]:
        """Linear layers that read the same rows: all as one, where they lie so, or each.

        Parameters
        ----------
        owner : nn.Module
            Module that they are parts of, or the only one itself.
        parts : sequence of nn.Linear
        """


class FusedWeights:
    """The joined weights of a model.

    Parameters
    ----------
    adapter : ModelAdapter

    Attributes
    ----------
    blocks : list of BlockModules
        Of the decoder, by layer; empty where the family does not describe them.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        block = adapter.decoder.block
        self.blocks = [] if block is None else [block.modules_of(layer) for layer in adapter.decoder.layers]
        owners = Counter(
            id(weight)
            for module in adapter.model.modules()
            for weight in module._parameters.values()
            if weight is not None
        )
        self._shared = {weight for weight, number in owners.items() if number > 1}
        self._fused: dict[nn.Module, FusedLinear] = {}
        self._parts: list[nn.Module] = []
        self._float8: Float8Weights | None = None

    def fuse_decoder(self) -> None:
        """Queries, keys and values; gate and up."""
        for block in self.blocks:
            self._fuse(block.attention, [block.query, block.key, block.value])
            self._fuse(block.mlp, [block.gate, block.up])
            if block.query.weight.is_cuda:
                torch.cuda.empty_cache()  # pieces that are too small for the next

    def fuse_tower(self) -> None:
        """Gate and up, with zeros between and behind them up to a width that fast kernels take."""
        program = self._adapter.vision.program
        for block in () if program is None else program.blocks:
            if block.gate is not None:
                self._fuse(block.mlp, [block.gate, block.up], block.down)

    def unfuse(self) -> None:
        """Give every module a weight of its own again, and free copies."""
        self._float8 = None
        self._fused.clear()
        for part in self._parts:
            for name in ("weight", "bias"):
                parameter = getattr(part, name, None)
                if isinstance(parameter, nn.Parameter):
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._parts.clear()

    def of(self, module: nn.Module) -> FusedLinear | None:
        """The joined projections of an attention or MLP module, if they could be joined."""
        return self._fused.get(module)

    def products(self, owner: nn.Module, parts: Sequence[nn.Linear]) -> list[LinearWeights]:
        """Linear layers that read the same rows, see :class:`DecodeWeights`."""
        if (fused := self.of(owner)) is not None:
            return [fused.weights]
        return [LinearWeights(part.weight.data, None if part.bias is None else part.bias.data) for part in parts]

    def float8(self) -> Float8Weights:
        """Copies of the decoder's weights in float8, brought up to date where weights have changed in place.

        Raises
        ------
        NotImplementedError
            Where the GPU does not read them.
        """
        if self._float8 is None:
            from .float8_weights import Float8Weights

            self._float8 = Float8Weights(self.blocks, self._adapter.decoder.head)
        self._float8.refresh()
        return self._float8

    def _fuse(self, owner: nn.Module, parts: Sequence[nn.Linear], reader: nn.Linear | None = None) -> None:
        """Put ``parts`` side by side, with zeros up to the alignment if their ``reader`` can be widened as well."""
        everything = [*parts] if reader is None else [*parts, reader]
        if not all(is_plain(part) for part in everything) or len({_kind(part) for part in everything}) > 1:
            return
        if any(id(weight) in self._shared for part in everything for weight in part.parameters()):
            return  # a weight of two modules cannot lie beside two others
        sizes, n_in = [part.weight.shape[0] for part in parts], parts[0].weight.shape[1]
        if reader is not None:
            sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        fused = parts[0].weight.data.new_zeros((sum(sizes), n_in))
        bias = None if parts[0].bias is None else fused.new_zeros(sum(sizes))
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            own = slice(start, start + part.weight.shape[0])
            _move(part.weight, fused[own])
            if bias is not None:
                _move(part.bias, bias[own])
            start += size
        if reader is not None:
            wide = fused.new_zeros((reader.weight.shape[0], sizes[0]))
            _move(reader.weight, wide[:, : reader.weight.shape[1]])
            self._fused[reader] = FusedLinear(reader, (wide.shape[0],), sizes[0])
        self._fused[owner] = FusedLinear(parts[0], tuple(sizes), n_in)
        self._parts += everything


def _move(parameter: Tensor, capacity: Tensor) -> None:
    capacity.copy_(parameter.data)
    parameter.data = capacity


def is_plain(module: nn.Module) -> bool:
    """Tells whether this is a linear layer of ordinary weights, not adapted, quantized or spread over devices."""
    return type(module) is nn.Linear and all(type(parameter.data) is Tensor for parameter in module.parameters())


def _kind(module: Any) -> tuple[Any, ...]:
    return module.weight.dtype, module.weight.device, module.bias is not None
