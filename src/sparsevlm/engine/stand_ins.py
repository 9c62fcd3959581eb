"""Puts functions in the place of a model's methods, and gives these back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class StandIn:
    """Called in the place of a method, whose signature it shows; after it was given back it calls the method.

    Parameters
    ----------
    own, plain : callable
        What is called instead, and the method.
    """

    def __init__(self, own: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.own, self.plain, self.is_over = own, plain, False
        self.__signature__ = inspect.signature(plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.plain if self.is_over else self.own)(*args, **kwargs)


class StandIns:
    """All that was put in place."""

    def __init__(self) -> None:
        self._taken: dict[str, tuple[Any, StandIn, Any]] = {}

    def take(self, module: Any, name: str, own: Callable[..., Any]) -> None:
        """Put ``own`` in the place of a method."""
        before = vars(module).get(name)  # accelerate, for one, sets a forward
        stand_in = StandIn(own, getattr(module, name))
        self._taken[name] = (module, stand_in, before)
        setattr(module, name, stand_in)

    def plain(self, name: str) -> Callable[..., Any]:
        """The method."""
        return self._taken[name][1].plain

    def has(self, name: str) -> bool:
        """Whether there is such a method."""
        return name in self._taken

    def disturbed(self, *names: str) -> str | None:
        """Which of these methods, of all if none is named, somebody else has set, before or since."""
        for name in names or self._taken:
            module, stand_in, before = self._taken[name]
            if before is not None or vars(module).get(name) is not stand_in:
                return f"{type(module).__name__}.{name} was replaced"
        return None

    def give_back(self) -> None:
        """Put every method in its place, but where somebody else has set another since."""
        for name, (module, stand_in, before) in self._taken.items():
            stand_in.is_over = True
            if vars(module).get(name) is stand_in:
                delattr(module, name)
                if before is not None:
                    setattr(module, name, before)
