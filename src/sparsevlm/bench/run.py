"""A benchmark run: all cases and providers in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import Case
from .providers import make_providers
from .roofline import measure_roofline
from .rounds import Settings, measure
from .rows import Row, environment, rows_of


def run(
    model: Any,
    cases: Sequence[Case],
    settings: Settings,
    origin: dict[str, str],
    on_case: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> list[Row]:
    """Measures cases.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration or Qwen2VLForConditionalGeneration
    cases : sequence of Case
    settings : Settings
    origin : dict
        Columns ``commit``, ``model`` and ``command``.
    on_case : callable
        Called with every case that is done and its rows.

    Raises
    ------
    ValueError
        If there are more budgets than are measured at a time.
    """
    device = model.device
    providers = make_providers(
        model,
        settings.keeps,
        static=settings.static and device.type == "cuda",
        seed=settings.seed,
        vision_keep=settings.vision_keep,
    )
    roofline = measure_roofline(device, model.dtype)
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    rows: list[Row] = []
    with torch.no_grad():
        for case in cases:
            measurements = measure(case, providers, settings, generator)
            shared = {**environment(model), **origin}
            new = [
                row
                for provider, measurement in measurements.items()
                for row in rows_of(case, provider, measurement, roofline, shared)
            ]
            rows += new
            on_case(case, new)
    return rows
