"""Totals of reports: sums over many requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Summable(Protocol):
    """A report, or a total of some."""

    def total(self) -> ReportTotal:
        """Its part of a sum."""
        ...


@dataclass(frozen=True)
class Cost:
    """Dense and sparse figures of one quantity."""

    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        """Sparse over dense; 1.0 where the dense figure is zero."""
        return self.sparse / self.dense if self.dense else 1.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.dense + other.dense, self.sparse + other.sparse)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.dense - other.dense, self.sparse - other.sparse)


@dataclass(frozen=True)
class ReportTotal:
    """Sums over many requests, made by :meth:`of`.

    Requests that failed count in ``n_requests`` and ``n_failed`` alone: their tokens, costs and times are left out.

    Attributes
    ----------
    n_requests, n_samples : int
        Requests, and samples with images of those that did not fail.
    n_visual_sum : int
        Visual tokens in the inputs of all samples.
    average_in_sum, average_out_sum : float
        Visual tokens averaged over layer inputs, and over layer outputs, summed over samples.
    flops : Cost
        As in :class:`~sparsevlm.Report`, summed over requests.
    kv_bytes : Cost
        Bytes of keys and values that the prompts have added to their caches: of a turn on a kept cache, ``kv_bytes``
        less ``past_kv_bytes``, so that nothing of a chat counts twice.
    wall_ms : dict
        Milliseconds inside the model by phase, as in :class:`~sparsevlm.Report`.
    decode_steps : int
    n_skipped, n_clamped, n_failed : int
        Requests that were left dense as a whole, whose budget could not hold for some sample, and that failed.
    final_tokens_sum : int
        Visual tokens that left the last layer, of all samples.
    """

    n_requests: int
    n_samples: int
    n_visual_sum: int
    average_in_sum: float
    average_out_sum: float
    flops: Cost
    kv_bytes: Cost
    wall_ms: dict[str, float]
    decode_steps: int
    n_skipped: int
    n_clamped: int
    n_failed: int = 0
    final_tokens_sum: int = 0

    @classmethod
    def of(cls, reports: Iterable[Summable]) -> ReportTotal:
        """Sum of reports, of none as well.

        ``sum(reports)`` gives the same of one report and more. To type checkers it is a report or 0, and for none it
        is 0.

        Parameters
        ----------
        reports : iterable of Report or ReportTotal

        Returns
        -------
        ReportTotal
        """
        nothing = Cost(0.0, 0.0)
        total = cls(0, 0, 0, 0.0, 0.0, nothing, nothing, {}, 0, 0, 0)
        for report in reports:
            total = total + report
        return total

    @property
    def n_visual(self) -> float:
        """Visual tokens per sample in the input."""
        return self.n_visual_sum / max(self.n_samples, 1)

    @property
    def average_in(self) -> float:
        """Visual tokens per sample averaged over layer inputs."""
        return self.average_in_sum / max(self.n_samples, 1)

    @property
    def average_out(self) -> float:
        """Visual tokens per sample averaged over layer outputs."""
        return self.average_out_sum / max(self.n_samples, 1)

    @property
    def final_tokens(self) -> float:
        """Visual tokens per sample that left the last layer."""
        return self.final_tokens_sum / max(self.n_samples, 1)

    def total(self) -> ReportTotal:
        """Itself."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values."""
        names = ("n_visual", "average_in", "average_out", "final_tokens")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        odd = {
            "left dense": self.n_skipped,
            "with a budget that could not hold": self.n_clamped,
            "failed": self.n_failed,
        }
        counts = [f"{self.n_requests} request{'s' if self.n_requests != 1 else ''}"]
        lines = [", ".join([*counts, *(f"{n} {name}" for name, n in odd.items() if n)])]
        lines += [tokens_line(self)] if self.n_samples else []
        lines.append(cost_line(self))
        lines += [wall_line(self)] if self.wall_ms else []
        return "\n".join(lines)

    def __add__(self, other: Summable) -> ReportTotal:
        if not isinstance(other, Summable):
            return NotImplemented
        other = other.total()
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "wall_ms":
                values[f.name] = {key: mine.get(key, 0.0) + theirs.get(key, 0.0) for key in {**mine, **theirs}}
            else:
                values[f.name] = mine + theirs
        return ReportTotal(**values)

    def __radd__(self, other: int) -> ReportTotal:
        if other != 0:
            return NotImplemented
        return self


def tokens_line(of: Any) -> str:
    """Visual tokens of a report or a total, in words."""
    return (
        f"visual tokens per sample: {of.n_visual:.1f} in, average {of.average_in:.1f} (layer inputs), "
        f"{of.average_out:.1f} (layer outputs), {of.final_tokens:.1f} at the end"
    )


def cost_line(of: Any) -> str:
    """What the prompts of a report or a total cost beside dense ones, in words."""
    return (
        f"decoder prefill: {of.flops.sparse / 1e9:.2f} of {of.flops.dense / 1e9:.2f} GFLOP (estimate); "
        f"KV cache: {of.kv_bytes.sparse / 1e6:.2f} of {of.kv_bytes.dense / 1e6:.2f} MB"
    )


def wall_line(of: Any) -> str:
    """Time of a report or a total by phase, in words."""
    phases = ", ".join(f"{phase} {value:.1f} ms" for phase, value in of.wall_ms.items())
    return f"wall: {phases} ({of.decode_steps} decode step{'s' if of.decode_steps != 1 else ''})"
