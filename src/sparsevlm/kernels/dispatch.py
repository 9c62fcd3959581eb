"""Dispatch between plain torch and Triton."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def use_triton(tensor: Tensor) -> bool:
    """Tells whether Triton kernels run on a tensor. (Its interpreter runs them anywhere: tests call them by name.)"""
    return tensor.is_cuda and triton_problem() is None


@cache
def flash_runs() -> bool:
    """Tells whether FlashAttention as torch carries it runs on this machine's GPU, as far as was ever tried."""
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


@cache
def triton_problem() -> str | None:
    """Why Triton kernels do not run on this machine's GPU, tried once: Triton wants a C compiler, for one."""
    if not flash_runs():
        return "a GPU older than Ampere, or no NVIDIA one"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from .triton.elementwise import rms_norm

        rows = torch.ones(2, 16, device="cuda")
        rms_norm(rows, rows[0], 1e-6, None)
    except Exception as error:  # whatever it is, torch's own operations do the same
        logger.warning("sparsevlm: Triton does not work here, torch's own operations run instead: %s", error)
        return f"Triton does not work here ({type(error).__name__})"
    return None
