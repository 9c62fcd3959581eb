"""Wall time by phase, without a synchronisation while the model runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch


@dataclass
class Mark:
    """A point in time: a host clock reading, or an event in the device's stream."""

    host: float
    event: torch.cuda.Event | None = None

    @classmethod
    def now(cls, device: torch.device) -> Mark:
        """Mark the present."""
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
        return cls(time.perf_counter(), event)

    def end(self, device: torch.device) -> Mark:
        """Mark the end, on ``device``, of what this mark began, maybe on another: events of two cannot be compared."""
        later = Mark.now(device)
        if self.event is not None and later.event is not None and self.event.device != later.event.device:
            beside = torch.cuda.Stream(self.event.device)  # not the stream of the model, which need not wait
            beside.wait_event(later.event)
            later.event = torch.cuda.Event(enable_timing=True)
            later.event.record(beside)
        return later

    def ms_until(self, later: Mark) -> float:
        """Milliseconds to ``later``; waits for the device where events were recorded."""
        if self.event is not None and later.event is not None:
            later.event.synchronize()
            return self.event.elapsed_time(later.event)
        return (later.host - self.host) * 1e3


# More open spans than this are folded: those of long ago are finished on the device, so reading them waits for nothing.
_MAX_OPEN = 64


@dataclass
class Clock:
    """Time per phase, as sums of spans."""

    _open: dict[str, list[tuple[Mark, Mark]]] = field(default_factory=dict)
    _folded: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, begin: Mark, end: Mark) -> None:
        """Add a span to a phase."""
        spans = self._open.setdefault(phase, [])
        spans.append((begin, end))
        if len(spans) > _MAX_OPEN:
            half = spans[: _MAX_OPEN // 2]
            self._folded[phase] = self._folded.get(phase, 0.0) + sum(a.ms_until(b) for a, b in half)
            del spans[: len(half)]

    def milliseconds(self) -> dict[str, float]:
        """Total per phase."""
        return {
            phase: self._folded.get(phase, 0.0) + sum(begin.ms_until(end) for begin, end in spans)
            for phase, spans in self._open.items()
        }
