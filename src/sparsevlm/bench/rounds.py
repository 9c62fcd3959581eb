"""Timed rounds: every provider in turn on fresh inputs, until each has had its time."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from . import agreement
from .cases import Case, PictureCase
from .providers import PAPER, Inputs, Provider, reset
from .steps import COMPARING, NOTHING_EXPECTED, Expected, OnStep, Step
from .timing import time_call

NOT_TIMED = "not timed"
# What one call of a provider is given: inputs, or what makes them.
Draw: TypeAlias = Callable[[Provider], Inputs | Callable[[], Inputs]]
_RECENT = 3  # calls by which the time of the next is estimated
MIN_TIMED = 3  # timed calls, however long they take
_WARMUP_SHARE = 0.25  # of the seconds, at most, once there was one call
_ENGINE_WARMUP = 3  # calls of the engine: one captures, one replays, one is to spare


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
        before those, of which there is one at least (of the engine three: the first records).
    iterations, warmup : int
        Timed calls and calls before, at most, but for these.
    static : bool
        Whether transformers' compiled decoding is measured as well.
    seed : int
    selectors : tuple of str
        Built-in selectors that are measured as well, at the same budgets.
    fp8 : bool
        Whether decode steps are measured that read float8 copies of the weights.
    """

    keeps: tuple[float, ...] = (0.25,)
    vision_keep: float = 0.5
    seconds: float = 8.0
    iterations: int = 10
    warmup: int = 3
    static: bool = True
    seed: int = 0
    selectors: tuple[str, ...] = (PAPER, "random")
    fp8: bool = False


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
        Reason why its times do not count, if there is one.
    remark : str
        What is to be said of times that count.
    min_warmup : int
        Warmup calls, at least: in the first the engine records what it needs.
    """

    times: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: float = 0.0
    path: str = "dense"
    layer_tokens: tuple[int, ...] = ()
    note: str = ""
    remark: str = ""
    min_warmup: int = 1
    _warmup_seconds: list[float] = field(default_factory=list)
    _timed_seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, provider: Provider) -> Measurement:
        """Returns that of a provider before its first call."""
        return cls(min_warmup=_ENGINE_WARMUP if provider.wants_engine else 1)

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
        enough = len(self._timed_seconds) >= MIN_TIMED and sum(self._timed_seconds) >= settings.seconds
        return bool(self.note) or len(self._timed_seconds) >= settings.iterations or enough

    def recent(self) -> float | None:
        """Seconds of a call, by the last three: the median, of two the shorter, as the engine's first call records."""
        calls = [*self._warmup_seconds, *self._timed_seconds][-_RECENT:]
        return statistics.median_low(calls) if calls else None

    def seconds_left(self, settings: Settings, call: float) -> float:
        """Seconds that warmup calls and timed calls still take, roughly.

        Parameters
        ----------
        settings : Settings
        call : float
            Seconds of a call, where there was none yet; 0: not known.
        """
        call, n_left = self.recent() or call, 0
        if not call:
            return 0.0
        if not self.is_warm(settings):
            spent = sum(self._warmup_seconds)
            enough = math.ceil((_WARMUP_SHARE * settings.seconds - spent) / call)
            n_done = len(self._warmup_seconds)
            n_left += max(1, self.min_warmup - n_done, min(settings.warmup - n_done, enough))
        if not self.is_done(settings):
            spent, n_done = sum(self._timed_seconds), len(self._timed_seconds)
            enough = math.ceil((settings.seconds - spent) / call)
            n_left += min(settings.iterations - n_done, max(MIN_TIMED - n_done, enough))
        return n_left * call

    def see(self, provider: Provider) -> None:
        """Notes what the report of the last call says."""
        if provider.state is None:
            return
        report = provider.state.report
        self.path, self.layer_tokens = report.path, report.samples[0].layer_tokens
        if report.path == "engine" or not provider.wants_engine:
            return
        if provider.may_run_on_hooks:
            self.remark = report.path_reason
        else:
            self.note = f"void: {report.path_reason}"

    def warmup(self, seconds: float) -> None:
        """Counts a warmup call."""
        self._warmup_seconds.append(seconds)

    def add(self, times: dict[str, float], seconds: float) -> None:
        """Adds a timed call."""
        self.times.append(times)
        self._timed_seconds.append(seconds)


