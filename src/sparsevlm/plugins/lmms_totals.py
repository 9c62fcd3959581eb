"""Totals of kept tokens over a whole run, per task and together, for lmms-eval's results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..report import Report
from ..report_total import Cost, ReportTotal

_NOTHING = Cost(0.0, 0.0)


@dataclass
class RunTotals:
    """Sums over the requests of one process.

    Attributes
    ----------
    tasks : dict
        :class:`~sparsevlm.report_total.ReportTotal` by task; requests without visual tokens are not in it.
    new_tokens : int
    seconds : float
        Inside ``generate``.
    """

    tasks: dict[str, ReportTotal] = field(default_factory=dict)
    new_tokens: int = 0
    seconds: float = 0.0

    def add(self, task: str, total: ReportTotal) -> None:
        """Book one batch of a task."""
        if total.n_samples:
            self.tasks[task] = self.tasks[task] + total if task in self.tasks else total

    def figures(self) -> dict[str, float]:
        """Averages per request: of all, and of each task where there are several.

        ``visual_tokens`` is what was in the prompt, ``kept_tokens_layer_input`` and ``kept_tokens_layer_output`` are
        averages over the decoder's layers, ``prefill_flops_ratio`` is pruned over dense.
        """
        groups = {f"/{task}": total for task, total in self.tasks.items()} if len(self.tasks) > 1 else {}
        if whole := sum(self.tasks.values()):
            groups[""] = whole
        return {f"{name}{suffix}": value for suffix, total in groups.items() for name, value in _averages(total)}

    def clamped(self) -> tuple[int, int]:
        """Batches in which the budget could not hold for some image, and batches."""
        return sum(total.n_clamped for total in self.tasks.values()), sum(t.n_requests for t in self.tasks.values())


def merged(parts: Sequence[RunTotals]) -> RunTotals:
    """The totals of several processes that worked at the same time."""
    whole = RunTotals(seconds=max(part.seconds for part in parts))
    for part in parts:
        whole.new_tokens += part.new_tokens
        for task, total in part.tasks.items():
            whole.add(task, total)
    return whole


def pruned_total(report: Report, counted: Sequence[bool]) -> ReportTotal:
    """Sums of one batch.

    Parameters
    ----------
    report : Report
        Of ``generate``; with beams it has each request once per beam.
    counted : sequence of bool
        Per request, whether it counts: lmms-eval repeats requests so that all processes have equally many.
    """
    n_beams = max(len(report.samples) // len(counted), 1)
    samples = [one for one, counts in zip(report.samples[::n_beams], counted, strict=False) if counts and one.n_visual]
    return dataclasses.replace(report, samples=tuple(samples)).total()


def dense_total(n_visual: Sequence[int], counted: Sequence[bool]) -> ReportTotal:
    """Sums of one batch to which nothing was applied, from the visual tokens of each request."""
    counts = [count for count, counts in zip(n_visual, counted, strict=True) if counts and count]
    return ReportTotal(
        n_requests=1,
        n_samples=len(counts),
        n_visual_sum=sum(counts),
        average_in_sum=float(sum(counts)),
        average_out_sum=float(sum(counts)),
        flops=_NOTHING,
        kv_bytes=_NOTHING,
        wall_ms={},
        decode_steps=0,
        n_skipped=0,
        n_clamped=0,
        final_tokens_sum=sum(counts),
    )


def _averages(total: ReportTotal) -> list[tuple[str, float]]:
    return [
        ("visual_tokens", total.n_visual),
        ("kept_tokens_layer_input", total.average_in),
        ("kept_tokens_layer_output", total.average_out),
        ("prefill_flops_ratio", total.flops.ratio),
    ]
