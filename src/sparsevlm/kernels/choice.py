"""Whether a Triton twin can take a tensor."""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels run on a tensor. (In Triton's interpreter they run anywhere: tests call them by name.)"""
    return tensor.is_cuda and _is_installed()


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
