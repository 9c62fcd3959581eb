"""Data parallelism: each process of a run learns from data of its own, all step by the mean of their gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class DataParallel:
    """One of the processes of a run, on a GPU of its own; by default the only one.

    Attributes
    ----------
    rank, world_size : int, int
        Which of how many.
    """

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def begin(device: torch.device) -> tuple[DataParallel, torch.device]:
        """Join the run that ``torchrun`` has started, if any; returns the GPU of this process as well."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return DataParallel(), device
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return DataParallel(dist.get_rank(), world_size), device

    @torch.no_grad()
    def average(self, gradients: Sequence[torch.Tensor]) -> None:
        """Put the mean over all processes in the place of each tensor (float32)."""
        if self.world_size == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat.div_(self.world_size)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(list(gradients), [part.view_as(one) for part, one in zip(parts, gradients, strict=True)])

    def agreed(self, value: float) -> float:
        """What the first process has; the others wait for it, the GPUs do not."""
        if self.world_size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0)
        return float(told)

    def end(self) -> None:
        """Leave the run."""
        if self.world_size > 1:
            dist.destroy_process_group()
