"""Changes of large weights by few trained numbers. The forward pass knows nothing of them.

The model computes with whole weights, so that its forward pass is one for all; the gradient of a whole weight gives
that of the few numbers behind it by the chain rule.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn


def master_of(values: torch.Tensor) -> torch.Tensor:
    """A float32 leaf with a gradient, which an optimiser steps."""
    copy = values.detach().clone().float().requires_grad_()
    copy.grad = torch.zeros_like(copy)
    return copy


class Adapter(Protocol):
    """Some trained numbers behind weights.

    Attributes
    ----------
    weights : list of nn.Parameter
        What is changed of the model, and whose gradients :meth:`take` wants.
    masters : list of torch.Tensor
        float32 leaves with a gradient, which the optimiser steps.
    """

    weights: list[nn.Parameter]
    masters: list[torch.Tensor]

    def take(self, gradients: Sequence[torch.Tensor]) -> None:
        """Set the gradients of ``masters`` by those of ``weights``."""

    def write(self) -> None:
        """Set ``weights`` by ``masters``."""


class Rows:
    """Consecutive rows of a matrix; the others stay as they are.

    Parameters
    ----------
    weight : nn.Parameter
    first, count : int
    """

    def __init__(self, weight: nn.Parameter, first: int, count: int):
        self._rows = slice(first, first + count)
        self.weights = [weight]
        self.masters = [master_of(weight[self._rows])]

    def take(self, gradients: Sequence[torch.Tensor]) -> None:
        self.masters[0].grad.copy_(gradients[0][self._rows])

    def write(self) -> None:
        self.weights[0].data[self._rows].copy_(self.masters[0])


class LowRank:
    """Matrices that change by ``scale * b @ a`` of low rank (Hu et al. 2021, LoRA).

    Parameters
    ----------
    named : mapping of str to nn.Parameter
        The matrices, as they are without a change.
    rank : int
    scale : float
    start : mapping of str to tuple of torch.Tensor
        By name ``a`` (rank, in) and ``b`` (out, rank) to go on from; empty: no change yet.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        rank: int,
        scale: float,
        start: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ):
        self._scale = scale
        by_shape: dict[torch.Size, list[str]] = {}
        for name, weight in named.items():
            by_shape.setdefault(weight.shape, []).append(name)
        self._names = list(by_shape.values())
        self._stacks = [[named[name] for name in names] for names in self._names]
        self.weights = [weight for stack in self._stacks for weight in stack]
        self._bases = [torch.stack([weight.detach() for weight in stack]) for stack in self._stacks]
        self.masters = []
        for names, base in zip(self._names, self._bases, strict=True):
            count, n_out, n_in = base.shape
            a = torch.randn(count, rank, n_in, device=base.device) * n_in**-0.5
            b = torch.zeros(count, n_out, rank, device=base.device)
            for i, name in enumerate(names):
                if name in start:
                    a[i].copy_(start[name][0])
                    b[i].copy_(start[name][1])
            self.masters += [master_of(a), master_of(b)]
        self.write()

    def take(self, gradients: Sequence[torch.Tensor]) -> None:
        first = 0
        for stack, a, b in zip(self._stacks, self.masters[::2], self.masters[1::2], strict=True):
            gradient = torch.stack(list(gradients[first : first + len(stack)]))
            first += len(stack)
            a.grad.copy_(b.detach().to(gradient).mT @ gradient).mul_(self._scale)
            b.grad.copy_(gradient @ a.detach().to(gradient).mT).mul_(self._scale)

    @torch.no_grad()
    def write(self) -> None:
        for stack, base, a, b in zip(self._stacks, self._bases, self.masters[::2], self.masters[1::2], strict=True):
            torch._foreach_copy_(stack, list(torch.baddbmm(base.float(), b, a, alpha=self._scale).unbind()))

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """``a`` and ``b`` by name."""
        pairs = zip(self._names, self.masters[::2], self.masters[1::2], strict=True)
        return {name: (a[i].detach(), b[i].detach()) for names, a, b in pairs for i, name in enumerate(names)}
