"""Notices, on every call and in little time, what became of a model since its programs were made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .. import runtime

_RUNTIME = runtime.__name__


class Watch:
    """Looks at modules again and again.

    Parameters
    ----------
    modules : iterable of nn.Module
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._weights = [own for module in self._modules if (own := vars(module)["_parameters"])]
        self._children = [own for module in self._modules if (own := vars(module)["_modules"])]
        self._seen = self._look()

    def _look(self) -> list[int]:
        """Where weights lie, which modules there are, and of which class."""
        weights = [weight.data_ptr() for own in self._weights for weight in own.values() if weight is not None]
        children = [id(child) for own in self._children for child in own.values()]
        return weights + children + [id(type(module)) for module in self._modules]

    def changed(self) -> bool:
        """Whether weights lie elsewhere (another device or dtype, other tensors) or modules were replaced.

        Weights that changed where they lie need no notice: programs read them there.
        """
        return self._look() != self._seen

    def hooked(self) -> str | None:
        """A module that wants to be called: something of others is hooked to it, or its ``forward`` was replaced."""
        for module in self._modules:
            own = vars(module)
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
                if not all(is_idle(hook) for hook in hooks) or not is_idle(own.get("forward", is_idle)):
                    return f"something is hooked to {type(module).__name__}, which the engine does not call"
        return None


def is_idle(hook: Any) -> bool:
    """Whether this is of this library, or a hook that transformers leaves behind once outputs of layers were asked
    for."""
    place = str(getattr(hook, "__module__", ""))
    return place == "transformers.utils.output_capturing" or place.startswith((f"{_RUNTIME}.", __package__ + "."))
