"""A benchmark run: all cases and providers in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import adapter_for
from .cases import AnyCase, Case, MixedCase, PictureCase
from .checkpoint import write_checkpoint_files
from .estimate import ONE_IS_FASTER, Pace, estimated_seconds, expected_calls, in_words
from .fitting import fitted_cases
from .mixed import MixedMeasurement, measure_mixed, mixed_rows
from .pictures import Pictures, first_request, measure_picture
from .probe import LONGEST, LONGEST_OF_ALL, TOKENS, Probe, measure_probe, one_thread
from .providers import Inputs, Provider, Setting, make_providers
from .roofline import dense_bounds, measure_roofline
from .rounds import Draw, Measurement, Settings, measure
from .rows import Row, environment, rows_of
from .steps import Expected, OnStep, Step
from .vllm_dense import VLLM_DENSE
from .workload import fitted, fresh_inputs, images_of


class Run:
    """Providers of one model, and what all cases share.

    Parameters
    ----------
    model : PreTrainedModel
        Of a supported family.
    settings : Settings
    origin : dict
        Columns ``commit``, ``model`` and ``command``.
    checkpoint : Path, optional
        Folder of the model, if it has one.
    vllm : mapping of str to Measurement
        What vLLM took, by the name of the case.

    Raises
    ------
    ValueError
        If a selector does not exist.
    """

    def __init__(
        self, model: Any, settings: Settings, origin: Row, checkpoint: Path | None = None,
        vllm: Mapping[str, Measurement] | None = None,
    ) -> None:  # fmt: skip
        self._model, self._settings, self._origin = model, settings, origin
        self._checkpoint, self._vllm = checkpoint, vllm or {}
        self.providers = make_providers(
            model,
            settings.keeps,
            static=settings.static and model.device.type == "cuda",
            seed=settings.seed,
            vision_keep=settings.vision_keep,
            selectors=settings.selectors,
            fp8=settings.fp8,
        )
        self.adapter, self.roofline = adapter_for(model), measure_roofline(model.device, model.dtype)
        self._generator = torch.Generator(device=model.device).manual_seed(settings.seed)
        self._probes: dict[Provider, Probe] = {}

    def leave_out(self, cases: Sequence[AnyCase]) -> list[str]:
        """Leaves out the providers that none of the cases is measured with, and returns their names."""
        idle = [one for one in self.providers if not any(one.supports(case) for case in cases)]
        self.providers = [one for one in self.providers if one not in idle]
        return list(dict.fromkeys(one.name for one in idle))

    def estimate(self, cases: Sequence[AnyCase]) -> tuple[list[float], list[float]]:
        """Seconds that each case takes, roughly, and with one thread; off a GPU calls are timed for that.

        Those with one thread are left out where they are not known.
        """
        by_one_thread: dict[Provider, Probe] = {}
        if self._model.device.type != "cuda":
            self._probes, by_one_thread = self._measure_probes(cases)
        return self._seconds(cases, self._probes), self._seconds(cases, by_one_thread) if by_one_thread else []

    def _seconds(self, cases: Sequence[AnyCase], probes: Mapping[Provider, Probe]) -> list[float]:
        return [estimated_seconds(case, self._expected(case, probes), self._settings) for case in cases]

    def _expected(self, case: AnyCase, probes: Mapping[Provider, Probe]) -> dict[Provider, Expected]:
        return expected_calls(case, self.providers, self._settings.seed, self.adapter, self.roofline, probes)

    @torch.no_grad()
    def _measure_probes(self, cases: Sequence[AnyCase]) -> tuple[dict[Provider, Probe], dict[Provider, Probe]]:
        """Times the smallest request of all cases, as it is and with one thread, where neither takes long."""
        seed = self._settings.seed
        requests: list[tuple[Case, PictureCase | None]] = []
        for case in cases:
            if isinstance(case, PictureCase):
                requests.append((case.request, case))
            else:
                requests += [(one, None) for one in (case.requests(seed) if isinstance(case, MixedCase) else [case])]
        bounds = [dense_bounds(self.adapter, request, self.roofline)["first_token"] for request, _ in requests]
        least = min(range(len(requests)), key=bounds.__getitem__)
        if bounds[least] / 1e3 > LONGEST:
            return {}, {}
        request, inputs = self._probe_inputs(*requests[least])
        request = dataclasses.replace(request, new_tokens=min(TOKENS, max(case.new_tokens for case in cases)))
        bound = dense_bounds(self.adapter, request, self.roofline)

        def probe(provider: Provider) -> Probe:
            return measure_probe(provider, request, inputs, bound)

        base, *others = self.providers
        dense, threads = probe(base), torch.get_num_threads()
        is_short = dense.seconds(bound, request.new_tokens) < LONGEST_OF_ALL
        found = {base: dense, **{one: probe(one) if is_short else dense for one in others}}
        if not (self._model.device.type == "cpu" and 1 < threads < LONGEST / (bounds[least] / 1e3)):
            return found, {}
        with one_thread():
            single = probe(base)
        return found, {provider: one.scaled(single, dense) for provider, one in found.items()}

    def _probe_inputs(self, request: Case, picture: PictureCase | None) -> tuple[Case, Inputs]:
        """The request as the model's images make it, and its inputs."""
        if picture is not None and not images_of(self.adapter, request):
            with self._folder() as folder:
                pictures = Pictures(folder, self._model.device, picture, self._settings.seed)
                return first_request(picture, pictures, self.providers[0])
        request = fitted(self.adapter, request)
        # Of its own: the seed draws the same inputs for all that is measured, whether this is or not.
        generator = torch.Generator(device=self._model.device).manual_seed(self._settings.seed)
        return request, fresh_inputs(self._model, request, generator)

    @torch.no_grad()
    def rows_of(self, case: AnyCase, on_step: OnStep = lambda step: None) -> list[Row]:
        """Measures a case; ``on_step`` is called before each of its steps."""
        vllm, expected = self._vllm.get(case.name), self._expected(case, self._probes)
        if isinstance(case, MixedCase):
            mixed: dict[Setting, MixedMeasurement] = dict(
                measure_mixed(case, self.providers, self._settings, self._generator, on_step, expected).items()
            )
            if isinstance(vllm, MixedMeasurement):
                mixed[VLLM_DENSE] = vllm
            return mixed_rows(case, mixed, self._settings, self.adapter, self.roofline, self._shared())
        if isinstance(case, PictureCase):
            with self._folder() as folder:
                request, found = measure_picture(case, self.providers, self._settings, folder, on_step, expected)
        else:
            request = case
            found = measure(case, self.providers, self._settings, lambda: self._draw(case), on_step, expected)
        measurements: dict[Setting, Measurement] = dict(found.items())
        if vllm is not None:
            measurements[VLLM_DENSE] = vllm
        shared = self._shared()
        return [
            row
            for setting, measured in measurements.items()
            for row in rows_of(case, request, setting, measured, self.adapter, self.roofline, shared)
        ]

    def _draw(self, case: Case) -> Draw:
        inputs = fresh_inputs(self._model, case, self._generator)
        return lambda _: inputs

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        """Folder with the model's processor."""
        if self._checkpoint is not None:
            yield self._checkpoint
            return
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint_files(self._model.config, Path(folder))
            yield Path(folder)

    def _shared(self) -> Row:
        return {**environment(self._model), **self._origin}


