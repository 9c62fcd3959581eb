"""Watches the vision tower: when it ran, over which grids, and what a selector wants to know of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..compat import tensor_parallel_group
from ..models import Grid, Layout
from ..request.session import Session
from ..request.step import VisionRows
from ..request.timing import Clock, Mark
from ..selection.context import VISION_NEEDS, SelectorTraits
from .vision_attention import VarlenVision
from .vision_probe import VisionProbe, hand_out


@dataclass
class VisionCall:
    """One run of the vision tower: when, over which grids (t, h, w) in tokens, and what was read."""

    begin: Mark
    grids: Sequence[Grid] | None
    end: Mark | None = None
    rows: VisionRows | None = None


class VisionHooks:
    """Hooks of the vision tower.

    Older transformers run it inside of a pass; newer ones before it, where they keep the grids to themselves and hand
    the pass the encoding. So a run is remembered as long as its encoding lives, and known by it.

    Parameters
    ----------
    session : Session
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._varlen: VarlenVision | None = None
        self._running: tuple[VisionCall, VisionProbe | None] | None = None
        self._runs = WeakTensorKeyDictionary()
        self._expected: list[str] = []
        self._ours: dict[str, VisionCall] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know of no run."""
        return {"_session": self._session}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_session"])  # type: ignore[misc]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        self._stop_reading()
        adapter, arguments = self._session.adapter, bound_arguments(module, args, kwargs)
        grids = adapter.family.tower_grids(adapter, arguments)
        call = VisionCall(Mark.now(next(module.parameters()).device), grids)
        if self._session.wants_engine and VarlenVision.suits(adapter):
            self._varlen = VarlenVision(adapter)
        needs, probe = self._session.options.traits.needs & VISION_NEEDS, None
        if needs:
            family = adapter.family
            order, patch_grids = family.reading_order(adapter, arguments), family.patch_grids(adapter, arguments)
            probe = VisionProbe(adapter.vision, needs, order, patch_grids, tensor_parallel_group(adapter.model))
        self._running = (call, probe)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, to be called after an exception as well."""
        running = self._running
        self._stop_reading()
        if running is None or output is None:
            return
        call, probe = running
        call.end = Mark.now(next(module.parameters()).device)
        call.rows = None if probe is None else probe.rows()
        self._runs[output[0]] = call
        if self._expected:
            self._ours[self._expected.pop(0)] = call

    def _stop_reading(self) -> None:
        if self._running is not None and self._running[1] is not None:
            self._running[1].disarm()
        if self._varlen is not None:
            self._varlen.disarm()
        self._running = self._varlen = None

    def release(self) -> None:
        """Leave the tower as it was, after an interruption as well, and forget everything."""
        self._stop_reading()
        self._runs.clear()
        self._expected, self._ours = [], {}

    def begin_pass(self, inputs: Mapping[str, Any]) -> None:
        """Find the runs that gave the pass its encodings, and expect those that it will make itself."""
        self._ours = {}
        self._expected = [
            kind for kind, own in self._session.adapter.modalities.items() if inputs.get(own.pixels) is not None
        ]
        for kind, encoding in (inputs.get("mm_encoder_outputs") or {}).items():
            hidden_states = getattr(encoding, "last_hidden_state", None)
            if hidden_states is not None and hidden_states in self._runs:
                self._ours[kind] = self._runs[hidden_states]

    def layouts(self, inputs: Mapping[str, Any], kinds: Iterable[str]) -> dict[str, Sequence[Layout] | None]:
        """Arrangements of the images of a pass by kind: by its inputs and those of the call, or by the run that encoded
        them before."""
        adapter = self._session.adapter
        known = {**self._session.given, **{name: value for name, value in inputs.items() if value is not None}}
        found: dict[str, Sequence[Layout] | None] = {}
        for kind in kinds:
            found[kind] = adapter.family.layouts(adapter, kind, known)
            if found[kind] is None and kind in self._ours:
                found[kind] = self._ours[kind].grids
        return found

    def rows(
        self, masks: Mapping[str, Tensor], positions: Sequence[Tensor], traits: SelectorTraits
    ) -> list[VisionRows]:
        """Readings of the vision tower for every sample; see :func:`~.vision_probe.hand_out`.

        Raises
        ------
        ValueError
            If the tower did not run for this pass while the selector was in force.
        """
        needs = traits.needs & VISION_NEEDS
        read = {}
        for kind in masks:
            call = self._ours.get(kind)
            if call is None or call.rows is None or not call.rows.holds(needs):
                pixels = self._session.adapter.modalities[kind].pixels
                raise ValueError(
                    f"selector {traits.name!r} needs {', '.join(sorted(needs))}, but these {kind} features were given "
                    "ready-made: the vision tower did not run for this request under this selector. Pass "
                    f"{pixels} instead, or choose a selector that does not look into the vision tower."
                )
            read[kind] = call.rows
        return hand_out(read, masks, positions, needs)

    def book(self, clock: Clock) -> None:
        """Book the time of the runs of this pass, once."""
        for call in self._ours.values():
            if call.end is not None:
                clock.add("vision", call.begin, call.end)
                call.end = None

    def end_pass(self, *, comes_again: bool) -> None:
        """Forget the runs of the pass, and what was read of them.

        ``comes_again``: without a cache every step of ``generate`` brings the same encoding.
        """
        if not comes_again:
            for call in self._ours.values():
                call.rows = None
        self._expected, self._ours = [], {}


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """Arguments of a forward call by name."""
    if not args:
        return kwargs
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}
