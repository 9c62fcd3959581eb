"""Cores of this machine that a process may use, and those that others leave free."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MARGIN = 0.5  # cores that threads may lack: a load average is of the last minute, and holds short bursts


def thread_advice(threads: int, load: float | None) -> str:
    """Says that threads have to share cores, and what to set; empty where each has one.

    Parameters
    ----------
    threads : int
        That torch computes with.
    load : float or None
        Processes that others have running, as :func:`load_average` tells before the work begins.
    """
    allowed = allowed_cores()
    # The load is of the whole machine, of which a container may have a part.
    free = allowed if load is None else min(allowed, max(0.0, (os.cpu_count() or 1) - load))
    if threads == 1 or threads <= free + _MARGIN:
        return ""
    fitting = max(1, round(free))
    others = "" if load is None else f", at a load average of {load:.1f}"
    return (
        f"torch computes with {threads} threads, and about {free:.1f} of {allowed:.3g} cores are free{others}: threads "
        f"that wait for each other can make calls many times slower. {remedy(fitting)}"
    )


def remedy(threads: int) -> str:
    """Says how the number of threads is set."""
    return f"Set OMP_NUM_THREADS={threads} before the command; in Python, torch.set_num_threads({threads})."


def load_average() -> float | None:
    """Processes that were running, or waited for a core, over the last minute; ``None`` where nothing tells."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def allowed_cores() -> float:
    """Cores that this process may use, by its affinity and by the limit of its container."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # Linux only
        cores = float(os.cpu_count() or 1)
    return min(cores, _container_limit() or cores)


def _container_limit() -> float | None:
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
