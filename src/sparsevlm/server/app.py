"""The paths of the server."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..state import SparseVLMState
from .batching import Ticket
from .errors import ClientGoneError, RequestError
from .exchange import Exchange
from .gate import RECORD, Gate
from .protocol import Chunks, completion
from .remote import RemoteImages
from .service import Service
from .settings import ServerSettings

_CLIENT_GONE = 499  # nobody reads it but the log
_MESSAGES = {404: "there is no path {path} here.", 405: "the path {path} does not take {method}."}


def create_app(
    state: SparseVLMState, processor: Any, settings: ServerSettings, remote: RemoteImages | None = None
) -> Gate:
    """Make the ASGI application of a server.

    Parameters
    ----------
    state : SparseVLMState
        From :func:`sparsevlm.apply_sparsevlm`, with the options of requests that name none.
    processor : ProcessorMixin
        Of the model.
    settings : ServerSettings
    remote : RemoteImages, optional
        What fetches images of the network, if the settings allow that.

    Returns
    -------
    Gate
        The application; its ``service`` has the queue, the worker and the metrics.
    """
    service = Service(state, processor, settings, remote)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(RequestError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    app.add_exception_handler(Exception, _answer_failure)
    _add_paths(app, service)
    return Gate(app, service)


def _add_paths(app: FastAPI, service: Service) -> None:
    name = service.settings.model_name
    model = {"id": name, "object": "model", "created": service.created, "owned_by": "sparsevlm"}

    @app.get("/health")
    async def health() -> Response:
        trouble = "the server shuts down" if service.is_draining else service.trouble
        said = {"status": "ok"} if trouble is None else {"status": "unavailable", "reason": trouble}
        return JSONResponse(said, 200 if trouble is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> Response:
        if asked != name:
            raise service.no_model(asked)
        return JSONResponse(model)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(f"the body must be of type application/json, got {kind[:80]!r}.", status=415)
        return _Completion(service)


class _Completion(Response):
    """The answer of one request, made while it is sent.

    Parameters
    ----------
    service : Service
    """

    def __init__(self, service: Service) -> None:
        self._service, self._model = service, service.settings.model_name
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the request, let it wait for the model, and send what comes.

        Raises
        ------
        ClientGoneError
        RequestError
        """
        service, record, ticket = self._service, scope[RECORD], None
        with service.admission():
            give_up = record["arrived"] + service.settings.request_timeout
            exchange = Exchange(receive, give_up, service.aborted, record["fields"])
            try:
                body = await exchange.body(Headers(scope=scope), service.settings.max_body_bytes)
                asked, ticket = await service.accept(body, exchange)
                if asked.stream:
                    chunks = Chunks(self._id, self._created, self._model, includes_usage=asked.includes_usage)
                    end = await exchange.stream(send, ticket, await exchange.next_event(ticket), chunks)
                else:
                    text, end = await self._whole(exchange, ticket)
                    said = completion(self._id, self._created, self._model, text, end)
                    await exchange.wait(JSONResponse(said)(scope, receive, send), lambda: "while it was sent")
                if end is not None:
                    service.count(ticket, end, record["arrived"])
            finally:
                if ticket is not None:
                    ticket.is_cancelled = True
                exchange.close()

    async def _whole(self, exchange: Exchange, ticket: Ticket) -> tuple[str, dict[str, Any]]:
        """The text of an answer, and what it ends with."""
        texts = []
        while True:
            found = await exchange.next_event(ticket)
            texts.append(found.text)
            if found.end is not None:
                return "".join(texts), found.end


def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    request.scope[RECORD]["fields"]["error"] = error.code or error.param
    return JSONResponse(error.body, error.status, headers=error.headers)


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = _MESSAGES.get(error.status_code, str(error.detail))
    said = RequestError(words.format(path=request.url.path, method=request.method), status=error.status_code)
    return JSONResponse(said.body, error.status_code, headers={**said.headers, **(error.headers or {})})


def _answer_failure(request: Request, error: Exception) -> Response:
    failed = RequestError("the server failed; its log says why.", status=500, code="internal_error")
    return JSONResponse(failed.body, failed.status)


def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)
