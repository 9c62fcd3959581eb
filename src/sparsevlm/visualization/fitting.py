"""Pictures as a processor hands them to the vision tower: cropped, filled up or stretched to the shape of its grid."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..inputs import as_rgb


def has_shape(image: Image.Image, height: int, width: int) -> bool:
    """Tells whether some scaling of an image gives a grid, whichever way the processor rounded both sides."""
    for below, above in ((0.5, 0.5), (0.0, 1.0), (1.0, 0.0)):  # to the nearest, down, up
        lowest = max((height - below) / image.height, (width - below) / image.width)
        highest = min((height + above) / image.height, (width + above) / image.width)
        if lowest <= highest:
            return True
    return False


def as_seen(part: Any, image: Image.Image, height: int, width: int) -> Image.Image:
    """What the tower sees of a picture, in the shape in which it does.

    Parameters
    ----------
    part : ImageProcessor or VideoProcessor
    image : PIL image
    height, width : int
        Grid of its visual tokens.
    """
    if getattr(part, "do_center_crop", None):
        return image.crop(_centre(part, image))
    if hasattr(part, "pad_to_square") and getattr(part, "do_pad", None) is not False:
        side = max(image.size)
        filling = getattr(part, "background_color", None)
        square = Image.new("RGB", (side, side), tuple(filling) if isinstance(filling, (list, tuple)) else (0, 0, 0))
        square.paste(as_rgb(image), ((side - image.width) // 2, (side - image.height) // 2))
        return square
    if has_shape(image, height, width):
        return image
    scale = max(image.size) / max(height, width)
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))))


def _centre(part: Any, image: Image.Image) -> tuple[int, int, int, int]:
    """Box of an image that is left when it was resized and its centre cut out."""
    size, crop = dict(part.size), dict(part.crop_size)
    if size.get("shortest_edge"):
        scales = [size["shortest_edge"] / min(image.size)] * 2
    else:
        scales = [size["width"] / image.width, size["height"] / image.height]
    width, height = (crop[name] / scale for name, scale in zip(("width", "height"), scales, strict=True))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return round(left), round(top), round(left + width), round(top + height)
