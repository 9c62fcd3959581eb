"""Measures cases: all providers in turn, fresh inputs every time."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..models import view_of
from . import gate
from .cases import N_TEXT, Case
from .floor import Ceilings, floors, measure_ceilings
from .providers import Provider, make_providers
from .timing import PhaseTimer
from .workload import fresh_inputs

COLUMNS = (
    *("case", "provider", "path", "selector", "schedule", "recycle", "dtype", "batch", "n_visual", "n_text"),
    *("new_tokens", "keep", "phase", "metric", "p50", "p20", "p80", "floor", "gpu", "torch", "triton", "transformers"),
    *("commit", "timestamp", "model", "command", "note"),
)
Row = dict[str, str]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes
    ----------
    keeps : tuple of float
    iterations, warmup : int
        Timed calls of each provider, and those before.
    static : bool
        Whether transformers' compiled decoding is measured as well.
    seed : int
    """

    keeps: tuple[float, ...] = (0.25,)
    iterations: int = 10
    warmup: int = 3
    static: bool = True
    seed: int = 0


def run(
    model: Any,
    cases: Sequence[Case],
    settings: Settings,
    origin: dict[str, str],
    on_case: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> list[Row]:
    """Measure cases.

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
    RuntimeError
        If the engine's answers are not the model's.
    """
    device = model.device
    providers = make_providers(model, settings.keeps, static=settings.static and device.type == "cuda")
    ceilings = measure_ceilings(device, model.dtype)
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    rows: list[Row] = []
    with torch.no_grad():
        for case in cases:
            found = _measure(case, providers, settings, generator, ceilings)
            shared = {**dict.fromkeys(COLUMNS, ""), **_place(model), **origin}
            filled = [{**shared, **row} for row in found]
            rows += filled
            on_case(case, filled)
    return rows


def _measure(
    case: Case, providers: list[Provider], settings: Settings, generator: torch.Generator, ceilings: Ceilings
) -> list[Row]:
    alive = list(providers)
    times: dict[Provider, list[dict[str, float]]] = {}
    peaks: dict[Provider, list[float]] = {}
    notes: dict[Provider, str] = {}
    for iteration in range(-settings.warmup, settings.iterations):
        inputs = fresh_inputs(providers[0].model, case, generator)
        if iteration == -settings.warmup:
            try:
                gate.check(providers, inputs)
            except torch.OutOfMemoryError:  # unchecked answers are not timed
                notes = dict.fromkeys(providers, "out of memory while answers were compared")
                break
        for provider in list(alive):
            try:
                found, peak = _call(provider, case, inputs)
            except torch.OutOfMemoryError:
                alive.remove(provider)
                notes[provider] = "out of memory"
                continue
            if provider.state is not None and provider.state.report.path != "engine":
                notes[provider] = f"void: {provider.state.report.path_reason}"
            if iteration >= 0:
                times.setdefault(provider, []).append(found)
                peaks.setdefault(provider, []).append(peak)
    return [row for provider in providers for row in _rows(case, provider, times, peaks, notes, ceilings)]


def _call(provider: Provider, case: Case, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, float], float]:
    cuda = provider.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with PhaseTimer(provider.model) as timer:
        found = timer.measure(lambda: provider.generate(inputs, case.new_tokens), case.new_tokens)
    return found, float(torch.cuda.max_memory_allocated()) if cuda else float("nan")


def _rows(
    case: Case,
    provider: Provider,
    times: dict[Provider, list[dict[str, float]]],
    peaks: dict[Provider, list[float]],
    notes: dict[Provider, str],
    ceilings: Ceilings,
) -> list[Row]:
    view = view_of(provider.model)
    shared = {**{name: str(value) for name, value in asdict(case).items()}, "case": case.name, "n_text": str(N_TEXT)}
    shared |= {"provider": provider.name, "keep": str(provider.keep), "note": notes.get(provider, "")}
    if provider.config is not None:
        shared |= {"selector": str(provider.config.selector), "schedule": str(provider.config.schedule or "default")}
        shared |= {"recycle": str(provider.config.recycle)}
    if provider not in times or shared["note"]:
        return [{**shared, "phase": "total", "metric": "ms"}]
    visual: Sequence[float] = [case.n_visual] * view.n_layers
    shared["path"] = "dense"
    if provider.state is not None:
        report = provider.state.report
        shared["path"], visual = report.path, report.samples[0].layer_tokens
    least = floors(view, case, visual, ceilings)
    found = []
    for phase in times[provider][0]:
        values = [one[phase] for one in times[provider]]
        found.append({**shared, "phase": phase, "metric": "ms", **_spread(values), "floor": _text(least.get(phase))})
        if phase == "total":
            speeds = [1e3 * case.batch * case.new_tokens / value for value in values]
            found.append({**shared, "phase": phase, "metric": "tokens_per_s", **_spread(speeds)})
    found.append({**shared, "phase": "total", "metric": "bytes", **_spread(peaks[provider])})
    return found


def _spread(values: Sequence[float]) -> Row:
    return {f"p{q}": _text(float(np.percentile(values, q))) for q in (50, 20, 80)}


def _text(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def _place(model: Any) -> Row:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    cuda = model.device.type == "cuda"
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "gpu": torch.cuda.get_device_name(model.device) if cuda else "CPU",
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
