"""Times of the phases of one ``generate`` call."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..models import adapter_for
from ..request.timing import Mark
from .providers import Inputs, Provider
from .roofline import vision_modules


class ArrivalTimes(BaseStreamer):
    """Streamer that records the host time at which each new token arrives.

    Parameters
    ----------
    on_first : callable
        Called once, when the first new token is there.

    Attributes
    ----------
    seconds : list of float
        One reading of ``time.perf_counter`` per new token.
    """

    def __init__(self, on_first: Callable[[], object] = lambda: None) -> None:
        self.seconds: list[float] = []
        self._on_first = on_first
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Records new tokens; ``generate`` begins with the prompt."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.seconds.append(time.perf_counter())
        if len(self.seconds) == 1:
            self._on_first()

    def end(self) -> None:
        """Part of the protocol of streamers."""


class ModuleTimes:
    """Device times of the vision tower, with what projects its output, and of the decoder, by hooks on their modules.

    Parameters
    ----------
    model : PreTrainedModel
        Of a supported family.
    """

    def __init__(self, model: Any) -> None:
        self._device = model.device
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}
        self._open: dict[str, Mark] = {}
        self._handles = []
        adapter = adapter_for(model)
        parts = [("prefill", adapter.decoder.module), *(("vision", module) for module in vision_modules(adapter))]
        for name, module in parts:
            self._handles.append(module.register_forward_pre_hook(self._begin(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._end(name)))

    def stop(self) -> None:
        """Removes the hooks: what is compiled for further tokens shall find none."""
        for handle in self._handles:
            handle.remove()

    def milliseconds(self) -> dict[str, float]:
        """Returns milliseconds per part; waits for the device."""
        return {name: sum(begin.ms_until(end) for begin, end in spans) for name, spans in self._spans.items()}

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._open[name] = Mark.now(self._device)

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._spans.setdefault(name, []).append((self._open.pop(name), Mark.now(self._device)))

        return hook


def time_call(provider: Provider, inputs: Inputs | Callable[[], Inputs], new_tokens: int) -> dict[str, float]:
    """Times a call that makes ``new_tokens`` tokens, in milliseconds per phase.

    ``first_token`` and ``total`` are read on the host's clock from the call on, ``decode_per_token`` between the
    first token and the last. ``vision`` and ``prefill`` are of the device: by hooks on the model's modules, or from the
    report of the engine, which calls no modules and lets nobody hook them. ``overhead`` is what they leave of the first
    token. These three are left out where a call that was for the engine ran on hooks, whose report may count the images
    with the prompt. As in ``timeit``, Python collects no garbage meanwhile: calls in turn would pay for what those
    before have left.

    Parameters
    ----------
    provider : Provider
    inputs : dict of Tensor, or callable
        A callable makes them; the time that it takes is ``preprocess``, and counts in ``first_token`` and ``total``.
    new_tokens : int
    """
    module_times = None if provider.wants_engine else ModuleTimes(provider.model)
    arrivals = ArrivalTimes(module_times.stop if module_times else lambda: None)
    collects = gc.isenabled()
    gc.disable()
    try:
        if provider.model.device.type == "cuda":
            torch.cuda.synchronize(provider.model.device)
        begin = time.perf_counter()
        made = inputs() if callable(inputs) else inputs
        ready = time.perf_counter()
        provider.generate(made, new_tokens, streamer=arrivals)
        end = time.perf_counter()
    finally:
        if collects:
            gc.enable()
        if module_times:
            module_times.stop()
    first, last = arrivals.seconds[0], arrivals.seconds[-1]
    times = {"preprocess": 1e3 * (ready - begin)} if callable(inputs) else {}
    times |= {"first_token": 1e3 * (first - begin), "total": 1e3 * (end - begin)}
    if (parts := _device_times(provider, module_times)) is not None:
        vision, prefill = parts.get("vision", 0.0), parts["prefill"]
        overhead = times["first_token"] - times.get("preprocess", 0.0) - vision - prefill
        times |= {"vision": vision, "prefill": prefill, "overhead": overhead}
    if new_tokens > 1:
        times["decode_per_token"] = 1e3 * (last - first) / (new_tokens - 1)
    return times


def _device_times(provider: Provider, module_times: ModuleTimes | None) -> dict[str, float] | None:
    if module_times is not None:
        return module_times.milliseconds()
    assert provider.state is not None
    report = provider.state.report
    return report.wall_ms if report.path == "engine" else None
