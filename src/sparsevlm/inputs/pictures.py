"""Identity of pictures, by which a report is known to be of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from PIL import Image

from .pixels import as_rgb

_DIGITS = 16


def identified(visuals: Sequence[Image.Image | Sequence[Image.Image]]) -> tuple[tuple[int, int, str], ...]:
    """Width, height and SHA-256 (its first digits) of the pixels of all images and frames, in order.

    Parameters
    ----------
    visuals : sequence of PIL images, or of lists of frames
        Of one sample.
    """
    frames = [frame for visual in visuals for frame in ([visual] if isinstance(visual, Image.Image) else visual)]
    return tuple(
        (frame.width, frame.height, hashlib.sha256(as_rgb(frame).tobytes()).hexdigest()[:_DIGITS]) for frame in frames
    )
