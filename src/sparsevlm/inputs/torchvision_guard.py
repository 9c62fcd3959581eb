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
        return False
    return True
