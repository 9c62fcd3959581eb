"""What every request passes: its id, the key, the log and the count."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError
from .logs import FIELDS
from .service import Service

RECORD = "sparsevlm.record"  # of a scope: when the request arrived, and what the log will say of it
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions")
_OPEN = "/health"  # without a key
logger = logging.getLogger(__name__)


class Gate:
    """ASGI application around another.

    Parameters
    ----------
    app : ASGIApp
    service : Service
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self.service = app, service
        key = service.settings.api_key
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the server's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        record: dict[str, Any] = {"arrived": time.monotonic(), "fields": {}}
        scope[RECORD] = record
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, receive, send_on)
        except RequestError as error:
            await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, send_on)
        except Exception:
            logger.exception("a request failed", extra={FIELDS: {"request_id": request_id}})  # it was answered
        finally:
            self._note(scope, request_id, status, record)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path == _OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise RequestError(
                "the request brings no key, or a wrong one; wanted is Authorization: Bearer KEY.",
                status=401,
                code="invalid_api_key",
            )

    def _note(self, scope: Scope, request_id: str, status: int, record: dict[str, Any]) -> None:
        path = scope["path"] if scope["path"] in _PATHS else "other"
        self.service.metrics.requests.labels(path, str(status)).inc()
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(time.monotonic() - record["arrived"], 4),
            **record["fields"],
        }
        level = logging.DEBUG if path in ("/health", "/metrics") else logging.INFO
        logger.log(level, "request", extra={FIELDS: fields})
