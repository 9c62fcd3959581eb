"""Text above a picture: what ran, and how many visual tokens it kept."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..report import Report
from ..report_sample import SampleReport


def heading(reports: Sequence[Report], sample: int = 0) -> str:
    """Model, selector, budget and visual tokens of requests that ran with the same options.

    Parameters
    ----------
    reports : sequence of Report
        With samples.
    sample : int
        Which sample of each batch.
    """
    first, samples = reports[0], [report.samples[sample] for report in reports]
    parts = [first.model, f"selector {first.selector}", *_keep(samples[0])]
    average, n_visual = (fmean(getattr(one, name) for one in samples) for name in ("average_in", "n_visual"))
    return (
        f"{', '.join(parts)}: {average:.0f} of {n_visual:.0f} visual tokens, averaged over the "
        f"{len(samples[0].layer_tokens)} decoder layers"
    )


def _keep(sample: SampleReport) -> list[str]:
    """The budget in words; nothing where none tells what was dropped, as nothing was."""
    if sample.budget is not None:
        return [f"keep {min(1.0, sample.budget / sample.n_visual):.3g}"]
    if any(stage.rank is not None for stage in sample.stages):
        return ["keep adaptive"]
    return ["keep by schedule"] if any(not stage.skipped_because for stage in sample.stages) else []
