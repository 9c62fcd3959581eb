"""Calls of a model's modules themselves, outside of ``generate``."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..request.session import Session

_DIRECT = "a direct call of the model"


class DirectCalls:
    """Holds the model's lock for a direct call, from its outermost module's first hook to the last.

    Parameters
    ----------
    session : Session
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._inside: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are in no call."""
        return {**vars(self), "_inside": []}

    def enter(self, module: nn.Module) -> None:
        """Begin a call at ``module``, or go on with one inside of it."""
        session = self._session
        if session.lock.is_mine and module in self._inside:  # of a call that was interrupted by Ctrl-C
            del self._inside[self._inside.index(module) :]
        if not session.lock.is_mine:
            session.take_turn()
            self._inside.clear()
        if not self._inside:
            session.begin_call(_DIRECT if session.wants_engine else "")
        self._inside.append(module)

    def leave(self, module: nn.Module, output: Any) -> None:
        """End what began at ``module``; the call as well, if that is its outermost."""
        if module not in self._inside:
            return
        del self._inside[self._inside.index(module) :]
        if not self._inside:
            if (error := sys.exc_info()[1]) is not None and output is None:
                self._session.fail(error)
            self._session.lock.release()

    def begins_at(self, module: nn.Module) -> bool:
        """Tells whether ``module`` is the outermost of a call."""
        return self._inside[:1] == [module]
