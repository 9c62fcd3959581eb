"""Errors of requests, in the shape in which OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_MOST_CHARACTERS = 600  # of a message: what it quotes may be as long as the request
_MOST_OF_PARAM = 200  # which may be a key of the request
RETRY_AFTER = 1  # seconds


class RequestError(Exception):
    """What a request is answered where it cannot be served.

    Parameters
    ----------
    message : str
    status : int
        Of HTTP.
    param : str, optional
        The parameter that is at fault.
    code : str, optional
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        if len(message) > _MOST_CHARACTERS:
            message = f"{message[: _MOST_CHARACTERS // 2]} ... {message[-_MOST_CHARACTERS // 2 :]}"
        super().__init__(message)
        self.status, self.code = status, code
        self.param = None if param is None else param[:_MOST_OF_PARAM]

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON; what cannot be written in UTF-8 is replaced."""
        message = str(self).encode("utf-8", "replace").decode()
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER)}
        # What has not been read of a body would be taken for the next request.
        return {"connection": "close"} if self.status in (408, 413) else {}


class ClientGoneError(Exception):
    """The client has closed its connection: there is nobody to answer."""
