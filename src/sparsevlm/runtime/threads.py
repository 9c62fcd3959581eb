"""One thread at a time: a model under SparseVLM keeps what belongs to a request on itself."""

from __future__ import annotations

import sys
import threading
import time

from torch import nn

from .view import ModelView

# Functions that a thread is inside of while the model works for it: generate, and torch's call of a module.
_WORKING = ("generate", "_call_impl")
# Seconds that a claim waits: a thread that has streamed its last token still has to come back from generate.
_PATIENCE = 0.25
_claiming = threading.Lock()  # held for the moment of a claim only, so it is never left behind


class ThreadGuard:
    """Knows the thread that the model works for, and refuses another one until that is done.

    Whether it is done is told by its stack, so that a request which failed or was interrupted leaves nothing locked.

    Parameters
    ----------
    view : ModelView
    """

    def __init__(self, view: ModelView):
        self._modules: tuple[nn.Module, ...] = (view.model, view.base_model, view.vision_tower, view.text_model)
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread was the last to claim the model."""
        return self._owner == threading.get_ident()

    def claim(self) -> None:
        """Take the model for the calling thread.

        Raises
        ------
        RuntimeError
            If it is working for another thread.
        """
        give_up = time.monotonic() + _PATIENCE
        while not self._take():
            if time.monotonic() > give_up:
                raise RuntimeError(
                    "this model is generating in another thread: under SparseVLM a model serves one request at a "
                    "time. Hold a lock around generate, or use one model or one process per thread."
                )
            time.sleep(0.001)

    def _take(self) -> bool:
        if self.is_mine:
            return True
        with _claiming:
            if self._owner is None or not self._works_for(self._owner):
                self._owner = threading.get_ident()
        return self.is_mine

    def _works_for(self, thread: int) -> bool:
        frame = sys._current_frames().get(thread)
        while frame is not None:
            if frame.f_code.co_name in _WORKING:
                called = frame.f_locals.get("self")
                if any(called is module for module in self._modules):
                    return True
            frame = frame.f_back
        return False
