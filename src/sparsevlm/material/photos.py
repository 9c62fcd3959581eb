"""Photographs that come inside scikit-image and scikit-learn; nothing is fetched."""

from __future__ import annotations

import importlib.util
import random
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from .splits import EVALUATION, TRAINING

_FOLDERS = {"skimage": ("scikit-image", Path("data")), "sklearn": ("scikit-learn", Path("datasets", "images"))}
# Of either split some of people or things, of places, of surfaces, and some in grey.
PHOTOS = {
    TRAINING: (
        *("skimage/astronaut.png", "skimage/coffee.png", "skimage/hubble_deep_field.jpg", "skimage/ihc.png"),
        *("skimage/grass.png", "skimage/brick.png", "skimage/camera.png", "skimage/coins.png"),
    ),
    EVALUATION: (
        *("sklearn/china.jpg", "sklearn/flower.jpg", "skimage/chelsea.png", "skimage/rocket.jpg"),
        *("skimage/gravel.png", "skimage/moon.png"),
    ),
}


@lru_cache(maxsize=32)
def photo(name: str) -> Image.Image:
    """A photograph in RGB.

    Parameters
    ----------
    name : str
        Package and file, as in ``PHOTOS``.

    Raises
    ------
    ModuleNotFoundError
        If the package, or the file in it, is missing; the message has the pip line.
    """
    package, file_name = name.split("/")
    pip_name, folder = _FOLDERS[package]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the photographs are those inside {pip_name}, which is not installed: run "
            '`pip install ".[photos]"` in the source tree, or `pip install scikit-image scikit-learn`.'
        )
    file = Path(found.submodule_search_locations[0], folder, file_name)
    try:
        return Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ModuleNotFoundError(
            f"this {pip_name} does not hold the photograph {file_name} ({error}): run "
            '`pip install --force-reinstall "scikit-image>=0.25,<0.27" "scikit-learn>=1.5"`.'
        ) from error


def check_photos(split: str) -> None:
    """Refuse what cannot be drawn because a photograph is missing.

    Raises
    ------
    ModuleNotFoundError
        With the pip line.
    """
    for name in PHOTOS[split]:
        photo(name)


def crop(rng: random.Random, split: str, size: tuple[int, int]) -> Image.Image:
    """A piece of a photograph of the split, mirrored or not, lighter or darker."""
    whole = photo(rng.choice(PHOTOS[split]))
    width, height = size
    fits = min(whole.width / width, whole.height / height)
    scale = fits * rng.uniform(0.55, 1.0)
    side = (round(width * scale), round(height * scale))
    left, top = rng.randint(0, whole.width - side[0]), rng.randint(0, whole.height - side[1])
    box = (left, top, left + side[0], top + side[1])
    piece = whole.resize(size, Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        piece = ImageOps.mirror(piece)
    return ImageEnhance.Brightness(piece).enhance(rng.uniform(0.7, 1.2))
