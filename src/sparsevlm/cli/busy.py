"""Warning of the commands that print milliseconds, where other processes have spoilt them."""

from __future__ import annotations

from ..cores import OtherProcesses, busy_advice
from .terminal import show_warning


class BusyWatch:
    """Measures, from its making on, whether torch's threads have a core each: to be made before the long imports."""

    def __init__(self) -> None:
        self._others = OtherProcesses()

    def warn(self, device: str, threads: int | None = None, remedy: str = "") -> bool:
        """Warn on stderr where they have not; tells whether it did.

        Parameters
        ----------
        device : str
            Of the model: only a CPU's times are of torch's threads.
        threads : int, optional
            That compute; torch's own without.
        remedy : str
            What to do about several; empty: to set their number.
        """
        if not device.startswith("cpu"):
            return False
        import torch

        advice = busy_advice(threads or torch.get_num_threads(), self._others.cores(), remedy)
        if advice:
            show_warning(advice)
        return bool(advice)
