"""Images that a request names: found, bounded, decoded."""

from __future__ import annotations

import binascii
import io
import os
import stat
from base64 import b64decode
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from PIL import Image

from ..inputs import decode_image
from ..inputs.media import check_aspect_ratio
from .errors import RequestError
from .remote import RemoteImages
from .settings import ServerSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # a JPEG of several images is of the format MPO
_CODE = "invalid_image"
_PIXELS_OF_ALL = 4  # times the pixels of one
_OUTSIDE = "it is no file under the folder that this server reads images from."


class ImageReader:
    """Reads the images of requests.

    Parameters
    ----------
    settings : ServerSettings
    remote : RemoteImages
    """

    def __init__(self, settings: ServerSettings, remote: RemoteImages) -> None:
        self._settings, self._remote = settings, remote
        self._root = None if settings.image_root is None else Path(os.path.realpath(settings.image_root))

    def read(self, urls: list[tuple[str, str]], give_up: float) -> list[Image.Image]:
        """Images as 8-bit RGB.

        Parameters
        ----------
        urls : list of (url, param)
            Each with the parameter that errors name.
        give_up : float
            When they have to be there, by ``time.monotonic``.

        Raises
        ------
        RequestError
        """
        if len(urls) > self._settings.max_images:
            raise RequestError(
                f"the request has {len(urls)} images, and this server takes up to {self._settings.max_images}.",
                param="messages",
                code="too_many_images",
            )
        images, n_pixels = [], 0
        for url, param in urls:
            content = self._content(url, param, give_up)
            width, height = self._checked_size(content, param)
            n_pixels += width * height
            if n_pixels > _PIXELS_OF_ALL * self._settings.max_image_pixels:
                most = _PIXELS_OF_ALL * self._settings.max_image_pixels
                raise RequestError(
                    f"the images have more than {most} pixels together; send them smaller, or one by one.",
                    param=param,
                    code="image_too_large",
                )
            images.append(_decoded(content, (width, height), param))
        return images

    def _content(self, url: str, param: str, give_up: float) -> bytes:
        if url[:5].lower() == "data:":
            content = self._of_data(url, param)
        elif url[:7].lower() in ("http://", "https:/"):
            content = self._remote.fetch(url, param, give_up)
        else:
            content = self._of_file(url, param)
        if len(content) > self._settings.max_image_bytes:
            raise self._too_many_bytes(param)
        return content

    def _too_many_bytes(self, param: str) -> RequestError:
        most = self._settings.max_image_bytes
        return RequestError(
            f"the image has more than {most} bytes; send it smaller.", status=413, param=param, code="image_too_large"
        )

    def _of_data(self, url: str, param: str) -> bytes:
        head, comma, content = url.partition(",")
        if not comma:
            raise RequestError("the data: address has no comma; wanted is data:image/png;base64,...", param=param)
        kind, *parameters = head[5:].lower().split(";")
        if not kind.strip().startswith("image/"):
            raise RequestError(
                f"the data: address is of type {kind[:40]!r}; wanted is an image/ type.", param=param, code=_CODE
            )
        if "base64" not in (one.strip() for one in parameters):
            return unquote_to_bytes(content.encode("utf-8", "replace"))
        if len(content) * 3 // 4 > 2 * self._settings.max_image_bytes:  # decoded it would be too large in any case
            raise self._too_many_bytes(param)
        try:
            return b64decode("".join(unquote(content).split()).encode("ascii"), validate=True)
        except (binascii.Error, ValueError) as error:
            why = "not ASCII" if isinstance(error, UnicodeError) else error
            raise RequestError(f"the image is not base64: {why}.", param=param, code=_CODE) from None

    def _of_file(self, url: str, param: str) -> bytes:
        if self._root is None:
            raise RequestError(
                "the image is named neither by a data: nor an http(s) address, and this server reads no files "
                "(--image-root).",
                param=param,
                code="image_source_refused",
            )
        refused = RequestError(f"the image cannot be read: {_OUTSIDE}", param=param, code="image_source_refused")
        try:
            path = self._path(url)
            real = Path(os.path.realpath(path))
            if not real.is_relative_to(self._root):
                raise refused
            return self._bytes_of(real, refused)
        except (OSError, ValueError):  # none such, unreadable, or no name of a file: outsiders learn not which
            raise refused from None

    def _path(self, url: str) -> Path:
        assert self._root is not None
        if url[:5].lower() != "file:":
            return self._root / url
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ValueError
        return self._root / unquote(parts.path)

    def _bytes_of(self, path: Path, refused: RequestError) -> bytes:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise refused
            return file.read(self._settings.max_image_bytes + 1)

    def _checked_size(self, content: bytes, param: str) -> tuple[int, int]:
        """Width and height by the file's head, before anything is decoded."""
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                size, kind = image.size, image.format
                is_animated = kind != "MPO" and bool(getattr(image, "is_animated", False))
        except Image.DecompressionBombError:
            raise self._too_many_pixels(param) from None
        except Exception:  # Pillow's readers meet damage with nearly every type of error
            raise RequestError(
                "the image is none that can be read; this server reads PNG, JPEG, WebP and GIF.",
                param=param,
                code=_CODE,
            ) from None
        if is_animated:
            raise RequestError("the image is animated; send one frame of it.", param=param, code=_CODE)
        if size[0] * size[1] > self._settings.max_image_pixels:
            raise self._too_many_pixels(param, size)
        try:
            check_aspect_ratio(size, "the image")
        except ValueError as error:
            raise RequestError(str(error), param=param, code=_CODE) from None
        return size

    def _too_many_pixels(self, param: str, size: tuple[int, int] | None = None) -> RequestError:
        most, got = self._settings.max_image_pixels, "too many" if size is None else f"{size[0]}x{size[1]}"
        return RequestError(
            f"the image has {got} pixels, and this server takes up to {most}; send it smaller.",
            param=param,
            code="image_too_large",
        )


def _decoded(content: bytes, size: tuple[int, int], param: str) -> Image.Image:
    try:
        image = decode_image(content)
    except ValueError as error:
        said = str(error).replace("what its bytes hold", "the image")
        raise RequestError(said, param=param, code=_CODE) from None
    if sorted(image.size) != sorted(size):  # turned by its EXIF orientation at most
        raise RequestError("the image is of another size than its head says.", param=param, code=_CODE)
    return image
