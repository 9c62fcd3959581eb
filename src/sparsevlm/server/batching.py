"""Requests that wait, and which of them are generated together."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import RequestError
from .merging import shapes
from .options import Pruning, Sampling
from .prompts import Prepared
from .settings import ServerSettings


@dataclass(frozen=True)
class Event:
    """News of a request that is generated.

    Attributes
    ----------
    text : str
        That was added.
    end : dict, optional
        What the answer ends with: ``finish_reason``, ``usage`` and ``sparsevlm``.
    error : RequestError, optional
        What ended it instead.
    """

    text: str = ""
    end: dict[str, Any] | None = None
    error: RequestError | None = None


@dataclass(eq=False)
class Ticket:
    """A request that waits for the model, or is with it.

    Attributes
    ----------
    prepared, pruning, sampling
        What it asks for.
    stops : tuple of str
    loop : AbstractEventLoop
        That reads ``events``.
    is_alone : bool
        Whether no other may run with it.
    is_cancelled : bool
        Whether nobody waits for it any more.
    queued, begun, first_token : float
        When, by ``time.monotonic``; 0: not yet.
    """

    prepared: Prepared
    pruning: Pruning
    sampling: Sampling
    stops: tuple[str, ...]
    loop: asyncio.AbstractEventLoop
    is_alone: bool = False
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False
    queued: float = 0.0
    begun: float = 0.0
    first_token: float = 0.0

    def tell(self, event: Event) -> None:
        """Hand an event to whoever reads them, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def key(self) -> Any:
        """Equal for requests that may be generated together."""
        if self.is_alone:
            return id(self)
        return self.pruning.key, self.sampling, shapes(self.prepared.inputs)


class Queue:
    """Requests in the order in which they came, given out in batches.

    Parameters
    ----------
    settings : ServerSettings
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._n_preparing, self._is_closed = 0, False

    def __len__(self) -> int:
        return len(self._waiting)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Context of a request that will be put soon: a batch waits for it a little."""
        with self._changed:
            self._n_preparing += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_preparing -= 1
                self._changed.notify_all()

    def put(self, ticket: Ticket) -> None:
        """Let a request wait for its turn."""
        ticket.queued = time.monotonic()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify_all()

    def take(self) -> list[Ticket]:
        """The next batch: the request that came first, and those that may run with it; empty once it is closed."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._is_closed:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                batch = self._next()
                left = self._waiting[0].queued + self._settings.batch_wait - time.monotonic()
                if len(batch) < self._settings.max_batch and self._n_preparing and left > 0:
                    self._changed.wait(left)
                    continue
                for ticket in batch:
                    self._waiting.remove(ticket)
                return batch

    def close(self) -> list[Ticket]:
        """Give out no batch any more; the value is what still waits."""
        with self._changed:
            self._is_closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return left

    def _drop_cancelled(self) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)

    def _next(self) -> list[Ticket]:
        key, batch, longest = self._waiting[0].key, list[Ticket](), 0
        for ticket in self._waiting:
            length = max(longest, ticket.prepared.n_prompt)
            fits = not batch or length * (len(batch) + 1) <= self._settings.max_batch_tokens
            if fits and len(batch) < self._settings.max_batch and ticket.key == key:
                batch.append(ticket)
                longest = length
        return batch
