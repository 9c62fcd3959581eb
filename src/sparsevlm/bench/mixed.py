"""Requests of mixed shapes, one after the other: each provider alone, so that it pays for what it has to record."""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..models import ModelAdapter
from .cases import Case, MixedCase, like_sized
from .providers import Inputs, Provider, Setting
from .roofline import Roofline
from .rounds import Measurement, Settings, begin_peak, disagreement, end_peak, time_provider
from .rows import COLUMNS, Row, bounds_of, cell, setting_columns, spread
from .steps import COMPARING, NOTHING_EXPECTED, Expected, OnStep, Step
from .workload import fresh_inputs

# Transformers is given as many requests as it answers in this time, in an order that the seed draws.
DENSE_SECONDS, _LEAST_REQUESTS = 60.0, 8
_DENSE_WARMUP = 4  # requests
_CLASS = 3  # requests of like size, at least


@dataclass
class MixedMeasurement(Measurement):
    """Times of one provider.

    Attributes
    ----------
    by_request : dict of int to dict
        Milliseconds per phase, by the request's place in the list.
    layers_by_request : dict of int to tuple of int
        Visual tokens at the input of each decoder layer.
    warmup_seconds : float
    warmup_note : str
        What was run ahead.
    """

    by_request: dict[int, dict[str, float]] = field(default_factory=dict)
    layers_by_request: dict[int, tuple[int, ...]] = field(default_factory=dict)
    warmup_seconds: float = 0.0
    warmup_note: str = ""


