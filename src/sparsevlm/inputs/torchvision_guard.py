"""Keeping a broken torchvision away from transformers."""

from __future__ import annotations

import importlib.util
import logging
import sys

logger = logging.getLogger(__name__)


def torchvision_works() -> bool:
    """Return whether torchvision can be imported, and hide it from this process where it is broken.

    Beside a CPU build of torch, the public index's torchvision is a CUDA build whose import dies with
    ``RuntimeError: operator torchvision::nms does not exist``. transformers only looks whether the package is there,
    so without hiding it every vision model dies the same way. Nothing that worked stops working: a package whose
    import fails cannot be in use.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError, ImportError) as error:
        logger.info("torchvision is installed but cannot be imported (%s); going on without it", error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        # None makes both find_spec and import say "not installed".
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        _forget_answers()
        return False
    return True


def _forget_answers() -> None:
    """Let a transformers that was imported earlier look again: it remembers having seen the package."""
    probes = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_torchvision_available", "is_torchvision_v2_available", "is_torchvision_greater_or_equal"):
        forget = getattr(getattr(probes, name, None), "cache_clear", None)
        if forget is not None:
            forget()
