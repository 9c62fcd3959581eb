"""Muon for the matrices within the blocks, AdamW for all else; made to be captured in a CUDA graph."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from training.adapters import Adapter, master_of
from training.data_parallel import DataParallel

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the closest semi-orthogonal matrix to each, by quintic Newton-Schulz steps (Jordan et al. 2024, Muon).

    Parameters
    ----------
    matrices : torch.Tensor
        Shape (n, rows, cols).

    Returns
    -------
    torch.Tensor
        bf16 on a GPU, of the same shape; singular values are about one.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


@dataclass(frozen=True)
class Trained:
    """What is trained of a model.

    Attributes
    ----------
    matrices : list of nn.Parameter
        Stepped by Muon. Its update is scaled to a root mean square of 0.2, about that of AdamW.
    others : list of nn.Parameter
        Stepped by AdamW.
    adapters : list of Adapter
        Fewer numbers than the weights that they change; stepped by AdamW.
    """

    matrices: list[nn.Parameter]
    others: list[nn.Parameter]
    adapters: list[Adapter]


class Optimiser:
    """Steps float32 copies of a model's weights and copies them back.

    Parameters
    ----------
    trained : Trained
    decay : float
        Weight decay of everything that has two axes or more, per unit of learning rate.
    clip : float
        Limit of the gradient norm of what AdamW steps; Muon's updates do not depend on the gradient's size.
    parallel : DataParallel, optional
        Processes whose gradients are averaged.

    Attributes
    ----------
    matrix_rate, rate : torch.Tensor
        Learning rates of the two, scalars to be filled before each step.
    """

    def __init__(self, trained: Trained, decay: float, clip: float, parallel: DataParallel | None = None):
        device = trained.others[0].device
        self.rate, self.matrix_rate = torch.zeros((), device=device), torch.zeros((), device=device)
        self._decay, self._clip, self._parallel = decay, clip, parallel or DataParallel()
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for weight in trained.matrices:
            by_shape.setdefault(weight.shape, []).append(weight)
        self._stacks = list(by_shape.values())
        self._masters = [torch.stack([weight.detach().float() for weight in stack]) for stack in self._stacks]
        self._momenta = [torch.zeros_like(master) for master in self._masters]
        self._others, self._adapters = trained.others, trained.adapters
        self._other_masters = [master_of(weight) for weight in trained.others]
        self._stepped = self._other_masters + [m for adapter in trained.adapters for m in adapter.masters]
        on_gpu = device.type == "cuda"
        groups = [
            {"params": [m for m in self._stepped if m.ndim >= 2], "weight_decay": decay},
            {"params": [m for m in self._stepped if m.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.rate,
            betas=(0.9, 0.98),
            fused=on_gpu,
            capturable=on_gpu,
        )

    @property
    def weights(self) -> list[nn.Parameter]:
        """Everything that is stepped, in the order in which :meth:`step` takes gradients."""
        adapted = [weight for adapter in self._adapters for weight in adapter.weights]
        return [weight for stack in self._stacks for weight in stack] + self._others + adapted

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """One step; returns the norm of the gradients of what AdamW steps."""
        of_stacks, start = [], 0
        for stack in self._stacks:
            of_stacks.append(torch.stack(list(gradients[start : start + len(stack)])).float())
            start += len(stack)
        stop = start + len(self._others)
        torch._foreach_copy_([master.grad for master in self._other_masters], list(gradients[start:stop]))
        for adapter in self._adapters:
            start, stop = stop, stop + len(adapter.weights)
            adapter.take(gradients[start:stop])
        grads = [master.grad for master in self._stepped]
        self._parallel.average([*of_stacks, *grads])
        self._step_matrices(of_stacks)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (self._clip / (norm + 1e-6)).clamp(max=1.0))
        self._adamw.step()
        torch._foreach_copy_(self._others, self._other_masters)
        for adapter in self._adapters:
            adapter.write()
        return norm

    def _step_matrices(self, gradients: Sequence[torch.Tensor]) -> None:
        """Muon, with the gradient of each stack."""
        by_stack = zip(self._stacks, self._masters, self._momenta, gradients, strict=True)
        for stack, master, momentum, gradient in by_stack:
            momentum.mul_(_MOMENTUM).add_(gradient)
            update = orthogonalised(gradient + _MOMENTUM * momentum).float() * (0.2 * max(master.shape[1:]) ** 0.5)
            master.sub_(self.matrix_rate * (update + self._decay * master))
            torch._foreach_copy_(stack, list(master.unbind()))


def whole_model(model: nn.Module) -> Trained:
    """Everything: by Muon the matrices of attention and MLPs, by AdamW embeddings, head, norms, biases, patches."""
    blocks = (*model.model.visual.blocks, model.model.visual.merger, *model.model.language_model.layers)
    return split_weights(list(model.parameters()), blocks)


def split_weights(weights: list[nn.Parameter], blocks: Sequence[nn.Module]) -> Trained:
    """Out of ``weights`` the matrices of ``blocks`` for Muon, and all others for AdamW."""
    matrices = {id(module.weight) for part in blocks for module in part.modules() if isinstance(module, nn.Linear)}
    return Trained([w for w in weights if id(w) in matrices], [w for w in weights if id(w) not in matrices], [])