def measure(
    case: Case | PictureCase, providers: list[Provider], settings: Settings, draw: Callable[[], Draw],
    on_step: OnStep = lambda step: None, expected: Mapping[Provider, Expected] = NOTHING_EXPECTED,
) -> dict[Provider, Measurement]:  # fmt: skip
    """Measures a case.

    Parameters
    ----------
    case : Case or PictureCase
    providers : list of Provider
    settings : Settings
    draw : callable
        Draws what the next call of every provider is about.
    on_step : callable
        Called before answers are compared and before every call, out of all that is timed.
    expected : mapping of Provider to Expected
        For the time that is left: without it a provider counts from its first call on.

    Returns
    -------
    dict
        By provider; only a note where the engine's answers are not the model's, or could not be compared.
    """
    measurements = {provider: Measurement.of(provider) for provider in providers if provider.supports(case)}
    drawn, left = draw(), _TimeLeft(expected, measurements, settings)
    on_step(Step(COMPARING, seconds_left=left.seconds(list(measurements))))
    if note := disagreement(list(measurements), drawn, case.new_tokens):
        for measurement in measurements.values():
            measurement.note = note
        return measurements
    _measure_peaks(case, providers, measurements, drawn, left, on_step)
    # The engine moves weights when it begins, and what was compiled before has to be recorded anew.
    by_state = sorted(measurements, key=lambda provider: provider.state is None)
    places = {provider: i + 1 for i, provider in enumerate(measurements)}
    n_rounds = 0

    def time_next(provider: Provider, stage: str, drawn: Draw) -> tuple[dict[str, float], float] | None:
        on_step(Step(f"{stage} {n_rounds}", provider.name, places[provider], len(places), seconds_left=left.seconds()))
        return time_provider(provider, drawn(provider), case.new_tokens, measurements[provider])

    while waiting := [provider for provider in by_state if not measurements[provider].is_warm(settings)]:
        drawn, n_rounds = draw(), n_rounds + 1
        for provider in waiting:
            if (called := time_next(provider, "warm-up call", drawn)) is not None:
                measurements[provider].warmup(called[1])
    n_rounds = 0
    while waiting := [provider for provider in measurements if not measurements[provider].is_done(settings)]:
        drawn, n_rounds = draw(), n_rounds + 1
        for provider in waiting:
            if (called := time_next(provider, "timed call", drawn)) is not None:
                measurements[provider].add(*called)
    return measurements


@dataclass(frozen=True)
class _TimeLeft:
    """Seconds that a case still takes, by what its providers have taken, and by what is expected of the others."""

    expected: Mapping[Provider, Expected]
    measurements: Mapping[Provider, Measurement]
    settings: Settings

    def seconds(self, not_called: Sequence[Provider] = ()) -> float:
        """The sum; ``not_called`` are the providers whose first call is to come."""
        first = sum(one.ahead + one.call for one in map(self._expected, not_called))
        return first + sum(
            measured.seconds_left(self.settings, self._expected(provider).call)
            for provider, measured in self.measurements.items()
        )

    def _expected(self, provider: Provider) -> Expected:
        return self.expected.get(provider, Expected(0.0, 0.0))


def disagreement(providers: list[Provider], drawn: Draw, new_tokens: int) -> str:
    """Why nothing is timed: the engine's answers are not the model's, or could not be compared; empty: they agree."""
    given = drawn(providers[0])
    try:
        agreement.check(providers, given() if callable(given) else given, new_tokens)
    except agreement.DisagreementError as error:
        return f"{NOT_TIMED}: {error}"
    except torch.OutOfMemoryError:
        return "out of memory while answers were compared"
    return ""


def _measure_peaks(
    case: Case | PictureCase, providers: list[Provider], measurements: dict[Provider, Measurement], drawn: Draw,
    left: _TimeLeft, on_step: OnStep,
) -> None:  # fmt: skip
    ordered = sorted(measurements, key=lambda provider: provider.compiles)  # what was compiled shall stay
    for i, provider in enumerate(ordered):
        seconds = left.seconds(ordered[i:])
        on_step(Step("first call", provider.name, i + 1, len(ordered), begins=True, seconds_left=seconds))
        begin_peak(providers)
        called = time_provider(provider, drawn(provider), case.new_tokens, measurements[provider])
        measurements[provider].peak_bytes = end_peak(provider)
        if called is not None and provider.state is None and not provider.compiles:
            measurements[provider].warmup(called[1])


def begin_peak(providers: list[Provider]) -> None:
    """Frees what earlier calls of all providers have left, and forgets how much memory they took."""
    reset(providers)
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def end_peak(provider: Provider) -> float:
    """Most bytes taken from the device since; 0 on a CPU."""
    return float(torch.cuda.max_memory_reserved()) if provider.model.device.type == "cuda" else 0.0


def time_provider(
    provider: Provider, inputs: Inputs | Callable[[], Inputs], new_tokens: int, measurement: Measurement
) -> tuple[dict[str, float], float] | None:
    """Times one call: milliseconds per phase, and seconds. A failure gives ``None`` and a note."""
    begin = time.perf_counter()
    try:
        times = time_call(provider, inputs, new_tokens)
    except torch.OutOfMemoryError:
        measurement.note = "out of memory"
        return None
    except Exception as error:
        if not provider.is_optional:
            raise
        measurement.note = f"failed: {type(error).__name__}"
        return None
    measurement.see(provider)
    return times, time.perf_counter() - begin
