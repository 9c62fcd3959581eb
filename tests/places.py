"""Where parity tests run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """Where and in which precision a parity test runs, and how near it has to come (relative error of logits)."""

    device: str
    dtype: torch.dtype
    tolerance: float

    def __str__(self):
        return f"{self.device}-{str(self.dtype).removeprefix('torch.')}"


CPU = Place("cpu", torch.float32, 5e-6)
# Half precision rounds differently where rows are gathered first: measured against the same dtype's masked run.
GPU = [
    Place("cuda", torch.float32, 2e-5),
    Place("cuda", torch.float16, 1e-2),
    Place("cuda", torch.bfloat16, 6e-2),
]
