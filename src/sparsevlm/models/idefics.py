"""Idefics3 and SmolVLM: tiles of a picture, each behind its place as text, and then the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import ModelAdapter
from .tiled import CutFamily, Run


@dataclass(frozen=True)
class IdeficsFamily(CutFamily):
    """Prompts as ``<fake><row_1_col_1>tile<fake><row_1_col_2>tile\\n …\\n\\n<fake><global-img>whole<fake>``.

    A picture that is not cut has the last part alone. ``<fake>`` may stand for any token and the places for any text.
    """

    in_parts: bool = True
    whole: str = "last"

    def images(self, adapter: ModelAdapter, ids: Sequence[int], runs: Sequence[Run]) -> list[tuple[int, int]]:
        """An image ends with a tile that is named as the last one of the prompt is."""
        if not runs:
            return []
        fake = ids[runs[-1][1]] if runs[-1][1] < len(ids) else None
        names = [_name(ids, start, fake) for start, _ in runs]
        found, tiles = list[tuple[int, int]](), list[Run]()
        for run, name in zip(runs, names, strict=True):
            tiles.append(run)
            if name == names[-1]:
                found.append((sum(end - start for start, end in tiles), _columns(ids, tiles, fake)))
                tiles = []
        return found

    def n_placeholders(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> int | None:
        """Of all tiles, (batch, n_tiles, channels, height, width), but those that are 0: they fill a batch up.

        transformers 5.17 takes the first tiles where there are more than placeholders, and says nothing.
        """
        pixels = inputs["pixel_values"]
        if pixels.ndim != 5:
            return None
        vision, side = adapter.model.config.vision_config, self.patches_per_side(adapter.model)
        height, width = (size // vision.patch_size // side for size in pixels.shape[-2:])
        n_tiles = int((pixels != 0).flatten(2).any(dim=-1).sum())
        return max(1, n_tiles) * height * width


def _name(ids: Sequence[int], start: int, fake: int | None) -> Sequence[int]:
    """Tokens between the last ``fake`` before a tile and the tile."""
    begin = next((position for position in range(start - 1, -1, -1) if ids[position] == fake), start - 1)
    return ids[begin + 1 : start]


def _columns(ids: Sequence[int], tiles: Sequence[Run], fake: int | None) -> int:
    """Tiles before the first one behind which something else than ``fake`` stands, as at the end of a row."""
    return next((n for n, (_, end) in enumerate(tiles[:-1], 1) if ids[end] != fake), 0)
