"""Ovis2: the whole picture, then its tiles, with indicators among them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .base import ModelAdapter
from .tiled import CutFamily, Run

_GRID, _COLUMN, _ROW = 1, 2, 3  # of the configuration's visual_indicator_token_ids, of which 0 and 4 are the ends


@dataclass(frozen=True)
class Ovis2Family(CutFamily):
    """Prompts as ``<IMG_START>whole<IMG_GRID>tile<IMG_COL>tile<IMG_ROW>tile<IMG_COL>tile<IMG_END>``."""

    in_parts: bool = True
    whole: str = "first"

    def images(self, adapter: ModelAdapter, ids: Sequence[int], runs: Sequence[Run]) -> list[tuple[int, int]]:
        """Tiles between which a single indicator stands belong together."""
        indicators = adapter.model.config.visual_indicator_token_ids
        among = {indicators[i] for i in (_GRID, _COLUMN, _ROW)}
        found, tiles = list[tuple[int, int]](), list[Run]()
        for run, following in itertools.zip_longest(runs, runs[1:]):
            tiles.append(run)
            end = run[1]
            if following is None or following[0] != end + 1 or ids[end] not in among:
                found.append((sum(end - start for start, end in tiles), _columns(ids, tiles, indicators[_ROW])))
                tiles = []
        return found


def _columns(ids: Sequence[int], tiles: Sequence[Run], row_token: int) -> int:
    """Tiles behind the first one of which the last ends a row, or the picture."""
    inner = tiles[1:]
    return next((n for n, (_, end) in enumerate(inner, 1) if n == len(inner) or ids[end] == row_token), 0)
