"""Fonts of matplotlib, each for training or for evaluation only."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from .splits import EVALUATION, TRAINING

FONTS = {
    TRAINING: (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol"),
        *("DejaVuSans-Oblique", "DejaVuSerif-Italic", "DejaVuSansMono-Bold"),
    ),
    EVALUATION: ("DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneralItalic", "DejaVuSans-BoldOblique"),
}


def pick_font(rng: random.Random, split: str) -> str:
    """A name out of ``FONTS``."""
    return rng.choice(FONTS[split])


@lru_cache(maxsize=512)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib, whose fonts these are.
    """
    # Basic layout: the same places whether or not Pillow was built with Raqm.
    return ImageFont.truetype(str(_folder() / f"{name}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _folder() -> Path:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawn documents, charts and screens need matplotlib, which the extra cli brings: run "
            '`pip install ".[cli]"` in the source tree, or `pip install matplotlib`.'
        ) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
