"""Images of the network: fetched from public addresses alone, within bounds of bytes, time and redirects."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from .errors import RequestError
from .settings import ServerSettings

_MOST_REDIRECTS = 3
_MOST_SECONDS = 20.0
_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_CODE = "image_fetch_failed"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = tuple[int, str, int]  # family, address, port


def is_public(address: str) -> bool:
    """Tells whether an IP address is one of the public network, and so is the IPv4 address that it holds."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None or ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None and not is_public(str(inner)):
            return False
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_reserved
    return ip.is_global and not special and not ip.is_unspecified


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, str(where[0]), port) for family, _, _, _, where in found]


class RemoteImages:
    """Fetches images by http and https.

    A name is resolved once, each of its addresses must be public, and the connection goes to one that was checked; so
    for every redirect. Proxies of the environment are not used.

    Parameters
    ----------
    settings : ServerSettings
    resolve, is_allowed : callable, optional
        The addresses of a host and port, and whether an address may be connected to.
    """

    def __init__(
        self,
        settings: ServerSettings,
        resolve: Callable[[str, int], list[Address]] = resolve,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._settings, self._resolve, self._is_allowed = settings, resolve, is_allowed

    def fetch(self, url: str, param: str, give_up: float) -> bytes:
        """The bytes behind an address.

        Parameters
        ----------
        url : str
        param : str
            That errors name.
        give_up : float
            When it has to be there, by ``time.monotonic``; it has 20 seconds in any case.

        Raises
        ------
        RequestError
        """
        if not self._settings.allow_remote_images:
            raise RequestError(
                "this server fetches no images (--allow-remote-images); send the image as a data: address.",
                param=param,
                code="image_source_refused",
            )
        give_up = min(give_up, time.monotonic() + _MOST_SECONDS)
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                content, location = self._ask(url, param, give_up)
                if location is None:
                    return content
                url = urljoin(url, location)
            except (OSError, http.client.HTTPException, ValueError):
                raise RequestError("the image cannot be fetched from its address.", param=param, code=_CODE) from None
        raise RequestError(
            f"the address of the image redirects more than {_MOST_REDIRECTS} times.", param=param, code=_CODE
        )

    def _ask(self, url: str, param: str, give_up: float) -> tuple[bytes, str | None]:
        """The content behind an address, or where it redirects to."""
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise RequestError(
                "the address of an image must be http://host/path or https://host/path, without a user's name.",
                param=param,
                code="image_source_refused",
            )
        connection = _Connection(host, port, self._connected(host, port, param, give_up), parts.scheme == "https")
        # What comes byte by byte never runs into a socket's own timeout.
        watch = threading.Timer(max(0.0, give_up - time.monotonic()), connection.abort)
        watch.daemon = True
        watch.start()
        try:
            connection.connect()
            connection.request("GET", _target(parts), headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            answer = connection.getresponse()
            if answer.status in _REDIRECTS and (location := answer.getheader("location")):
                return b"", location
            if answer.status != 200 or answer.getheader("content-encoding", "identity") != "identity":
                raise ValueError
            content = self._read(answer, param)
            if connection.is_aborted:  # which looks like the end of a page of unknown length
                raise TimeoutError
            return content, None
        finally:
            watch.cancel()
            connection.close()

    def _read(self, answer: http.client.HTTPResponse, param: str) -> bytes:
        most, content = self._settings.max_image_bytes, bytearray()
        while chunk := answer.read1(_CHUNK):
            content += chunk
            if len(content) > most:
                raise RequestError(
                    f"the image behind the address has more than {most} bytes.",
                    status=413,
                    param=param,
                    code="image_too_large",
                )
        if answer.length:  # the connection ended before what was announced
            raise ValueError
        return bytes(content)

    def _connected(self, host: str, port: int, param: str, give_up: float) -> socket.socket:
        addresses = self._resolve(host, port)
        if not addresses or not all(self._is_allowed(address) for _, address, _ in addresses):
            raise RequestError(
                "the address of the image is not one of the public network.", param=param, code="image_source_refused"
            )
        for place, (family, address, at) in enumerate(addresses):
            one = socket.socket(family, socket.SOCK_STREAM)
            try:
                one.settimeout(max(0.01, give_up - time.monotonic()))
                one.connect((address, at))
            except OSError:
                one.close()
                if place == len(addresses) - 1:
                    raise
            else:
                return one
        raise OSError


class _Connection(http.client.HTTPConnection):
    """A connection over a socket that is there already."""

    def __init__(self, host: str, port: int, connected: socket.socket, is_secure: bool) -> None:
        self.default_port = 443 if is_secure else 80  # what the header Host need not name
        super().__init__(host, port)
        self._connected, self._is_secure, self.is_aborted = connected, is_secure, False

    def connect(self) -> None:
        """Take the socket, and speak TLS over it where the address says so."""
        self.sock = self._connected
        if self._is_secure:
            context = ssl.create_default_context()
            secure = context.wrap_socket(self._connected, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock = self._connected = secure  # first, so that a handshake can be ended
            secure.do_handshake()

    def abort(self) -> None:
        """End what goes on, from another thread."""
        self.is_aborted = True
        with contextlib.suppress(OSError):
            self._connected.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, whether it was taken or not."""
        super().close()
        self._connected.close()


def _target(parts: SplitResult) -> str:
    path = parts.path or "/"
    return f"{path}?{parts.query}" if parts.query else path
