"""Programmatic dependent launch: a kernel begins while the one before it ends, and reads what does not depend on that.

Every program of a kernel that is launched so calls ``gdc_wait`` before it reads what another kernel has written, and
before it writes: then the kernel before has ended, and with it all before that one. ``gdc_launch_dependents`` lets the
next kernel begin once all programs have begun; it promises nothing, so it comes early.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    _IN_TRITON = True
except ImportError:
    _IN_TRITON = False

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass


# Whether kernels of decode steps are launched so; False to measure what it gains.
ENABLED = True


def begins_early(tensor: Tensor) -> bool:
    """Tells whether kernels can be launched so on a tensor's device: NVIDIA's from Hopper on."""
    return ENABLED and _IN_TRITON and tensor.is_cuda and _is_capable(tensor.device)


def launch_options(early: bool) -> dict[str, Any]:
    """Options of a launch; none where it is an ordinary one, as an older Triton does not know them."""
    return {"launch_pdl": True} if early else {}


@cache
def _is_capable(device: torch.device) -> bool:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return not is_interpreted and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
