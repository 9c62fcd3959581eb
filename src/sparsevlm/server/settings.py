"""Every setting of the server, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path

from ..config import check_above_zero, check_whole

_MEBIBYTE = 1 << 20
_LEAST = {"port": 0, "max_waiting": 0, "max_images": 0, "image_cache": 0}  # of all other whole numbers 1
_MAY_BE_ZERO = ("batch_wait", "shutdown_timeout")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of :func:`sparsevlm.server.app.create_app`; immutable, validated on construction.

    Parameters
    ----------
    model_name : str
        Under which requests name the model.
    host, port
        To listen on; port 0 takes a free one.
    api_key : str, optional
        That every request but ``/health`` must bring as ``Authorization: Bearer KEY``.
    allow_remote_images : bool
        Whether http and https addresses of images are fetched.
    image_root : Path, optional
        Folder under which images may be named by ``file://`` or a relative path.
    max_body_bytes, max_images, max_image_bytes, max_image_pixels : int
        Limits of a request, and of each of its images; pixels also of all its images together times four.
    max_prompt_tokens, max_new_tokens : int
        Limits of a request; a request that names no number of new tokens gets the latter.
    max_batch : int
        Requests that are generated as one batch at most.
    max_batch_tokens : int
        Prompt tokens of a batch at most, padding included.
    max_waiting : int
        Requests beyond ``max_batch`` that are accepted at most; others are answered 429.
    batch_wait : float
        Seconds that a request waits at most for others that are being prepared.
    request_timeout : float
        Seconds from a request's first byte to its last.
    shutdown_timeout : float
        Seconds that running requests have to end after SIGTERM.
    image_cache : int
        Bytes of encoded images that the engine keeps; 0: none.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    allow_remote_images: bool = False
    image_root: Path | None = None
    max_body_bytes: int = 32 * _MEBIBYTE
    max_images: int = 16
    max_image_bytes: int = 16 * _MEBIBYTE
    max_image_pixels: int = 1 << 25
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 1024
    max_batch: int = 8
    max_batch_tokens: int = 32768
    max_waiting: int = 64
    batch_wait: float = 0.05
    request_timeout: float = 300.0
    shutdown_timeout: float = 30.0
    image_cache: int = 512 * _MEBIBYTE

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self) if one.type == "int"):
            check_whole(name, getattr(self, name), _LEAST.get(name, 1), 65535 if name == "port" else None)
        for name in (one.name for one in fields(self) if one.type == "float"):
            value = getattr(self, name)
            if not (name in _MAY_BE_ZERO and isinstance(value, Real) and not isinstance(value, bool) and value == 0):
                check_above_zero(name, value)
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be a text of printable ASCII characters; leave it out to ask for none.")
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise ValueError(f"image_root {self.image_root} is no folder.")
