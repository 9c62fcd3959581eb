"""What is read and decided is computed in the precision that it is written in."""

from __future__ import annotations

import contextlib

import torch


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context without the user's ``torch.autocast``, which would round the products of float32 to half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
