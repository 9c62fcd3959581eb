"""The thread that generates: one batch after the other."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList

from ..inputs.turns import move_inputs
from ..report import Report
from ..state import SparseVLMState
from .batching import Event, Queue, Ticket
from .errors import RequestError
from .merging import merged
from .metrics import Metrics
from .text import Detokenizer, StopScanner

_MOST_BATCHES = 32  # of a thread on a CPU: torch's attention keeps a kernel for each length until its thread ends
logger = logging.getLogger(__name__)


class Row:
    """One answer of a batch as it grows.

    Parameters
    ----------
    ticket : Ticket
    tokenizer : PreTrainedTokenizerBase
    ends : frozenset of int
        Tokens that end an answer.

    Attributes
    ----------
    n_tokens : int
        Of the answer so far, the one that ends it included.
    finish_reason : {"stop", "length"}, optional
    """

    def __init__(self, ticket: Ticket, tokenizer: Any, ends: frozenset[int]) -> None:
        self.ticket, self._ends = ticket, ends
        self._text, self._scanner = Detokenizer(tokenizer), StopScanner(ticket.stops)
        self.n_tokens = 0
        self.finish_reason: str | None = None

    @property
    def is_done(self) -> bool:
        """Tells whether no token is wanted any more."""
        return self.finish_reason is not None or self.ticket.is_cancelled

    def push(self, token: int) -> None:
        """Take a token, and tell the client of the text that it adds."""
        if self.is_done:
            return
        self.n_tokens += 1
        if self.n_tokens == 1:
            self.ticket.first_token = time.monotonic()
        if token in self._ends:
            self.finish_reason = "stop"
        text = "" if token in self._ends else self._scanner.push(self._text.push(token))
        if self.finish_reason is None and self._scanner.found:
            self.finish_reason = "stop"
        if self.finish_reason is None and self.n_tokens >= self.ticket.prepared.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not self._scanner.found:
            text += self._scanner.push(self._text.end())
            text += self._scanner.end()
        if text or self.n_tokens == 1:
            self.ticket.tell(Event(text))


class _Rows:
    """Streamer of a batch: hands each row its tokens."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def put(self, value: Tensor) -> None:
        """The prompts, and then a token of each row."""
        if value.ndim > 1:
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.push(token)

    def end(self) -> None:
        """Part of the protocol of streamers."""


class _Stops(StoppingCriteria):
    """Ends rows that are done; by their number of tokens before the host has read these."""

    def __init__(self, rows: list[Row], worker: Worker) -> None:
        self._rows, self._worker, self._n_steps = rows, worker, 0
        self._said: tuple[list[bool], Tensor] | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._n_steps += 1
        self._worker.last_step = time.monotonic()
        done = [row.is_done or self._n_steps >= row.ticket.prepared.max_new_tokens for row in self._rows]
        if self._said is None or self._said[0] != done:
            self._said = done, torch.tensor(done, device=input_ids.device)
        return self._said[1]