def run(
    model: Any, cases: Sequence[AnyCase], settings: Settings, origin: Row,
    on_case: Callable[[AnyCase, list[Row]], None] = lambda case, rows: None, *, checkpoint: Path | None = None,
    vllm: Mapping[str, Measurement] | None = None, say: Callable[[str], None] = lambda line: None,
    confirm: Callable[[float], None] = lambda seconds: None,
    on_step: Callable[[AnyCase, Step, str], None] = lambda case, step, left: None,
) -> list[Row]:  # fmt: skip
    """Measures cases.

    Parameters
    ----------
    model : PreTrainedModel
        Of a supported family.
    cases : sequence of Case, PictureCase or MixedCase
    settings : Settings
    origin : dict
        Columns ``commit``, ``model`` and ``command``.
    on_case : callable
        Called with every case that is done and its rows.
    checkpoint : Path, optional
        Folder of the model, if it has one.
    vllm : mapping of str to Measurement
        What vLLM took, by the name of the case.
    say : callable
        Called with a line on the time that all cases take, with one before each, and with those on what is left out.
    confirm : callable
        Called with the estimated seconds before the first case; raises where that is too long.
    on_step : callable
        Called before every step of a case, with the time that is left in words.

    Raises
    ------
    ValueError
        If a selector does not exist, or a model can have none of the cases.
    """
    bench = Run(model, settings, origin, checkpoint, vllm)
    cases = fitted_cases(bench.adapter, cases, settings.seed, say, has_processor=checkpoint is not None)
    if settings.vision_keep < 1.0 and bench.adapter.vision.program is None:
        say(f"ours-vision: left out; the vision tower of a {bench.adapter.name} runs by its own modules")
    for one in bench.leave_out(cases):
        say(f"{one}: left out; it is measured in none of these cases")
    if model.device.type != "cuda":
        say("timing a few calls for the estimate")
    estimates, with_one = bench.estimate(cases)
    fewer = ""
    if with_one and sum(with_one) < ONE_IS_FASTER * sum(estimates):
        fewer = f"; {in_words(sum(with_one))} with one thread (OMP_NUM_THREADS=1)"
    n_cases = f"{len(cases)} case{'s' * (len(cases) > 1)}"
    say(f"{n_cases}, {len(bench.providers)} providers: {in_words(sum(estimates))}{fewer}")
    confirm(sum(estimates))
    pace, rows = Pace(estimates), []
    for i, case in enumerate(cases):
        say(f"{case.name} ({i + 1} of {len(cases)}), {pace.next()} left")
        new = bench.rows_of(case, functools.partial(_tell, on_step, case, pace))
        rows += new
        on_case(case, new)
    return rows


def _tell(on_step: Callable[[AnyCase, Step, str], None], case: AnyCase, pace: Pace, step: Step) -> None:
    on_step(case, step, pace.within(step.seconds_left))
