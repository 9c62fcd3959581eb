"""Families of a plain text model behind a vision tower, as data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .base import Decoder, Family, Modality, ModelAdapter, Vision
from .layout import Grid, Layout, Tiles, as_grid, n_tokens

Run = tuple[int, int]


@dataclass(frozen=True)
class PlainFamily(Family):
    """A plain text model behind a vision tower; it runs on hooks.

    Attributes
    ----------
    model_types, class_names : tuple of str
    text, tower : str
        Where the text model and the vision tower are, from the model.
    blocks : str
        End of the name of the tower's list of blocks; empty: they are not read.
    attention : str
        Where a block of the tower has its attention.
    unreadable : str
        Why the tower's blocks are not read.
    merge : str
        Where the configuration has the patches per side that form one visual token; empty: one.
    video_token : str
        Where the configuration has the placeholder of videos; empty: the family has no videos.
    in_parts : bool
        Whether text may stand among the tokens of one image or video.
    n_position_axes : int
    """

    model_types: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    protects_separators: bool = True
    text: str = "model.language_model"
    tower: str = "model.vision_tower"
    blocks: str = "encoder.layers"
    attention: str = "self_attn"
    unreadable: str = ""
    merge: str = ""
    video_token: str = ""
    in_parts: bool = False
    n_position_axes: int = 1

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model."""
        text = attrgetter(self.text)(model)
        decoder = Decoder.of_llama(text, model.get_output_embeddings(), self.n_position_axes)
        return replace(decoder, experts_per_token=getattr(text.config, "num_experts_per_tok", None) or 0)

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model, as far as the block whose output is taken."""
        tower = attrgetter(self.tower)(model)
        blocks = self._blocks(tower)
        taken = getattr(model.config, "vision_feature_layer", -1)
        # Outputs are counted from the embeddings on: the last of n blocks is output n, or -1.
        counts = [index if index >= 0 else len(blocks) + 1 + index for index in _listed(taken)]
        n_blocks = min(max(counts), len(blocks))
        readable = () if self.unreadable else tuple(enumerate(map(attrgetter(self.attention), blocks[:n_blocks])))
        return Vision(
            module=tower,
            readable=readable,
            n_blocks=n_blocks,
            patches_per_token=self.patches_per_side(model) ** 2,
            n_prefix=int(drops_class_token(model)),
            unreadable=self.unreadable,
        )

    def _blocks(self, tower: nn.Module) -> list[Any]:
        if not self.blocks:
            return []
        named = (module for name, module in tower.named_modules() if name.endswith(self.blocks))
        return list(next(named, ()))

    def patches_per_side(self, model: Any) -> int:
        """Patches per side that form one visual token."""
        found = _first(attrgetter(self.merge)(model.config)) if self.merge else 1
        return round(1 / found) if found < 1 else int(found)

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images, and videos where the family has them."""
        kinds = {"image": Modality("pixel_values", model.config.image_token_id, in_parts=self.in_parts)}
        if self.video_token:
            token = getattr(model.config, self.video_token)
            kinds["video"] = Modality("pixel_values_videos", token, in_parts=self.in_parts)
        return kinds


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
        size, patch = (_listed(getattr(config, name)) for name in ("image_size", "patch_size"))
        return size[0] // patch[0], size[-1] // patch[-1]

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
        tile, input_ids = self.tile(adapter.model), inputs.get("input_ids")
        if tile is None or input_ids is None:
            return None
        side, found = self.patches_per_side(adapter.model), list[Layout]()
        height, width = (math.ceil(length / side) for length in tile)
        for ids in input_ids.tolist():
            for n_placeholders, columns in self.images(adapter, ids, runs(ids, adapter.modalities[kind].token_id)):
                n_tiles, rest = divmod(n_placeholders, height * width)
                if rest:
                    return None
                if self.is_cut:
                    found.append(self._layout(n_tiles, columns, height, width))
                else:
                    found += [(1, height, width)] * n_tiles
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
    """Each run of placeholders is an image of whole tiles."""

    def images(self, adapter: ModelAdapter, ids: Sequence[int], runs: Sequence[Run]) -> list[tuple[int, int]]:
        """Every run."""
        return [(end - start, 0) for start, end in runs]


@dataclass(frozen=True)
class PackedFamily(PlainFamily):
    """Images as packed patches, whose grids the inputs name as ``image_grid_thw`` and ``video_grid_thw``.

    Attributes
    ----------
    by_rows : bool
        Whether the tower has patches row by row, not those of a visual token together.
    pools_time : bool
        Whether the frames of a video become one.
    """

    merge: str = "vision_config.spatial_merge_size"
    by_rows: bool = False
    pools_time: bool = False

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images and videos with their grids."""
        return {
            kind: replace(modality, size_inputs=(f"{kind}_grid_thw",))
            for kind, modality in super().modalities(model).items()
        }

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From the grids in patches."""
        return self._in_tokens(adapter, inputs.get(f"{kind}_grid_thw"))

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """From the grids in patches, by which a tower may have the frames of a video apart."""
        return self._in_tokens(adapter, arguments.get("grid_thw"))

    def _in_tokens(self, adapter: ModelAdapter, grid_thw: Any) -> list[Grid] | None:
        if grid_thw is None:
            return None
        side = self.patches_per_side(adapter.model)
        return [(1 if self.pools_time else t, h // side, w // side) for t, h, w in grid_thw.tolist()]

    def patch_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Sequence[tuple[int, int]] | None:
        """Of each frame."""
        if not self.by_rows:
            return None
        return [(h, w) for t, h, w in arguments["grid_thw"].tolist() for _ in range(t)]

    def coordinates(self, layouts: Iterable[Layout], position_ids: Tensor | None, visual: Tensor) -> Tensor:
        """By the grids; M-RoPE, where the family has it, counts rows and columns of a frame from where it stands."""
        layouts = tuple(layouts)
        fits = sum(map(n_tokens, layouts)) == visual.shape[0]
        if fits or position_ids is None or position_ids.shape[0] != 3:
            return super().coordinates(layouts, position_ids, visual)
        return position_ids[:, visual].long()


@dataclass(frozen=True)
class SizedFamily(PlainFamily):
    """Images of any size, which the inputs name as ``image_sizes`` in pixels; text may end each row of tokens."""

    in_parts: bool = True

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From the sizes."""
        side = self.patches_per_side(adapter.model)
        found = self.patch_grids(adapter, inputs)
        return None if found is None else [(1, height // side, width // side) for height, width in found]

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """The same."""
        return self.grids(adapter, "image", arguments)

    def patch_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Sequence[tuple[int, int]] | None:
        """Of each image."""
        if (sizes := arguments.get("image_sizes")) is None:
            return None
        patch = _first(adapter.model.config.vision_config.patch_size)
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]


def drops_class_token(model: Any) -> bool:
    """Tells whether the first token of every image is left out."""
    return getattr(model.config, "vision_feature_select_strategy", None) == "default"


def runs(ids: Sequence[int], token_id: int) -> list[Run]:
    """Where the runs of a token begin and end in a prompt."""
    found: list[Run] = []
    for token, group in itertools.groupby(enumerate(ids), key=lambda item: item[1]):
        if token == token_id:
            positions = [position for position, _ in group]
            found.append((positions[0], positions[-1] + 1))
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _first(value: Any) -> Any:
    return _listed(value)[0]