class Worker:
    """Generates the batches of a queue in a thread of its own; on a CPU in one after the other.

    Parameters
    ----------
    state : SparseVLMState
    processor : ProcessorMixin
    queue : Queue
    metrics : Metrics

    Attributes
    ----------
    n_started : int
        Threads that were started where there was none: more than one where one has died.
    last_step : float
        When the model last gave a token, by ``time.monotonic``.
    lost_device : str, optional
        The error after which the device does nothing any more.
    """

    def __init__(self, state: SparseVLMState, processor: Any, queue: Queue, metrics: Metrics) -> None:
        self._state, self._queue, self._metrics = state, queue, metrics
        self._model, self._tokenizer = state.adapter.model, processor.tokenizer
        config = self._model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else self._tokenizer.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        pads = (self._tokenizer.pad_token_id, config.pad_token_id, *self._ends, 0)
        self._pad_token_id = next(int(one) for one in pads if one is not None)
        self._most_batches = _MOST_BATCHES if self._model.device.type == "cpu" else math.inf
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._batch: list[Ticket] = []
        self.n_started, self.last_step = 0, time.monotonic()
        self.lost_device: str | None = None

    @property
    def is_alive(self) -> bool:
        """Tells whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def running(self) -> list[Ticket]:
        """The requests of the batch that is generated."""
        return self._batch

    def start(self) -> None:
        """Start the thread; after one that has died a new one, and its batch is told."""
        for ticket in self._batch:
            ticket.tell(Event(error=_internal()))
        self._batch = []
        self.n_started += 1
        self._start_thread()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="sparsevlm-generate", daemon=True)
        with self._starting:
            thread.start()
            self._thread = thread  # only now: until then the one before it is alive

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, and for those that follow it."""
        end = time.monotonic() + seconds
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        n_batches = 0
        while batch := self._queue.take():
            self.last_step = time.monotonic()  # first: a batch is looked at by its last step
            self._batch = batch
            self._serve(batch)
            self._batch = []
            n_batches += 1
            if n_batches >= self._most_batches:
                self._start_thread()
                break

    def _serve(self, batch: list[Ticket]) -> None:
        """Generate a batch; whatever fails is told to its requests alone."""
        rows = [Row(ticket, self._tokenizer, self._ends) for ticket in batch]
        for ticket in batch:
            ticket.begun = time.monotonic()
        self._metrics.batch_size.observe(len(batch))
        try:
            report = self._generate(rows)
            ends = [self._end(row, report, place) for place, row in enumerate(rows)]
        except Exception as error:
            logger.exception("a batch of %d failed", len(batch))
            failed = _out_of_memory() if isinstance(error, torch.OutOfMemoryError) else _internal()
            for ticket in batch:
                ticket.tell(Event(error=failed))
            self._look_at_device()
            return
        for row, end in zip(rows, ends, strict=True):
            row.ticket.tell(Event(end=end))

    def _generate(self, rows: list[Row]) -> Report:
        first = rows[0].ticket
        inputs = merged([row.ticket.prepared.inputs for row in rows], self._pad_token_id)
        if first.sampling.seed is not None:
            torch.manual_seed(first.sampling.seed)
        try:
            with self._state.options(**first.pruning.changes):
                self._model.generate(
                    **move_inputs(BatchFeature(inputs), self._model),
                    **first.sampling.arguments,
                    max_new_tokens=max(row.ticket.prepared.max_new_tokens for row in rows),
                    pad_token_id=self._pad_token_id,
                    streamer=_Rows(rows),
                    stopping_criteria=StoppingCriteriaList([_Stops(rows, self)]),
                )
                return self._state.report
        finally:
            if first.sampling.seed is not None:
                torch.seed()  # what others draw must not follow from it

    def _end(self, row: Row, report: Report, place: int) -> dict[str, Any]:
        """What an answer ends with."""
        prepared = row.ticket.prepared
        sample = report.samples[place] if place < len(report.samples) else None
        usage = {
            "prompt_tokens": prepared.n_prompt,
            "completion_tokens": row.n_tokens,
            "total_tokens": prepared.n_prompt + row.n_tokens,
        }
        kept = {
            "visual_tokens": prepared.n_visual,
            "visual_tokens_kept": prepared.n_visual if sample is None else round(sample.average_in, 2),
            "visual_tokens_last_layer": prepared.n_visual if sample is None else sample.final_tokens,
            "selector": report.selector,
            "path": report.path,
            "path_reason": report.path_reason,
            "skipped_because": report.skipped_because,
            "budget_clamped": None if sample is None else sample.budget_clamped,
            "images_cached": report.images_cached,
            "batch_size": max(1, len(report.samples)),
        }
        return {"finish_reason": row.finish_reason or "stop", "usage": usage, "sparsevlm": kept}

    def _look_at_device(self) -> None:
        """After some errors a GPU does nothing any more until the process ends."""
        if self._model.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._model.device)
        except Exception as error:
            logger.exception("the device is lost")
            self.lost_device = type(error).__name__


def _internal() -> RequestError:
    return RequestError("the server failed to generate an answer; its log says why.", status=500, code="internal_error")


def _out_of_memory() -> RequestError:
    return RequestError(
        "the device has not enough memory for this request and those that ran with it; try again, or send less.",
        status=503,
        code="out_of_memory",
    )