def measure_mixed(
    case: MixedCase, providers: list[Provider], settings: Settings, generator: torch.Generator,
    on_step: OnStep = lambda step: None, expected: Mapping[Provider, Expected] = NOTHING_EXPECTED,
) -> dict[Provider, MixedMeasurement]:  # fmt: skip
    """Measures a case.

    Before them this library runs its ladder, which has none of these requests; transformers, and vLLM where it is
    measured, answer some of other shapes. What a provider has recorded is forgotten before the next begins. Kernels
    and plans that a process keeps are made by whoever is first: this library's own, pruned before dense, then
    transformers.

    Parameters
    ----------
    case : MixedCase
    providers : list of Provider
    settings : Settings
    generator : torch.Generator
        Of pixels and words, on the model's device.
    on_step : callable
        Called before answers are compared, before the warm-up of every provider and before each of its requests.
    expected : mapping of Provider to Expected
        For the time that is left: without it a provider counts from its first request on.
    """
    taking_part = [provider for provider in providers if provider.supports(case)]
    measurements = {provider: MixedMeasurement() for provider in taking_part}
    model = providers[0].model

    def draw(request: Case) -> Inputs:
        return fresh_inputs(model, request, generator)

    warmup = sorted(case.warmup_requests(settings.seed), key=lambda request: request.n_visual)
    smallest = draw(warmup[0])
    ordered = sorted(taking_part, key=lambda one: (one.state is None, one.name == "ours-dense"))
    total = {one: _expected_seconds(one, expected, case.n_requests) for one in ordered}
    on_step(Step(COMPARING, seconds_left=sum(total.values())))
    if note := disagreement(taking_part, lambda _: smallest, case.new_tokens):
        for measurement in measurements.values():
            measurement.note = note
        return measurements
    for i, provider in enumerate(ordered):
        later = sum(total[one] for one in ordered[i + 1 :])
        step = Step("warm-up", provider.name, i + 1, len(ordered), begins=True, seconds_left=total[provider] + later)
        on_step(step)
        begin_peak(providers)
        measured = measurements[provider]
        few = [] if provider.state is not None else warmup[:: max(1, len(warmup) // _DENSE_WARMUP)]
        _warmup(provider, measured, [draw(request) for request in few], case.new_tokens)
        call = expected[provider].call if provider in expected else 0.0
        on_request = functools.partial(_tell_request, on_step, step, case.n_requests, call, later)
        _run(case.requests(settings.seed), provider, measured, settings.seed, draw, on_request)
        measured.peak_bytes = end_peak(provider)
    return measurements


def seconds_of_requests(provider: Provider, seconds: float) -> float:
    """Seconds for requests that take so many together: transformers answers as many as there is time for."""
    return seconds if provider.state is not None else min(seconds, DENSE_SECONDS)


def _expected_seconds(provider: Provider, expected: Mapping[Provider, Expected], n_requests: int) -> float:
    if (one := expected.get(provider)) is None:
        return 0.0
    return one.ahead + seconds_of_requests(provider, n_requests * one.call)


def _tell_request(
    on_step: OnStep, step: Step, n_requests: int, call: float, later: float, provider: Provider, n_done: int,
    spent: float,
) -> None:  # fmt: skip
    """Tells of the next request, and of the time that is left by those before it."""
    call = spent / n_done if n_done else call
    left = seconds_of_requests(provider, n_requests * call) - spent
    step = dataclasses.replace(
        step, stage=f"request {n_done + 1} of {n_requests}", begins=False, seconds_left=max(call, left) + later
    )
    on_step(step)


def _warmup(provider: Provider, measured: MixedMeasurement, requests: Sequence[Inputs], new_tokens: int) -> None:
    """This library's own warm-up, which is given no requests; of transformers each request once."""
    begin = time.perf_counter()
    if provider.state is not None:
        found = provider.warmup(new_tokens)
        measured.warmup_note = f"{found.n_run} of {found.n_run + found.n_left} requests of the ladder"
    for inputs in requests:
        provider.generate(inputs, new_tokens)
    if provider.model.device.type == "cuda":
        torch.cuda.synchronize(provider.model.device)
    measured.warmup_seconds = time.perf_counter() - begin


def _run(
    requests: Sequence[Case], provider: Provider, measured: MixedMeasurement, seed: int,
    draw: Callable[[Case], Inputs], on_request: Callable[[Provider, int, float], None],
) -> None:  # fmt: skip
    order = list(range(len(requests)))
    if provider.state is None:
        random.Random(seed).shuffle(order)
    begin = time.perf_counter()
    for i in order:
        is_over = provider.state is None and time.perf_counter() - begin > DENSE_SECONDS
        if measured.note or (is_over and len(measured.by_request) >= _LEAST_REQUESTS):
            break
        on_request(provider, len(measured.by_request), time.perf_counter() - begin)
        called = time_provider(provider, draw(requests[i]), requests[i].new_tokens, measured)
        if called is not None:
            measured.by_request[i], measured.layers_by_request[i] = called[0], measured.layer_tokens
    if len(measured.by_request) < len(requests):
        measured.remark = f"{len(measured.by_request)} of {len(requests)} requests, drawn by the seed"


def mixed_rows(
    case: MixedCase, measurements: Mapping[Setting, MixedMeasurement], settings: Settings, adapter: ModelAdapter,
    roofline: Roofline, shared: Row,
) -> list[Row]:  # fmt: skip
    """Returns the rows of all settings in one case.

    Beside the times of the calls (``ms``), their mean (``mean_ms``), how many times faster than transformers the
    requests that both have answered were (``x``), the worst call by the median of those of like size
    (``worst_by_median``), and the seconds of the warm-up.
    """
    requests, rows = case.requests(settings.seed), []
    dense = next((one for setting, one in measurements.items() if setting.name == "hf-dense"), MixedMeasurement())
    for setting, measured in measurements.items():
        own = {**dict.fromkeys(COLUMNS, ""), **shared, **setting_columns(setting), "note": measured.note}
        own |= {"case": case.name, "batch": str(case.batch), "new_tokens": str(case.new_tokens)}
        own |= {name: cell(statistics.fmean(getattr(one, name) for one in requests)) for name in ("n_visual", "n_text")}
        if measured.note:
            rows.append({**own, "phase": "total", "metric": "ms"})
            continue
        own |= {"path": measured.path, "note": measured.remark}
        bounds = [
            bounds_of(requests[i], setting, measured.layers_by_request.get(i, ()), adapter, roofline)
            for i in measured.by_request
        ]
        for phase in ("first_token", "decode_per_token", "total"):
            times = {i: times[phase] for i, times in measured.by_request.items() if phase in times}
            if not times:
                continue
            mean, bound = statistics.fmean(times.values()), statistics.fmean(one[phase] for one in bounds)
            rows.append({**own, "phase": phase, "metric": "ms", **spread(list(times.values()))})
            rows.append({**own, "phase": phase, "metric": "mean_ms", "p50": cell(mean), "floor": cell(bound)})
            both = [i for i in times if i in dense.by_request]
            if both:
                ratio = sum(dense.by_request[i][phase] for i in both) / sum(times[i] for i in both)
                rows.append({**own, "phase": phase, "metric": "x", "p50": cell(ratio)})
        worst, note = worst_by_median(requests, {i: times["total"] for i, times in measured.by_request.items()})
        note = "; ".join(filter(None, (measured.remark, note)))
        rows.append({**own, "phase": "total", "metric": "worst_by_median", "p50": cell(worst), "note": note})
        if measured.warmup_seconds:
            warmup = {"p50": cell(measured.warmup_seconds), "note": measured.warmup_note}
            rows.append({**own, "phase": "warmup", "metric": "seconds", **warmup})
        if measured.peak_bytes:
            rows.append({**own, "phase": "total", "metric": "bytes", **spread([measured.peak_bytes])})
    return rows


def worst_by_median(requests: Sequence[Case], times: dict[int, float]) -> tuple[float, str]:
    """Worst call by the median of the calls of like size, and the remark that says which and of what.

    Parameters
    ----------
    requests : sequence of Case
    times : dict of int to float
        By the request's place in the list.
    """
    worst, where, places = 0.0, "", list(times)
    for group in like_sized([requests[i] for i in places], _CLASS):
        members = [places[j] for j in group]
        median = statistics.median(times[i] for i in members)
        slowest = max(members, key=lambda i: times[i])
        if times[slowest] / median > worst:
            tokens = [requests[i].n_visual + requests[i].n_text for i in members]
            worst = times[slowest] / median
            where = f"{times[slowest]:.0f} ms, median of {len(members)} calls of {min(tokens)} to {max(tokens)} tokens"
    return worst, f"worst: {where}; like sizes: eighths of an octave, joined up to {_CLASS} calls"
