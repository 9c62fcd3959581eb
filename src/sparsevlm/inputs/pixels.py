"""Pixels of any mode as 8 bits for each of red, green and blue."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image

# Depths at which cameras and scanners deliver grey values in files of 16 bits.
BIT_DEPTHS = (8, 10, 12, 14, 16)
_WHITE = 255


def as_rgb(image: Image.Image, *, name: str = "the image", bits: int | None = None) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, transparency composited onto white.

    Parameters
    ----------
    image : PIL image
        Of any mode; alpha may be a channel (RGBA, LA, PA) or a transparent colour (``info["transparency"]``).
    name : str
        What messages call the image.
    bits : int, optional
        Depth of grey values beyond 8 bits. Where omitted it is :func:`grey_depth` of the image, and a warning says so
        if that is less than the 16 bits in which they are stored.

    Returns
    -------
    PIL image
        Of mode ``RGB``.

    Raises
    ------
    ValueError
        If the mode does not say which value is white, or Pillow cannot convert it; the message has the remedy.
    """
    if image.mode.startswith(("I", "F")):
        image = _eight_bit_grey(image, name, bits)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        if not _is_transparent(image):
            return image.convert("RGB")
        # Pillow converts premultiplied grey (La) to nothing but LA.
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"{name} has pixels of mode {image.mode} ({error}); save it as RGB.") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")


def grey_depth(images: Sequence[Image.Image]) -> int | None:
    """Bits of the grey values of images, all of one depth such as the frames of a video.

    It is the smallest of 8, 10, 12, 14 and 16 bits that holds their greatest value: a file of 16 bits does not say how
    many of them its camera filled.

    Returns
    -------
    int or None
        ``None`` if no image has grey values beyond 8 bits.
    """
    greatest = [_greatest(image) for image in images if image.mode.startswith("I")]
    if not greatest:
        return None
    return next((bits for bits in BIT_DEPTHS if max(greatest) < 1 << bits), BIT_DEPTHS[-1])


def warn_of_depth(images: Sequence[Image.Image], bits: int, name: str) -> None:
    """Warn where grey values are taken to have fewer bits than they are stored in, unless all are black anyway."""
    # Mode I is 32 bits wide, and is how a file of 8 bits may come, too.
    stored_in_16 = bits > BIT_DEPTHS[0] or any(image.mode.startswith("I;16") for image in images)
    if stored_in_16 and bits < BIT_DEPTHS[-1] and any(map(_greatest, images)):
        warnings.warn(
            f"sparsevlm: {name} stores grey values in 16 bits, but none needs more than {bits}: {(1 << bits) - 1} is "
            "taken as white. If it is a dark image of 16 bits, save it with 8.",
            stacklevel=4,
        )


def _is_transparent(image: Image.Image) -> bool:
    return bool({"A", "a"} & set(image.getbands())) or image.info.get("transparency") is not None


def _eight_bit_grey(image: Image.Image, name: str, bits: int | None) -> Image.Image:
    """Scale grey values of more than 8 bits; Pillow's own conversion cuts them off at 255: a white page."""
    values = np.asarray(image)
    least, greatest = values.min(), values.max()
    if image.mode == "F" or least < 0 or greatest >= 1 << BIT_DEPTHS[-1]:
        raise ValueError(
            f"{name}: pixels of mode {image.mode}, here from {least} to {greatest}, do not say which value is white; "
            "save the picture with 8 or 16 bits per channel."
        )
    if bits is None:
        bits = grey_depth([image]) or BIT_DEPTHS[-1]
        warn_of_depth([image], bits, name)
    white = (1 << bits) - 1
    scaled = (values.astype(np.int32) * _WHITE + white // 2) // white
    scaled[values == image.info.get("transparency")] = _WHITE
    return Image.fromarray(scaled.clip(0, _WHITE).astype(np.uint8))


def _greatest(image: Image.Image) -> int:
    """The greatest grey value of the pixels that are not of the transparent colour."""
    values = np.asarray(image)
    return int(values[values != image.info.get("transparency")].max(initial=0))
