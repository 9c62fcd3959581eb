"""Answers of one model to a question, dense and under several selectors, as they are generated."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..inputs.turns import move_inputs, process, render_turn
from ..report import Report
from ..selection.selectors import DEFAULT
from ..state import SparseVLMState
from .question import Question

logger = logging.getLogger(__name__)

WAITING, ANSWERING, DONE, STOPPED, FAILED = "waiting", "answering", "done", "stopped", "failed"
_OPEN = (WAITING, ANSWERING)
_LARGE = 0.99  # a budget that any layers can hold, and at which something is dropped
_BETWEEN_SIGHTS = 40.0  # milliseconds from one update of a growing answer to the next
_BETWEEN_LOOKS = 0.1  # seconds, while another page has the model
# What a user causes; anything else is a fault, and goes into the log with its traceback.
_OF_USERS = (ValueError, TypeError, IndexError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Side:
    """A column of the page: the options that its answer is generated under.

    Attributes
    ----------
    name : str
    selector : str, optional
    keep : float, optional
        Share of the visual tokens; ``None``: adaptive.
    """

    name: str
    selector: str | None = None
    keep: float | None = 1.0

    @classmethod
    def pruned(cls, selector: str, keep: float | None) -> Side:
        """The column of a selector; a whole number of a slider is a share, too."""
        return cls(selector, selector, None if keep is None else float(keep))


DENSE = Side("dense")


@dataclass(frozen=True)
class Answer:
    """Answer of one side, as far as it is.

    Attributes
    ----------
    side : Side
    state : str
        One of ``WAITING``, ``ANSWERING``, ``DONE``, ``STOPPED`` and ``FAILED``.
    text : str
    n_tokens : int
        New tokens, the end of the turn included.
    first_token_ms, total_ms : float, optional
        From the call of ``generate`` to its first new token, and to its end; waiting for other pages left out.
    report : Report, optional
    message : str
        Why it failed.
    """

    side: Side
    state: str = WAITING
    text: str = ""
    n_tokens: int = 0
    first_token_ms: float | None = None
    total_ms: float | None = None
    report: Report | None = None
    message: str = ""

    @property
    def is_open(self) -> bool:
        """Tells whether more of it will come."""
        return self.state in _OPEN

    def but(self, **changes: Any) -> Answer:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


class Answerer:
    """A model under SparseVLM that answers the questions of several pages, one at a time.

    It has a lock of its own around the model's: a page that goes leaves the queue, no time holds another page's answer,
    and the processor, whose tokenizer takes no two threads, is used by one.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin
    state : SparseVLMState
        Of the model.
    """

    def __init__(self, model: Any, processor: Any, state: SparseVLMState) -> None:
        self.processor, self._model, self._state = processor, model, state
        self._lock = threading.Lock()

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self._state.adapter.n_layers

    @property
    def name(self) -> str:
        """Class and device of the model."""
        return f"{self._state.adapter.name} on {self._model.device}, {str(self._model.dtype).removeprefix('torch.')}"

    def refusals(self, selectors: Sequence[str]) -> dict[str, str]:
        """Selectors that this model takes at no budget, with the reason."""
        found = {}
        for name in selectors:
            try:
                with self._state.options(selector=name, keep=_LARGE):
                    pass
            except (ValueError, NotImplementedError) as error:
                found[name] = str(error)
        return found

    def warm_up(self, question: Question) -> None:
        """Ask once, dense and pruned, so that no later time is that of a first call."""
        for _ in self.compare(question, [DENSE, Side.pruned(DEFAULT, 0.5)], threading.Event()):
            pass

    def compare(
        self,
        question: Question,
        sides: Sequence[Side],
        stop: threading.Event,
        known: Mapping[Side, Answer] | None = None,
    ) -> Iterator[tuple[Answer, ...]]:
        """Answer under each side in turn; yields all answers whenever one has grown.

        Parameters
        ----------
        question : Question
        sides : sequence of Side
        stop : Event
            Ends the running answer behind its next token and leaves out the others; set when the iterator is closed.
        known : mapping of Side to Answer, optional
            Answers that are not generated again.
        """
        known = known or {}
        answers = [known.get(side, Answer(side)) for side in sides]
        yield tuple(answers)
        updates: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        threading.Thread(target=self._answer_all, args=(question, list(answers), stop, updates), daemon=True).start()
        try:
            while any(answer.is_open for answer in answers):
                index, answers[index] = updates.get()
                while not updates.empty():  # only the newest of each is shown
                    index, answers[index] = updates.get()
                yield tuple(answers)
        finally:
            stop.set()

    def _answer_all(
        self, question: Question, answers: Sequence[Answer], stop: threading.Event, updates: queue.SimpleQueue[Any]
    ) -> None:
        for index, answer in enumerate(answers):
            if answer.is_open:

                def put(grown: Answer, at: int = index) -> None:
                    updates.put((at, grown))

                self._answer(question, answer, stop, put)

    def _answer(self, question: Question, answer: Answer, stop: threading.Event, put: Callable[[Answer], None]) -> None:
        """Generate one answer when it is its turn; whatever goes wrong is a part of it."""
        while not self._lock.acquire(timeout=_BETWEEN_LOOKS):
            if stop.is_set():
                break
        else:
            try:
                if not stop.is_set():
                    put(self._generate(question, answer.but(state=ANSWERING), stop, put))
                    return
            except _OF_USERS as error:
                put(answer.but(state=FAILED, message=" ".join(str(error).split())))
                return
            except Exception as error:
                logger.exception("sparsevlm: a question on the page failed")
                put(answer.but(state=FAILED, message=f"{type(error).__name__}: {' '.join(str(error).split())}"))
                return
            finally:
                self._lock.release()
        put(answer.but(state=STOPPED))

    def _generate(
        self, question: Question, answer: Answer, stop: threading.Event, put: Callable[[Answer], None]
    ) -> Answer:
        put(answer)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        prompt = render_turn(self.processor, messages)
        inputs = move_inputs(process(self.processor, [prompt], [[question.picture]]), self._model)
        side = answer.side
        with self._state.options(selector=side.selector, keep=side.keep):
            streamer = _Streamer(self.processor, answer, put)
            self._model.generate(
                **inputs,
                max_new_tokens=question.max_new_tokens,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=[_stopped(stop)],
            )
            state = STOPPED if stop.is_set() else DONE
            return streamer.so_far().but(state=state, total_ms=streamer.elapsed, report=self._state.report)


class _Streamer:
    """Hands on the answer as it grows, not more often than is seen; ``generate`` gives it the prompt first."""

    def __init__(self, processor: Any, answer: Answer, hand_on: Callable[[Answer], None]) -> None:
        self._processor, self._answer, self._hand_on = processor, answer, hand_on
        self._ids, self._has_prompt, self._seen_ms = list[int](), False, 0.0
        self._begin = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Milliseconds since the call."""
        return (time.perf_counter() - self._begin) * 1e3

    def so_far(self) -> Answer:
        """The answer of all tokens that have come."""
        text = self._processor.batch_decode([self._ids], skip_special_tokens=True)[0].strip()
        return self._answer.but(text=text, n_tokens=len(self._ids))

    def put(self, value: Any) -> None:
        """Take the prompt, then new tokens."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        now, is_first = self.elapsed, not self._ids
        self._ids.extend(value.flatten().tolist())
        if is_first:
            self._answer = self._answer.but(first_token_ms=now)
        elif now - self._seen_ms < _BETWEEN_SIGHTS:
            return
        self._seen_ms, grown = now, self.so_far()
        # A character may be several tokens, and comes as a replacement until it is whole.
        self._hand_on(grown.but(text=grown.text.rstrip("\ufffd")))

    def end(self) -> None:
        """Part of the protocol of streamers."""


def _stopped(stop: threading.Event) -> Callable[..., torch.Tensor]:
    """Stopping criterion that ends all samples once an event is set."""

    def criterion(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    return criterion
