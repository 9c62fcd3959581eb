"""Timed rounds: every provider in turn on fresh inputs, until each has had its time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from ..warmup import CALLS
from . import agreement
from .cases import Case
from .providers import Inputs, Provider
from .timing import time_call
from .workload import fresh_inputs

NOT_TIMED = "not timed"
_MIN_TIMED = 3  # timed calls, however long they take
_WARMUP_SHARE = 0.25  # of the seconds, at most, once there was one call


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark run.

    Attributes
    ----------
    keeps : tuple of float
        Budgets below 1.
    vision_keep : float
        Share of the visual tokens that the tower computes in a provider of its own; 1: no such provider.
    seconds : float
        Of each provider and case: for timed calls, of which there are three at least, and a quarter of it for calls
        before those, of which there is one at least (of the engine as many as it takes until all is recorded).
    iterations, warmup : int
        Timed calls and calls before, at most, but for these.
    static : bool
        Whether transformers' compiled decoding is measured as well.
    seed : int
    """

    keeps: tuple[float, ...] = (0.25,)
    vision_keep: float = 0.5
    seconds: float = 8.0
    iterations: int = 10
    warmup: int = 3
    static: bool = True
    seed: int = 0


@dataclass
class Measurement:
    """Times, memory and path of one provider in one case.

    Attributes
    ----------
    times : list of dict
        Milliseconds per phase of each timed call.
    peak_bytes : float
        Most memory taken from the device in a first call, recording and compiling included, when all that earlier
        calls had left was freed; 0 on a CPU.
    path : str
        Path that ran.
    layer_tokens : tuple of int
        Visual tokens of a sample at the input of each decoder layer, where this library ran.
    note : str
        Reason why its times do not count; empty if they do.
    min_warmup : int
        Warmup calls, at least: the engine records what it has been asked for often.
    """

    times: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: float = 0.0
    path: str = "dense"
    layer_tokens: tuple[int, ...] = ()
    note: str = ""
    min_warmup: int = 1
    _warmup_seconds: list[float] = field(default_factory=list)
    _timed_seconds: list[float] = field(default_factory=list)

    def is_warm(self, settings: Settings) -> bool:
        """True once no more warmup calls are needed."""
        if self.note:
            return True
        long_enough = sum(self._warmup_seconds) >= _WARMUP_SHARE * settings.seconds
        return len(self._warmup_seconds) >= self.min_warmup and (
            len(self._warmup_seconds) >= settings.warmup or long_enough
        )

    def is_done(self, settings: Settings) -> bool:
        """True once no more calls are needed."""
        enough = len(self._timed_seconds) >= _MIN_TIMED and sum(self._timed_seconds) >= settings.seconds
        return bool(self.note) or len(self._timed_seconds) >= settings.iterations or enough

    def warmup(self, seconds: float) -> None:
        """Counts a warmup call."""
        self._warmup_seconds.append(seconds)

    def add(self, times: dict[str, float], seconds: float) -> None:
        """Adds a timed call."""
        self.times.append(times)
        self._timed_seconds.append(seconds)


def measure(
    case: Case, providers: list[Provider], settings: Settings, generator: torch.Generator
) -> dict[Provider, Measurement]:
    """Measures a case.

    Parameters
    ----------
    case : Case
    providers : list of Provider
    settings : Settings
    generator : torch.Generator
        Of pixels and words, on the model's device.

    Returns
    -------
    dict
        By provider; only a note where the engine's answers are not the model's, or could not be compared.
    """
    measurements = {
        provider: Measurement(min_warmup=1 if provider.state is None else CALLS)
        for provider in providers
        if provider.supports(case)
    }
    inputs = fresh_inputs(providers[0].model, case, generator)
    try:
        agreement.check(list(measurements), inputs, case.new_tokens)
    except (torch.OutOfMemoryError, agreement.DisagreementError) as error:  # such answers are not timed
        differ = isinstance(error, agreement.DisagreementError)
        for measurement in measurements.values():
            measurement.note = f"{NOT_TIMED}: {error}" if differ else "out of memory while answers were compared"
        return measurements
    _measure_peaks(case, providers, measurements, inputs)
    # The engine moves weights when it begins, and what was compiled before has to be recorded anew.
    by_state = sorted(measurements, key=lambda provider: provider.state is None)
    while waiting := [provider for provider in by_state if not measurements[provider].is_warm(settings)]:
        inputs = fresh_inputs(providers[0].model, case, generator)
        for provider in waiting:
            called = _time_provider(provider, case, inputs, measurements[provider])
            if called is not None:
                measurements[provider].warmup(called[1])
    while waiting := [provider for provider in measurements if not measurements[provider].is_done(settings)]:
        inputs = fresh_inputs(providers[0].model, case, generator)
        for provider in waiting:
            called = _time_provider(provider, case, inputs, measurements[provider])
            if called is not None:
                measurements[provider].add(*called)
    return measurements


def _measure_peaks(
    case: Case, providers: list[Provider], measurements: dict[Provider, Measurement], inputs: Inputs
) -> None:
    for provider in sorted(measurements, key=lambda provider: provider.compiles):  # what was compiled shall stay
        for other in providers:
            other.reset()
        if inputs["input_ids"].is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        called = _time_provider(provider, case, inputs, measurements[provider])
        if inputs["input_ids"].is_cuda:
            measurements[provider].peak_bytes = float(torch.cuda.max_memory_reserved())
        if called is not None and provider.state is None and not provider.compiles:
            measurements[provider].warmup(called[1])


def _time_provider(
    provider: Provider, case: Case, inputs: Inputs, measurement: Measurement
) -> tuple[dict[str, float], float] | None:
    """Times one call: milliseconds per phase, and seconds. A failure gives ``None`` and a note."""
    begin = time.perf_counter()
    try:
        times = time_call(provider, inputs, case.new_tokens)
    except torch.OutOfMemoryError:
        measurement.note = "out of memory"
        return None
    except Exception as error:
        if not provider.is_optional:
            raise
        measurement.note = f"failed: {type(error).__name__}"
        return None
    if provider.state is not None:
        report = provider.state.report
        measurement.path, measurement.layer_tokens = report.path, report.samples[0].layer_tokens
        if report.path != "engine":
            measurement.note = f"void: {report.path_reason}"
    return times, time.perf_counter() - begin
