"""What the runtime has to know of a model; made by an adapter of ``models/``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ModelView:
    """The parts of a vision-language model that the runtime touches.

    Attributes
    ----------
    model : nn.Module
        What the user calls ``generate`` on.
    base_model : nn.Module
        Merges visual features into the embeddings and calls the text model.
    text_model : nn.Module
        The decoder stack, called with ``inputs_embeds``.
    layers : nn.ModuleList
        Decoder layers, each called as ``layer(hidden_states, attention_mask=, position_embeddings=, …)``.
    attentions : tuple of nn.Module
        The attention module of each layer, which looks its function up under ``self.config._attn_implementation``.
    vision_tower : nn.Module
    vision_attentions : tuple of nn.Module
        Attention modules of the tower's blocks in which all patches of an image (or frame) see each other, in order;
        each looks its function up as those of ``attentions`` do.
    vision_block_indices : tuple of int
        The block of the tower that each of ``vision_attentions`` belongs to.
    n_vision_blocks : int
        Number of blocks of the tower.
    vision_windows : callable, optional
        From patch grids (t, h, w) to the index, in reading order, of each visual token in the order in which the tower
        works, and to where the windows begin, in patches; ``None``: it works in reading order, without windows.
    image_token_id, video_token_id : int
    special_token_ids : frozenset of int
        Tokens that never vote.
    spatial_merge_size : int
        Patches per side that form one visual token.
    """

    model: Any
    base_model: nn.Module
    text_model: Any
    layers: nn.ModuleList
    attentions: tuple[Any, ...]
    vision_tower: nn.Module
    vision_attentions: tuple[Any, ...]
    vision_block_indices: tuple[int, ...]
    n_vision_blocks: int
    vision_windows: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    image_token_id: int
    video_token_id: int
    special_token_ids: frozenset[int]
    spatial_merge_size: int

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def name(self) -> str:
        """Class name of the model."""
        return type(self.model).__name__

    @property
    def attn_implementation(self) -> str:
        """Name of the attention in force in the decoder."""
        return self.text_model.config._attn_implementation or "eager"

    def with_special_tokens(self, token_ids: Iterable[int]) -> ModelView:
        """A copy with more tokens that never vote."""
        return dataclasses.replace(self, special_token_ids=self.special_token_ids | frozenset(token_ids))
