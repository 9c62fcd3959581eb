"""Families of a plain text model behind a vision tower, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .base import Family, Modality, ModelAdapter
from .blocks import with_block, without_block
from .decoder import Decoder
from .examples import BlankImage
from .layout import Grid, Layout, n_tokens
from .tower import CapturedModule, Vision

# What is taken of the tower; other arguments of an encoder are those of images.
_OF_TOWER = ("vision_feature_layer", "vision_feature_select_strategy")
# Types of towers by what their work depends on: the shape of the tiles, or the sizes of the images as well.
_OF_TILES = ("clip_vision_model", "siglip_vision_model", "internvl_vision", "idefics3_vision", "smolvlm_vision")
_OF_SIZES = ("pixtral",)


@dataclass(frozen=True)
class PlainFamily(Family):
    """A plain text model behind a vision tower.

    Attributes
    ----------
    model_types, class_names : tuple of str
    text, tower : str
        Where the text model and the vision tower are, from the model.
    blocks : str
        End of the name of the tower's list of blocks; empty: they are not read.
    attention : str
        Where a block of the tower has its attention.
    projector : str
        Name of what makes visual tokens of the tower's output, in the base model.
    unreadable : str
        Why the tower's blocks are not read.
    merge : str
        Where the configuration has the patches per side that form one visual token; empty: one.
    video_token : str
        Where the configuration has the placeholder of videos; empty: the family has no videos.
    in_parts : bool
        Whether text may stand among the tokens of one image or video.
    sees_whole_prompt : bool
        Whether every token of a prompt attends to all of it.
    n_position_axes : int
    encoder_inputs : tuple of str or None
        Arguments of ``get_image_features`` beside the pixels, of a base model that puts what this gives in the place of
        placeholders and does no more: then the engine may take its place. ``None``: it runs on hooks.
    captured : str or None
        Part of the tower that the engine may record as it is, with the projector; empty: all of it. ``None``: nothing
        is recorded. See :class:`~.tower.CapturedModule`.
    """

    model_types: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    protects_separators: bool = True
    text: str = "model.language_model"
    tower: str = "model.vision_tower"
    blocks: str = "encoder.layers"
    attention: str = "self_attn"
    projector: str = "multi_modal_projector"
    unreadable: str = ""
    merge: str = ""
    video_token: str = ""
    in_parts: bool = False
    sees_whole_prompt: bool = False
    n_position_axes: int = 1
    encoder_inputs: tuple[str, ...] | None = None
    captured: str | None = None

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model."""
        text = attrgetter(self.text)(model)
        decoder = Decoder.of_llama(text, model.get_output_embeddings(), self.n_position_axes)
        decoder = replace(decoder, experts_per_token=getattr(text.config, "num_experts_per_tok", None) or 0)
        decoder = with_block(decoder)
        if decoder.block is None or self.encoder_inputs is not None:
            return decoder
        return without_block(decoder, f"the way of a {type(model).__name__} to its decoder, which is not described")

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model, as far as the block whose output is taken."""
        tower = attrgetter(self.tower)(model)
        blocks = self._blocks(tower)
        taken = getattr(model.config, "vision_feature_layer", -1)
        # Outputs are counted from the embeddings on: the last of n blocks is output n, or -1.
        counts = [index if index >= 0 else len(blocks) + 1 + index for index in listed(taken)]
        n_blocks = min(max(counts), len(blocks))
        readable = () if self.unreadable else tuple(enumerate(map(attrgetter(self.attention), blocks[:n_blocks])))
        projector = getattr(self.base_model(model), self.projector, None)
        return Vision(
            module=tower,
            readable=readable,
            n_blocks=n_blocks,
            patches_per_token=self.patches_per_side(model) ** 2,
            n_prefix=int(drops_class_token(model)),
            unreadable=self.unreadable,
            blocks=tuple(blocks),
            projector=projector,
            captured=self._captured(tower, projector),
        )

    def _captured(self, tower: Any, projector: Any) -> tuple[CapturedModule, ...]:
        kind = getattr(getattr(tower, "config", None), "model_type", None)
        if self.captured is None or kind not in (*_OF_TILES, *_OF_SIZES):
            return ()
        part = attrgetter(self.captured)(tower) if self.captured else tower
        return tuple(CapturedModule(module, kind in _OF_TILES) for module in (part, projector))

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
        more = self.encoder_inputs or ()
        token = model.config.image_token_id
        kinds = {"image": Modality("pixel_values", token, in_parts=self.in_parts, encoder_inputs=more)}
        if self.video_token:
            token, of_tower = getattr(model.config, self.video_token), tuple(set(more) & set(_OF_TOWER))
            kinds["video"] = Modality("pixel_values_videos", token, in_parts=self.in_parts, encoder_inputs=of_tower)
        return kinds


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

    def blank_image(self, adapter: ModelAdapter, grid: Grid) -> BlankImage | None:
        """Nearly square, no larger than the tower takes."""
        if self.encoder_inputs is None or "image_sizes" not in self.encoder_inputs:
            return None
        vision = adapter.model.config.vision_config
        unit = _first(vision.patch_size) * self.patches_per_side(adapter.model)
        most, n_visual = _first(vision.image_size) // unit, math.prod(grid)
        height = min(most, max(1, math.isqrt(n_visual)))
        width = min(most, max(2, n_visual // height))  # transformers fails with an image of one token
        size = (height * unit, width * unit)
        n_patches = height * width * self.patches_per_side(adapter.model) ** 2
        return BlankImage(height * width, (1, 3, *size), n_patches, ("image_sizes", size))

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


def listed(value: Any) -> list[Any]:
    """The value of a configuration as a list, which it may be or not."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _first(value: Any) -> Any:
    return listed(value)[0]
