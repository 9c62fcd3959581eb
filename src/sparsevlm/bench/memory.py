"""Memory that a model takes and that a device has, before its weights are made or read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_BESIDE = 1.15  # of the weights, what inputs, caches and activations take beside them
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(label: str, skeleton: Any, device: str, dtype: torch.dtype, smaller: str) -> None:
    """Refuse a model whose weights the device has no room for.

    Parameters
    ----------
    label : str
        The model's name in the message.
    skeleton : PreTrainedModel
        Without weights, on the device ``meta``.
    device : str
    dtype : torch.dtype
        Of the weights.
    smaller : str
        What to name instead.

    Raises
    ------
    ValueError
    """
    weights = sum(weight.numel() for weight in skeleton.parameters()) * dtype.itemsize
    free = free_bytes(device)
    if free is None or weights * _BESIDE <= free:
        return
    raise ValueError(
        f"the model {label} takes {weights / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} for its weights alone, "
        f"and {device} has {free / 1e9:.1f} GB free. Name a smaller model, such as {smaller}, or another --device."
    )


def free_bytes(device: str) -> int | None:
    """Bytes that a device has free; ``None`` where nothing tells."""
    place = torch.device(device)
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0])
    found = [n for n in (_of_machine(), _of_container()) if n is not None] if place.type == "cpu" else []
    return min(found, default=None)


def _of_machine() -> int | None:
    if _MEMINFO.is_file():
        sizes = dict(line.split(":") for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in sizes:
            return int(sizes["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _of_container() -> int | None:
    """What the limit of a container leaves beside memory that cannot be given back."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if limit == "max" else max(0, int(limit) - int(used["anon"]))
    except (OSError, KeyError, ValueError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether memory was short: torch has no class of its own for a CPU's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
