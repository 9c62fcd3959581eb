"""A server from its start to its end."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import uvicorn

from .gate import Gate
from .logs import FIELDS
from .settings import ServerSettings

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves an application; told to end, it first ends what it has begun.

    Parameters
    ----------
    app : Gate
    """

    def __init__(self, app: Gate) -> None:
        super().__init__(
            uvicorn.Config(
                app, http="h11", ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
                timeout_graceful_shutdown=5,
            )
        )  # fmt: skip
        self._service = app.service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end at the first signal; end at once at the second."""
        if self._service.is_draining:
            self.should_exit = self.force_exit = True
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Tells uvicorn whether to end."""
        return await super().on_tick(counter) or self._service.may_end


def listen(settings: ServerSettings) -> socket.socket:
    """A socket on the host and port of the settings.

    Raises
    ------
    OSError
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {settings.host} port {settings.port}: {error}; choose another.") from error


def serve(app: Gate) -> None:
    """Serve an application until a signal ends it.

    Raises
    ------
    OSError
        If the port is taken.
    """
    settings = app.service.settings
    with listen(settings) as bound:
        host, port = bound.getsockname()[:2]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if settings.api_key is None and settings.host not in _LOOPBACK:
            logger.warning("sparsevlm: %s can be reached from other machines, and asks for no key (--api-key)", where)
        logger.info("serving", extra={FIELDS: {"url": f"{where}/v1", "model": settings.model_name}})
        Server(app).run(sockets=[bound])
