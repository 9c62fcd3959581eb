"""A fair lock: one model serves one thread at a time, the others wait in the order in which they came."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

# Seconds between two looks at whether the holder's thread still lives.
_HEARTBEAT = 0.5


class GenerationLock:
    """Reentrant lock that threads get in the order in which they asked for it.

    A thread that ended without giving it back (killed inside a C extension, say) holds it no longer. Copies and
    unpickled locks are free.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[threading.Thread] = deque()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def is_mine(self) -> bool:
        """Tells whether the calling thread holds it."""
        return self._owner is threading.current_thread()

    def acquire(self, timeout: float | None = None) -> int:
        """Take the lock, or wait for it.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most; ``None``: as long as it takes.

        Returns
        -------
        int
            How often the calling thread holds it now.

        Raises
        ------
        TimeoutError
            If the time is over.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        me = threading.current_thread()
        with self._changed:
            if self.is_mine:
                self._depth += 1
                return self._depth
            self._leave_queue(me)  # of a wait that Ctrl-C has ended
            try:
                self._waiting.append(me)
                while not (self._waiting[0] is me and self._is_free()):
                    left = _HEARTBEAT if give_up is None else min(_HEARTBEAT, give_up - time.monotonic())
                    if left <= 0:
                        raise TimeoutError(
                            f"another thread has kept this model busy for {timeout:g} s: a model serves one request at "
                            "a time. Raise the option timeout (None waits as long as it takes), or use one model or "
                            "one process per thread."
                        )
                    self._changed.wait(left)
                self._owner, self._depth = me, 1
            finally:
                self._leave_queue(me)
        return 1

    def release(self) -> None:
        """Give the lock back as often as it was taken; harmless for a thread that does not hold it."""
        with self._changed:
            if not self.is_mine:
                return
            self._depth -= 1
            if self._depth <= 0:  # below it where Ctrl-C came between these two lines before
                self._owner = None
                self._changed.notify_all()

    def _leave_queue(self, thread: threading.Thread) -> None:
        if thread in self._waiting:
            self._waiting.remove(thread)
            self._changed.notify_all()

    def _is_free(self) -> bool:
        return self._owner is None or not self._owner.is_alive()
