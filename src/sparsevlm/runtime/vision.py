"""Watches the vision tower: when it ran, and over which grids."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .clock import Clock, Mark

_KINDS = ("image", "video")


@dataclass
class VisionCall:
    """One run of the vision tower: when, and over which patch grids (t, h, w)."""

    begin: Mark
    grid_thw: Tensor | None
    end: Mark | None = None


class VisionWatch:
    """Hooks of the vision tower. Newer transformers run it before the forward pass and keep the grids to themselves."""

    def __init__(self) -> None:
        self._calls: deque[VisionCall] = deque(maxlen=len(_KINDS))  # a request has one for images, one for videos

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        grid_thw = bound_arguments(module, args, kwargs).get("grid_thw")
        self._calls.append(VisionCall(Mark.now(next(module.parameters()).device), grid_thw))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        if self._calls:
            self._calls[-1].end = Mark.now(next(module.parameters()).device)

    def begin_pass(self, inputs: Mapping[str, Any]) -> None:
        """Forget runs that are not of the pass that begins."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        n_ours = sum(encoded.get(kind) is not None for kind in _KINDS)
        while len(self._calls) > n_ours:
            self._calls.popleft()

    def grids(self, inputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """Grids of features that were computed before this pass, where the inputs do not name them."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        kinds = [kind for kind in _KINDS if encoded.get(kind) is not None]
        if len(self._calls) != len(kinds) or any(inputs.get(f"{kind}_grid_thw") is not None for kind in kinds):
            return {}
        return {f"{kind}_grid_thw": call.grid_thw for kind, call in zip(kinds, self._calls, strict=True)}

    def hand_over(self, clock: Clock) -> None:
        """Book the runs of this pass."""
        for call in self._calls:
            if call.end is not None:
                clock.add("vision", call.begin, call.end)
        self._calls.clear()


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Arguments of a forward call by name."""
    if not args:
        return kwargs
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}
