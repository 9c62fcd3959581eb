"""What the libraries below the server may keep of the host's memory."""

from __future__ import annotations

import ctypes
import os

# Of torch's kernels on a CPU, which keep what they compile for each shape, 1024 by default: prompts have ever new ones.
_KEPT_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
_M_ARENA_MAX = -8  # of glibc's malloc.h
_N_ARENAS = 2


def bound_memory() -> None:
    """Bound what libraries keep for shapes and threads, unless the environment says how.

    To be called before torch is imported and before threads are started: later it has no effect on what there is.
    """
    for variable, number in _KEPT_SHAPES.items():
        os.environ.setdefault(variable, number)
    said = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    set_option = None if said or os.name != "posix" else getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # glibc; by default each thread takes what is free in a heap of its own, and keeps it
        set_option(_M_ARENA_MAX, _N_ARENAS)
