"""Calls of all providers in turn, with fresh inputs in every round, until each has had its time."""

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
_LEAST = 3  # timed calls, however long they take
_WARM_UP_SHARE = 0.25  # of the seconds, at most, once there was one call


@dataclass(frozen=True)
class Settings:
    """How to measure.

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
class Measured:
    """What came of one provider.

    Attributes
    ----------
    times : list of dict
        Milliseconds per phase, of each timed call.
    peak_bytes : float
        Most memory taken from the device in a first call, recording and compiling included, when all that earlier
        calls had left was freed; 0 on a CPU.
    path : str
        Which ran.
    layer_tokens : tuple of int
        Visual tokens of a sample at the input of each decoder layer, where this library ran.
    note : str
        Why its times do not count, if they do not.
    least_warm : int
        Calls before those that are timed, at least: the engine records what it has been asked for often.
    """

    times: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: float = 0.0
    path: str = "dense"
    layer_tokens: tuple[int, ...] = ()
    note: str = ""
    least_warm: int = 1
    _warm: list[float] = field(default_factory=list)
    _timed: list[float] = field(default_factory=list)

    def is_warm(self, settings: Settings) -> bool:
        """Whether it needs no more calls before those that are timed."""
        if self.note:
            return True
        long_enough = sum(self._warm) >= _WARM_UP_SHARE * settings.seconds
        return len(self._warm) >= self.least_warm and (len(self._warm) >= settings.warmup or long_enough)

    def is_done(self, settings: Settings) -> bool:
        """Whether it needs no more calls."""
        enough = len(self._timed) >= _LEAST and sum(self._timed) >= settings.seconds
        return bool(self.note) or len(self._timed) >= settings.iterations or enough

    def warmup(self, seconds: float) -> None:
        """Count a call that is not timed."""
        self._warm.append(seconds)

    def add(self, times: dict[str, float], seconds: float) -> None:
        """Count a timed call."""
        self.times.append(times)
        self._timed.append(seconds)


def measure(
    case: Case, providers: list[Provider], settings: Settings, generator: torch.Generator
) -> dict[Provider, Measured]:
    """Measure a case.

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
        What came of each provider; where the engine's answers are not the model's, or could not be compared, a note.
    """
    found = {
        provider: Measured(least_warm=1 if provider.state is None else CALLS)
        for provider in providers
        if provider.answers(case)
    }
    inputs = fresh_inputs(providers[0].model, case, generator)
    try:
        agreement.check(list(found), inputs, case.new_tokens)
    except (torch.OutOfMemoryError, agreement.DisagreementError) as error:  # such answers are not timed
        differ = isinstance(error, agreement.DisagreementError)
        for one in found.values():
            one.note = f"{NOT_TIMED}: {error}" if differ else "out of memory while answers were compared"
        return found
    _measure_peaks(case, providers, found, inputs)
    # The engine moves weights when it begins, and what was compiled before has to be recorded anew.
    by_state = sorted(found, key=lambda provider: provider.state is None)
    while waiting := [provider for provider in by_state if not found[provider].is_warm(settings)]:
        inputs = fresh_inputs(providers[0].model, case, generator)
        for provider in waiting:
            called = _call(provider, case, inputs, found[provider])
            if called is not None:
                found[provider].warmup(called[1])
    while waiting := [provider for provider in found if not found[provider].is_done(settings)]:
        inputs = fresh_inputs(providers[0].model, case, generator)
        for provider in waiting:
            called = _call(provider, case, inputs, found[provider])
            if called is not None:
                found[provider].add(*called)
    return found


def _measure_peaks(case: Case, providers: list[Provider], found: dict[Provider, Measured], inputs: Inputs) -> None:
    for provider in sorted(found, key=lambda provider: provider.compiles):  # what was compiled shall stay
        for other in providers:
            other.forget()
        if inputs["input_ids"].is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        called = _call(provider, case, inputs, found[provider])
        if inputs["input_ids"].is_cuda:
            found[provider].peak_bytes = float(torch.cuda.max_memory_reserved())
        if called is not None and provider.state is None and not provider.compiles:
            found[provider].warmup(called[1])


def _call(provider: Provider, case: Case, inputs: Inputs, one: Measured) -> tuple[dict[str, float], float] | None:
    """Milliseconds per phase, and seconds; or a note why there are none."""
    begin = time.perf_counter()
    try:
        times = time_call(provider, inputs, case.new_tokens)
    except torch.OutOfMemoryError:
        one.note = "out of memory"
        return None
    except Exception as error:
        if not provider.is_optional:
            raise
        one.note = f"failed: {type(error).__name__}"
        return None
    if provider.state is not None:
        report = provider.state.report
        one.path, one.layer_tokens = report.path, report.samples[0].layer_tokens
        if report.path != "engine":
            one.note = f"void: {report.path_reason}"
    return times, time.perf_counter() - begin
