"""Families whose vision tower takes images, or tiles of them, of one size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from .base import ModelAdapter
from .examples import BlankImage
from .layout import Grid, Layout, Tiles, as_grid
from .plain import PlainFamily, listed

Run = tuple[int, int]


@dataclass(frozen=True)
class CutFamily(PlainFamily):
    """Images in tiles of one size, each of as many visual tokens; subclasses say which tiles are of one image.

    Tiles count as steps in time: what reaches the model does not tell how they lie beside each other.

    Attributes
    ----------
    tile_tokens : str
        Where the configuration has the number of visual tokens of a tile, instead of ``merge``.
    whole : str
        Which tile of several shows the whole picture: ``"first"`` or ``"last"``; empty: none.
    is_cut : bool
        Whether pictures are cut into tiles at all; else each is one tile, and may stand right behind another.
    """

    tile_tokens: str = ""
    whole: str = ""
    is_cut: bool = True

    def patches_per_side(self, model: Any) -> int:
        """Patches per side that form one visual token."""
        if not self.tile_tokens:
            return super().patches_per_side(model)
        vision = model.config.vision_config
        per_side = math.isqrt(attrgetter(self.tile_tokens)(model.config))
        return int(vision.image_size // vision.patch_size // per_side)

    def tile(self, model: Any) -> tuple[int, int] | None:
        """Patches (h, w) of a tile; ``None``: its tokens form no grid."""
        config = model.config.vision_config
        if getattr(model.config, "vision_feature_select_strategy", "default") == "full":
            return None  # with a class token
        size, patch = (listed(getattr(config, name)) for name in ("image_size", "patch_size"))
        return size[0] // patch[0], size[-1] // patch[-1]

    def tile_grid(self, model: Any) -> tuple[int, int] | None:
        """Visual tokens (h, w) of a tile; ``None``: they form no grid."""
        tile, side = self.tile(model), self.patches_per_side(model)
        return None if tile is None else (math.ceil(tile[0] / side), math.ceil(tile[1] / side))

    def images(self, adapter: ModelAdapter, ids: Sequence[int], runs: Sequence[Run]) -> list[tuple[int, int]]:
        """Placeholders of each image of a prompt, and how many of its tiles lie beside each other; 0: not known.

        Parameters
        ----------
        adapter : ModelAdapter
        ids : sequence of int
            Of the prompt.
        runs : sequence of (start, end)
            Of its placeholders.
        """
        raise NotImplementedError

    def layouts(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> Sequence[Layout] | None:
        """From the runs of placeholders."""
        tile, input_ids = self.tile_grid(adapter.model), inputs.get("input_ids")
        if tile is None or input_ids is None:
            return None
        found = list[Layout]()
        for ids in input_ids.tolist():
            for n_placeholders, columns in self.images(adapter, ids, runs(ids, adapter.modalities[kind].token_id)):
                n_tiles, rest = divmod(n_placeholders, math.prod(tile))
                if rest:
                    return None
                if self.is_cut:
                    found.append(self._layout(n_tiles, columns, *tile))
                else:
                    found += [(1, *tile)] * n_tiles
        return found

    def _layout(self, n_tiles: int, columns: int, height: int, width: int) -> Layout:
        if n_tiles == 1 or not self.whole:
            return (n_tiles, height, width)
        counts = ((n_tiles - 1, columns), (1, 1)) if self.whole == "last" else ((1, 1), (n_tiles - 1, columns))
        return Tiles(tuple((n, height, width) for n, _ in counts), (False, False), columns=tuple(n for _, n in counts))

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """Of whole images, tiles one behind the other."""
        layouts = self.layouts(adapter, kind, inputs)
        return None if layouts is None else [grid for grid in map(as_grid, layouts) if grid is not None]

    def patch_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Sequence[tuple[int, int]] | None:
        """Of each tile, where several patches form one visual token."""
        tile, side = self.tile(adapter.model), self.patches_per_side(adapter.model)
        if tile is None or side == 1:
            return None
        return [tile] * arguments["pixel_values"].shape[0]


@dataclass(frozen=True)
class TiledFamily(CutFamily):
    """Each run of placeholders is an image of whole tiles.

    Attributes
    ----------
    most_tiles : int
        Of one image, as its processor cuts it by default: one, or the image as a whole beside at least two; 0: any.
    """

    most_tiles: int = 0

    def images(self, adapter: ModelAdapter, ids: Sequence[int], runs: Sequence[Run]) -> list[tuple[int, int]]:
        """Every run."""
        return [(end - start, 0) for start, end in runs]

    def blank_image(self, adapter: ModelAdapter, grid: Grid) -> BlankImage | None:
        """Of one tile, or of as many as come near; ``None``: the engine does not run the family."""
        tile, tokens = self.tile(adapter.model), self.tile_grid(adapter.model)
        if tile is None or tokens is None or self.encoder_inputs is None:
            return None
        n_tiles = max(1, round(math.prod(grid) / math.prod(tokens))) if self.is_cut else 1
        size = listed(adapter.model.config.vision_config.image_size)
        pixels, n_patches = (n_tiles, 3, size[0], size[-1]), n_tiles * math.prod(tile)
        return BlankImage(n_tiles * math.prod(tokens), pixels, n_patches, n_tiles=n_tiles)

    def blank_images(self, adapter: ModelAdapter, grid: Grid) -> tuple[BlankImage, ...]:
        """As few as hold the tiles, each of about as many."""
        if not self.most_tiles or (whole := self.blank_image(adapter, grid)) is None:
            return super().blank_images(adapter, grid)
        per_tile = whole.n_visual // whole.n_tiles
        found = (self.blank_image(adapter, (1, 1, n * per_tile)) for n in _even_parts(whole.n_tiles, self.most_tiles))
        return tuple(image for image in found if image is not None)


def _even_parts(n_tiles: int, most: int) -> list[int]:
    """Tiles of each image: 28 of 13 at most are 10, 9 and 9; no image has two."""
    if n_tiles == 2:
        return [1, 1]
    n_images = math.ceil(n_tiles / most)
    return [n_tiles // n_images + (i < n_tiles % n_images) for i in range(n_images)]


def runs(ids: Sequence[int], token_id: int) -> list[Run]:
    """Where the runs of a token begin and end in a prompt."""
    found: list[Run] = []
    for token, group in itertools.groupby(enumerate(ids), key=lambda item: item[1]):
        if token == token_id:
            positions = [position for position, _ in group]
            found.append((positions[0], positions[-1] + 1))
    return found
