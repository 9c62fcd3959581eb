"""Cores of this machine that torch's threads may use, and those that other processes keep busy."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
_CGROUP = Path("/sys/fs/cgroup")
_N_TIMES, _IDLE = 8, (3, 4)  # columns of /proc/stat: guests' times are in others; idle, and waiting for a disk
_SHORTEST = 0.5  # seconds over which the use of cores tells something
_MARGIN = 0.5  # cores that threads may lack: other processes have short bursts


class OtherProcesses:
    """Measures how many cores other processes keep busy, from its making on; on Linux, else by the load average."""

    def __init__(self) -> None:
        self._begin, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()
        self._load = _load_average()

    def cores(self) -> float | None:
        """Cores on average; ``None`` where nothing tells."""
        busy, elapsed = _busy_seconds(), time.monotonic() - self._begin
        if self._busy is None or busy is None or elapsed < _SHORTEST:
            return self._load
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / elapsed)


def busy_advice(threads: int, others: float | None, remedy: str = "") -> str:
    """Says that threads have to share cores, and what to do; empty where each has one.

    Parameters
    ----------
    threads : int
        That torch computes with.
    others : float or None
        Cores that other processes keep busy.
    remedy : str
        What to do about several threads; empty: to set their number.
    """
    allowed = allowed_cores()
    # Others are those of the whole machine, of which a container may have a part.
    free = allowed if others is None else min(allowed, max(0.0, (os.cpu_count() or 1) - others))
    if threads <= free + _MARGIN:
        return ""
    counts = f"{threads} thread{'s' * (threads > 1)}, and about {free:.1f} of {allowed:.3g} cores are free"
    if threads == 1:
        return (
            f"torch computes with {counts}: do not trust milliseconds that are measured now; they are of calls that "
            "waited for a core."
        )
    fitting = max(1, round(free))
    setting = f"Set OMP_NUM_THREADS={fitting} before the command; in Python, torch.set_num_threads({fitting})."
    return (
        f"torch computes with {counts}: threads that wait for each other can make calls many times slower, so do not "
        f"trust milliseconds that are measured now. {remedy or setting}"
    )


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


def _busy_seconds() -> float | None:
    """Seconds of computing on all cores since the machine began."""
    try:
        first = _STAT.read_text(encoding="ascii").splitlines()[0]
    except (OSError, ValueError, IndexError):
        return None
    times = [int(value) for value in first.split()[1 : 1 + _N_TIMES]]
    return (sum(times) - sum(times[i] for i in _IDLE)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """The same of this process and of those that it has begun and ended."""
    return sum(os.times()[:4])


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
