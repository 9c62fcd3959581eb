"""The phases of one call of ``generate``, on the device's own clock where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..runtime.clock import Mark


class PhaseTimer:
    """Watches a model's vision tower, decoder and forward pass.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration or Qwen2VLForConditionalGeneration
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._spans: dict[str, list[tuple[Mark, Mark]]] = {}
        self._open: dict[str, Mark] = {}

    def __enter__(self) -> PhaseTimer:
        parts = {"vision": self._model.model.visual, "decoder": self._model.model.language_model, "model": self._model}
        self._handles = []
        for name, module in parts.items():
            self._handles.append(module.register_forward_pre_hook(self._begin(name)))
            self._handles.append(module.register_forward_hook(self._end(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _now(self) -> Mark:
        return Mark.now(self._model.device)

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._open[name] = self._now()

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._spans.setdefault(name, []).append((self._open.pop(name), self._now()))

        return hook

    def measure(self, call: Callable[[], Any], new_tokens: int) -> dict[str, float]:
        """Milliseconds per phase of a call that makes ``new_tokens`` tokens."""
        self._spans = {}
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        begin = self._now()
        call()
        end = self._now()
        vision = sum(a.ms_until(b) for a, b in self._spans.get("vision", []))
        prefill = self._spans["decoder"][0][0].ms_until(self._spans["decoder"][0][1])
        first = begin.ms_until(self._spans["model"][0][1])
        total = begin.ms_until(end)
        found = {"vision": vision, "prefill": prefill, "first_token": first, "total": total}
        found["overhead"] = first - vision - prefill
        if new_tokens > 1:
            found["decode_per_token"] = (total - first) / (new_tokens - 1)
        return found
