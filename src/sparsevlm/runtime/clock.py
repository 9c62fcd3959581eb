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

    def ms_until(self, later: Mark) -> float:
        """Milliseconds to ``later``; waits for the device where events were recorded."""
        if self.event is not None and later.event is not None:
            later.event.synchronize()
            return self.event.elapsed_time(later.event)
        return (later.host - self.host) * 1e3


@dataclass
class VisionCall:
    """One run of the vision tower: when, and over which patch grids (t, h, w)."""

    begin: Mark
    grid_thw: torch.Tensor | None
    end: Mark | None = None


@dataclass
class Clock:
    """Spans of time per phase; decode keeps only its first and last mark, however many steps it takes."""

    spans: dict[str, list[tuple[Mark, Mark]]] = field(default_factory=dict)

    def add(self, phase: str, begin: Mark, end: Mark) -> None:
        """Add a span to a phase."""
        self.spans.setdefault(phase, []).append((begin, end))

    def extend(self, phase: str, begin: Mark, end: Mark) -> None:
        """Stretch the one span of a phase to ``end``."""
        spans = self.spans.setdefault(phase, [(begin, end)])
        spans[0] = (spans[0][0], end)

    def milliseconds(self) -> dict[str, float]:
        """Total per phase."""
        return {phase: sum(begin.ms_until(end) for begin, end in spans) for phase, spans in self.spans.items()}
