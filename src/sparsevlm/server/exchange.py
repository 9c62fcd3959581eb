"""One request while it is served: its time, its client, and what the log will say of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from starlette.types import Receive, Send

from .batching import Event, Ticket
from .errors import ClientGoneError, RequestError
from .protocol import Chunks, event

T = TypeVar("T")
_MOST_DRAINED = 4  # times the limit of a body: so much of one that is too large is read before it is refused
_DRAIN_SECONDS = 10.0
_LAST_SECONDS = 2.0  # for the event that tells of an error
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies are not to collect it
]


class Exchange:
    """Waits for what serves a request, no longer than its time, its client and the server last.

    Parameters
    ----------
    receive : Receive
        Of ASGI.
    give_up : float
        When its time is over, by ``time.monotonic``.
    aborted : asyncio.Event
        Set where the server will wait no longer.
    record : dict
        What the log will say.
    """

    def __init__(
        self, receive: Receive, give_up: float, aborted: asyncio.Event, record: MutableMapping[str, Any]
    ) -> None:
        self._receive, self.give_up, self.record = receive, give_up, record
        self._aborted = asyncio.ensure_future(aborted.wait())
        self._gone: asyncio.Future[None] | None = None

    def close(self) -> None:
        """Wait for nothing any more."""
        self._aborted.cancel()
        if self._gone is not None:
            self._gone.cancel()

    async def wait(self, work: Awaitable[T], what: Callable[[], str]) -> T:
        """The outcome of work; ``what`` gives what it is, for the error where it takes too long.

        Raises
        ------
        ClientGoneError
        RequestError
        """
        task = asyncio.ensure_future(work)
        watched = [one for one in (self._aborted, self._gone) if one is not None]
        left = max(0.0, self.give_up - time.monotonic())
        try:
            done, _ = await asyncio.wait({task, *watched}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return task.result()
        finally:
            task.cancel()
        if self._gone in done:
            raise ClientGoneError
        if self._aborted in done:
            raise RequestError("the server shuts down.", status=503, code="shutting_down")
        raise RequestError(f"the time of this request was over {what()}.", status=408, code="request_timeout")

    async def body(self, headers: Any, most: int) -> bytes:
        """The body of the request.

        Raises
        ------
        ClientGoneError
        RequestError
        """
        too_large = RequestError(
            f"the body has more than {most} bytes; send fewer or smaller images.", status=413, code="body_too_large"
        )
        announced = headers.get("content-length", "")
        is_large = announced.isdecimal() and len(announced) < 19 and int(announced) > most
        if is_large and headers.get("expect"):  # the client waits to be asked for it
            raise too_large
        content = bytearray()
        n_read, stop_draining = 0, 0.0
        while True:
            message = await self.wait(self._receive(), lambda: "before its body had come")
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece = message.get("body", b"")
            n_read += len(piece)
            if n_read > most or is_large:  # read on a little: a client that still writes would not see the answer
                content.clear()
                stop_draining = stop_draining or time.monotonic() + _DRAIN_SECONDS
                if n_read > _MOST_DRAINED * most or time.monotonic() > stop_draining:
                    raise too_large
            else:
                content += piece
            if not message.get("more_body"):
                break
        if n_read > most or is_large:
            raise too_large
        self._gone = asyncio.ensure_future(self._disconnected())
        return bytes(content)

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def next_event(self, ticket: Ticket) -> Event:
        """The next event of a request with the model.

        Raises
        ------
        ClientGoneError
        RequestError
            What ended it instead of an answer, too.
        """

        def phase() -> str:
            return "before its answer was complete" if ticket.begun else "while it waited for the model"

        found = await self.wait(ticket.events.get(), phase)
        if found.error is not None:
            raise found.error
        if found.end is not None:
            self.record.update(finish_reason=found.end["finish_reason"], **found.end["usage"])
            for name in ("visual_tokens", "visual_tokens_kept", "batch_size"):
                self.record[name] = found.end["sparsevlm"][name]
        return found

    async def stream(self, send: Send, ticket: Ticket, first: Event, chunks: Chunks) -> dict[str, Any] | None:
        """Send an answer as server-sent events; the value is what it ended with.

        An error is the last event, and the value is ``None`` then.
        """

        async def say(data: bytes, *, is_last: bool = False) -> None:
            body = {"type": "http.response.body", "body": data, "more_body": not is_last}
            await self.wait(send(body), lambda: "while it was sent")

        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            await say(chunks.opening())
            found = first
            while True:
                if found.text:
                    await say(chunks.text(found.text))
                if found.end is not None:
                    break
                found = await self.next_event(ticket)
            closing = chunks.closing(found.end)
            await say(b"".join(closing), is_last=True)
            return found.end
        except RequestError as error:
            self.record["error"] = error.code
            last = send({"type": "http.response.body", "body": event(error.body), "more_body": False})
            with contextlib.suppress(asyncio.TimeoutError):  # of a client that does not read
                await asyncio.wait_for(last, _LAST_SECONDS)
        except ClientGoneError:
            self.record["error"] = "client_gone"
        return None
