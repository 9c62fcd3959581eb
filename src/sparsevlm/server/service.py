"""A model and all that serves it, without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..state import SparseVLMState
from .batching import Event, Queue, Ticket
from .errors import RequestError
from .exchange import Exchange
from .images import ImageReader
from .merging import merges
from .metrics import Metrics
from .options import pruning_of, sampling_of
from .prompts import PromptMaker
from .protocol import ChatRequest, ImagePart, parse
from .remote import RemoteImages
from .settings import ServerSettings
from .worker import Worker

logger = logging.getLogger(__name__)

_N_PREPARING = 4  # threads that decode images and write prompts
_N_FETCHING = 16  # of requests with images of the network
_LOOK_EVERY = 0.25  # seconds between two looks at the worker
_MOST_STARTS = 4
_GRACE = 5.0  # seconds for requests that were told to end


class Service:
    """Serves requests with one pruned model.

    Parameters
    ----------
    state : SparseVLMState
        Of the model.
    processor : ProcessorMixin
    settings : ServerSettings
    remote : RemoteImages, optional

    Attributes
    ----------
    n_in_flight : int
        Requests that were let in and are not answered yet.
    """

    def __init__(
        self, state: SparseVLMState, processor: Any, settings: ServerSettings, remote: RemoteImages | None = None
    ) -> None:
        self.state, self.settings, self.created = state, settings, int(time.time())
        self.queue = Queue(settings)
        self.metrics = Metrics(lambda: len(self.queue), lambda: len(self.worker.running))
        self.worker = Worker(state, processor, self.queue, self.metrics)
        self._merges_images = merges(processor)
        if not self._merges_images:
            logger.warning("sparsevlm: this processor's inputs cannot be put together: images are answered one by one")
        images = ImageReader(settings, remote or RemoteImages(settings))
        self._prompts = PromptMaker(state.adapter, processor, images, settings)
        self._generation_config = state.adapter.model.generation_config
        self._preparing = ThreadPoolExecutor(_N_PREPARING, "sparsevlm-prepare")
        self._fetching = ThreadPoolExecutor(_N_FETCHING, "sparsevlm-fetch")
        self.aborted = asyncio.Event()
        self.n_in_flight = 0
        self._drain_until: float | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Context in which requests are served."""
        self.worker.start()
        watch = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            for ticket in [*self.queue.close(), *self.worker.running]:
                ticket.is_cancelled = True
            await asyncio.to_thread(self.worker.join, _GRACE)
            self._preparing.shutdown(wait=False, cancel_futures=True)
            self._fetching.shutdown(wait=False, cancel_futures=True)
            self._prompts.close()

    async def _watch(self) -> None:
        """Start the worker anew where its thread has died."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            if self.worker.is_alive or self.worker.n_started >= _MOST_STARTS:
                if not self.worker.is_alive:
                    self._refuse_waiting()
                continue
            logger.error("the generating thread has died: it is started anew")
            self.metrics.restarts.inc()
            self.worker.start()

    def _refuse_waiting(self) -> None:
        for ticket in [*self.queue.close(), *self.worker.running]:
            ticket.tell(Event(error=_unwell("the generating thread has died")))

    @property
    def trouble(self) -> str | None:
        """Why no request can be served, if so."""
        worker = self.worker
        if worker.lost_device is not None:
            return f"the device is lost ({worker.lost_device})"
        if not worker.is_alive:
            return "the generating thread has died"
        if worker.running and time.monotonic() - worker.last_step > self.settings.request_timeout:
            return "the model does not answer"
        return None

    @property
    def is_draining(self) -> bool:
        """Tells whether no request is let in any more."""
        return self._drain_until is not None

    def drain(self) -> None:
        """Let no request in any more."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self.settings.shutdown_timeout

    @property
    def may_end(self) -> bool:
        """Tells whether draining has ended; requests whose time is over are told to end."""
        if self._drain_until is None:
            return False
        if self.n_in_flight and time.monotonic() > self._drain_until:
            self.aborted.set()
        return not self.n_in_flight or time.monotonic() > self._drain_until + _GRACE

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """Context of a request that is let in.

        Raises
        ------
        RequestError
        """
        if self.is_draining:
            raise RequestError("the server shuts down.", status=503, code="shutting_down")
        if (trouble := self.trouble) is not None:
            raise _unwell(trouble)
        if self.n_in_flight >= self.settings.max_batch + self.settings.max_waiting:
            raise RequestError(
                f"{self.n_in_flight} requests are being served, and no more are taken; try again.",
                status=429,
                code="too_many_requests",
            )
        self.n_in_flight += 1
        try:
            yield
        finally:
            self.n_in_flight -= 1

    async def accept(self, body: bytes, exchange: Exchange) -> tuple[ChatRequest, Ticket]:
        """Read a request, and let it wait for the model.

        Raises
        ------
        ClientGoneError
        RequestError
        """
        loop = asyncio.get_running_loop()

        def what() -> str:
            return "while it was read"

        with self.queue.preparing():
            request = await exchange.wait(loop.run_in_executor(self._preparing, parse, body), what)
            exchange.record["model"], exchange.record["stream"] = self.settings.model_name, bool(request.stream)
            if request.model != self.settings.model_name:
                raise self.no_model(request.model)
            pool = self._fetching if _names_remote_images(request) else self._preparing
            make = loop.run_in_executor(pool, self._ticket, request, exchange.give_up, loop)
            ticket = await exchange.wait(make, what)
            self.queue.put(ticket)
        return request, ticket

    def no_model(self, name: str) -> RequestError:
        """The error of a request for another model."""
        return RequestError(
            f"there is no model {name!r} here; there is {self.settings.model_name!r}.",
            status=404,
            param="model",
            code="model_not_found",
        )

    def _ticket(self, request: ChatRequest, give_up: float, loop: asyncio.AbstractEventLoop) -> Ticket:
        pruning = pruning_of(self.state, request.sparsevlm)
        prepared = self._prompts.prepare(request, give_up)
        sampling = sampling_of(request, self._generation_config)
        is_alone = sampling.seed is not None or (prepared.n_visual > 0 and not self._merges_images)
        return Ticket(prepared, pruning, sampling, request.stops, loop, is_alone)

    def count(self, ticket: Ticket, end: dict[str, Any], arrived: float) -> None:
        """Count an answered request."""
        usage, kept, seconds = end["usage"], end["sparsevlm"], self.metrics.seconds
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.generated_tokens.inc(usage["completion_tokens"])
        self.metrics.visual_tokens.inc(kept["visual_tokens"])
        self.metrics.kept_tokens.inc(kept["visual_tokens_kept"])
        seconds.labels("queue").observe(ticket.begun - ticket.queued)
        seconds.labels("first_token").observe(ticket.first_token - arrived)
        seconds.labels("total").observe(time.monotonic() - arrived)


def _unwell(trouble: str) -> RequestError:
    return RequestError(f"the server cannot answer: {trouble}.", status=503, code="unavailable")


def _names_remote_images(request: ChatRequest) -> bool:
    return any(
        isinstance(part, ImagePart) and part.image_url.url[:4].lower() == "http"
        for message in request.messages
        for part in message.parts
    )
