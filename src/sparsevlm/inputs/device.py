"""Checks the device and the attention of a model before its weights are read."""

from __future__ import annotations

from typing import Any

ATTENTION = ("sdpa", "eager", "flash_attention_2")
_FLASH = "flash_attention_"


def pick_device(device: str) -> str:
    """Return the torch device of an option; ``"auto"`` is CUDA where there is a GPU.

    Raises
    ------
    ValueError
        If torch does not know the device, or finds none of its kind or number.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use auto, cpu or cuda.") from error
    if asked.type == "meta":
        raise ValueError(f"device {device!r} holds no values; use auto, cpu or cuda.")
    if asked.type == "cuda":
        _check_cuda(torch, device, asked.index)
        return device
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition(". ")[0] or type(error).__name__
        raise ValueError(f"torch cannot use the device {device!r} ({reason}); use auto, cpu or cuda.") from error
    return device


def check_attention(attn_implementation: str, device: str) -> None:
    """Check that an attention implementation is there and runs on a device; nothing is fetched for it.

    Parameters
    ----------
    attn_implementation : str
        ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``, or another name that is registered with transformers.
    device : str
        As :func:`pick_device` returns it.

    Raises
    ------
    ValueError
        If it is unknown, a kernel on the hub, needs a package that is missing, or does not run on the device.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, remedy = f"attn_implementation {attn_implementation!r} (--attn)", f"use one of {', '.join(ATTENTION)}."
    if "/" in attn_implementation:
        raise ValueError(f"{name} is a kernel of the hub, whose code would be fetched and run; {remedy}")
    if attn_implementation not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
        raise ValueError(f"{name} does not exist; {remedy}")
    version = attn_implementation.removeprefix("paged|").removeprefix(_FLASH)
    if not version.isdecimal():
        return
    if device.partition(":")[0] == "cpu":
        raise ValueError(f"{name} needs a GPU, and the model is to run on the CPU; use sdpa.")
    if not _has_flash_attention(version):
        raise ValueError(
            f"{name} needs the package flash-attn, which is missing or does not support this GPU; use sdpa, or install "
            "it: pip install flash-attn --no-build-isolation."
        )


def _check_cuda(torch: Any, device: str, index: int | None) -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {device} was asked for, but torch finds no GPU; use the CPU (device='cpu', --device cpu), or "
            "install a CUDA build of torch."
        )
    if (index or 0) >= (count := torch.cuda.device_count()):
        found = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"device {device} was asked for, but torch finds {found}.")


def _has_flash_attention(version: str) -> bool:
    from transformers import utils

    is_available = getattr(utils, f"is_flash_attn_{version}_available", None)
    return is_available is not None and bool(is_available())
