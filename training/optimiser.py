"""Muon for the matrices within the blocks, AdamW for all else; made to be captured in a CUDA graph."""

from collections.abc import Sequence

import torch
from torch import nn

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


class Optimiser:
    """Steps float32 copies of a model's weights and copies them back.

    Parameters
    ----------
    matrices : sequence of nn.Parameter
        Stepped by Muon. Its update is scaled to a root mean square of 0.2, about that of AdamW.
    others : sequence of nn.Parameter
        Stepped by AdamW.
    decay : float
        Weight decay of everything that has two axes or more, per unit of learning rate.
    clip : float
        Limit of the gradient norm of what AdamW steps; Muon's updates do not depend on the gradient's size.

    Attributes
    ----------
    matrix_rate, rate : torch.Tensor
        Learning rates of the two, scalars to be filled before each step.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], decay: float, clip: float):
        device = others[0].device
        self.rate, self.matrix_rate = torch.zeros((), device=device), torch.zeros((), device=device)
        self._decay, self._clip = decay, clip
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for weight in matrices:
            by_shape.setdefault(weight.shape, []).append(weight)
        self._stacks = list(by_shape.values())
        self._masters = [torch.stack([weight.detach().float() for weight in stack]) for stack in self._stacks]
        self._momenta = [torch.zeros_like(master) for master in self._masters]
        self._others = list(others)
        self._other_masters = [weight.detach().clone().float().requires_grad_() for weight in others]
        for master in self._other_masters:
            master.grad = torch.zeros_like(master)
        on_gpu = device.type == "cuda"
        groups = [
            {"params": [m for m in self._other_masters if m.ndim >= 2], "weight_decay": decay},
            {"params": [m for m in self._other_masters if m.ndim < 2], "weight_decay": 0.0},
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
        return [weight for stack in self._stacks for weight in stack] + self._others

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """One step; returns the norm of the gradients of what AdamW steps."""
        start = 0
        for stack, master, momentum in zip(self._stacks, self._masters, self._momenta, strict=True):
            gradient = torch.stack(list(gradients[start : start + len(stack)])).float()
            start += len(stack)
            momentum.mul_(_MOMENTUM).add_(gradient)
            update = orthogonalised(gradient + _MOMENTUM * momentum).float() * (0.2 * max(master.shape[1:]) ** 0.5)
            master.sub_(self.matrix_rate * (update + self._decay * master))
            torch._foreach_copy_(stack, list(master.unbind()))
        grads = [master.grad for master in self._other_masters]
        torch._foreach_copy_(grads, list(gradients[start:]))
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (self._clip / (norm + 1e-6)).clamp(max=1.0))
        self._adamw.step()
        torch._foreach_copy_(self._others, self._other_masters)
        return norm


def split_weights(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of attention and MLPs, and all else (embeddings, head, norms, biases, the patch embedding)."""
    matrices = {
        id(module.weight)
        for part in (*model.model.visual.blocks, model.model.visual.merger, *model.model.language_model.layers)
        for module in part.modules()
        if isinstance(module, nn.Linear)
    }
    weights = list(model.parameters())
    return [w for w in weights if id(w) in matrices], [w for w in weights if id(w) not in matrices]
