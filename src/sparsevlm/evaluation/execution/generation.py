"""Batched generation: answers of one model under any setting."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from ... import api
from ...inputs import load_model, load_processor
from ...inputs.downsample import Downsampler
from ...inputs.turns import move_inputs, process, render_turn
from ...models import adapter_for
from ...report_sample import SampleReport
from ...request.costs import prefill_flops
from ...request.counting import visual_counts
from ..settings import DOWNSAMPLE, EvalConfig, Setting
from ..suites.suite import Sample
from .resolved_model import resolve_model


@dataclasses.dataclass(frozen=True)
class Answer:
    """Generated answer to one sample, with its costs.

    Attributes
    ----------
    text : str
    n_visual : int
        Visual tokens in the prompt.
    avg_tokens : float
        Visual tokens averaged over the decoder layers' inputs.
    tflops : float
        Estimate for the decoder's prefill, in 10¹² FLOPs; vision tower, head and decoding excluded.
    ms : float
        Wall time of ``generate`` (vision tower, prefill and decoding) for the batch, divided by its size.
    path : str
        Path that pruned; ``"dense"`` without pruning.
    """

    text: str
    n_visual: int
    avg_tokens: float
    tflops: float
    ms: float
    path: str


class BatchGenerator:
    """Loaded model with its processor, which answers batches of samples.

    Parameters
    ----------
    config : EvalConfig
    max_new_tokens : int
    """

    def __init__(self, config: EvalConfig, max_new_tokens: int) -> None:
        resolved = resolve_model(config)
        self.model = load_model(
            resolved.folder, dtype=resolved.dtype, device=resolved.device, attn_implementation=config.attn
        )
        self.processor = load_processor(resolved.folder)
        self.instruction = config.instruction
        self.max_new_tokens = max_new_tokens
        self._adapter = adapter_for(self.model)
        self._flops = lru_cache(maxsize=None)(lambda tokens: prefill_flops(self._adapter, tokens, 0))
        self._downsample = Downsampler(self._adapter, self.processor)
        self._last_inputs: tuple[Sequence[Sample], Any] | None = None
        self._state: Any = None

    def generate(self, setting: Setting, samples: Sequence[Sample]) -> list[Answer]:
        """Answers a batch greedily.

        Pruning stays applied from one call to the next until a setting without it comes: run those first.
        """
        inputs = self._inputs(setting, samples)
        with self._pruning(setting):
            begin = self._now()
            output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            ms = (self._now() - begin) * 1e3 / len(samples)
            report = None if setting.pruning is None else self._state.report
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        lengths, n_visual = inputs["attention_mask"].sum(dim=1).tolist(), visual_counts(self._adapter, inputs)
        reports: Sequence[SampleReport | None] = [None] * len(samples) if report is None else report.samples
        answers = []
        for text, visual, length, sample_report in zip(texts, n_visual, lengths, reports, strict=True):
            layer_tokens = (visual,) * self._adapter.n_layers if sample_report is None else sample_report.layer_tokens
            tflops = self._flops(tuple(length - visual + tokens for tokens in layer_tokens)) / 1e12
            average = sum(layer_tokens) / len(layer_tokens)
            path = "dense" if report is None else report.path
            answers.append(Answer(text, visual, average, tflops, ms, path))
        return answers

    @contextlib.contextmanager
    def _pruning(self, setting: Setting) -> Iterator[None]:
        """Applies pruning once and changes its options from then on; other settings get the untouched model."""
        if setting.pruning is None:
            api.remove_sparsevlm(self.model)
            self._state = None
            yield
            return
        if self._state is None:
            self._state = api.apply_sparsevlm(self.model, config=setting.pruning, processor=self.processor)
        options = {field.name: getattr(setting.pruning, field.name) for field in dataclasses.fields(setting.pruning)}
        with self._state.options(**{**options, "preset": None}):  # a preset is in the other fields by now
            yield

    def _inputs(self, setting: Setting, samples: Sequence[Sample]) -> Any:
        """Prepares left-padded inputs on the device; those of the last batch are kept for the next setting."""
        if setting.selector != DOWNSAMPLE:
            if self._last_inputs is None or self._last_inputs[0] is not samples:
                self._last_inputs = samples, self._processed(samples)
            return self._last_inputs[1]
        assert setting.keep is not None  # no setting without a budget is made
        smaller = [self._downsample(sample.images, setting.keep) for sample in samples]
        return self._processed(
            [dataclasses.replace(sample, images=images) for sample, images in zip(samples, smaller, strict=True)]
        )

    def _processed(self, samples: Sequence[Sample]) -> Any:
        prompts = [self._prompt(sample) for sample in samples]
        inputs = process(self.processor, prompts, [sample.images for sample in samples])
        return move_inputs(inputs, self.model)

    def _prompt(self, sample: Sample) -> str:
        """The conversation so far and the question, the images before everything."""
        asked = [*(question for question, _ in sample.history), sample.question]
        messages: list[dict[str, Any]] = []
        for i, question in enumerate(asked):
            text = question + (f"\n{self.instruction}" if self.instruction else "")
            images = [{"type": "image"} for _ in sample.images] if i == 0 else []
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
            if i < len(sample.history):
                answer = sample.history[i][1]
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return render_turn(self.processor, messages)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def generate_each(
    generate: Callable[[Sequence[Sample]], list[Answer]], samples: Sequence[Sample]
) -> list[Answer | Exception]:
    """Answers a batch; if that raises, answers it without the samples that raise by themselves.

    Raises
    ------
    Exception
        What the batch raised, if there are several samples and each of them raises by itself: then it is not theirs.
    ValueError
        If the device has not enough memory for the batch.
    """
    try:
        return list(generate(samples))
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory with {len(samples)} samples at once: choose a smaller --batch.") from error
    except (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        failures = {i: failure for i, failure in enumerate(_each_failure(generate, samples)) if failure is not None}
        if len(samples) > 1 and len(failures) == len(samples):
            raise error
        if not failures:
            raise
    rest = [sample for i, sample in enumerate(samples) if i not in failures]
    answers = iter(generate(rest) if rest else ())
    return [failures[i] if i in failures else next(answers) for i in range(len(samples))]


def _each_failure(
    generate: Callable[[Sequence[Sample]], list[Answer]], samples: Sequence[Sample]
) -> list[Exception | None]:
    failures: list[Exception | None] = []
    for sample in samples:
        try:
            generate([sample])
            failures.append(None)
        except (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError) as error:
            failures.append(error)
    return failures
