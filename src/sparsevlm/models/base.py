"""Descriptions of models as data; both paths read them and name no family."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .examples import BlankImage, blank_inputs
from .layout import Grid, Layout, grid_coordinates

# Kinds of decoder layers, by transformers' names.
FULL, SLIDING, RECURRENT = "full_attention", "sliding_attention", "linear_attention"
_AROUND = tuple(f"{kind}_{end}_token_id" for kind in ("vision", "image", "video", "audio") for end in ("start", "end"))
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", *_AROUND, "boi_token_index", "eoi_token_index")


@dataclass(frozen=True)
class Modality:
    """One kind of visual input, such as images or videos.

    Attributes
    ----------
    pixels : str
        Argument of the model that brings its pixels.
    token_id : int
        Token that stands for one visual token of it in the prompt.
    size_inputs : tuple of str
        Arguments that say how the pixels are divided into images.
    encoder_inputs : tuple of str
        Further arguments of ``get_image_features`` (or ``get_video_features``), passed where a call brings them.
    in_parts : bool
        Whether other tokens may stand between those of one input: written times before frames, sound.
    """

    pixels: str
    token_id: int
    size_inputs: tuple[str, ...] = ()
    in_parts: bool = False
    encoder_inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class LateFeatures:
    """Visual features that the decoder adds to the output of its first layers, as by DeepStack.

    Attributes
    ----------
    mask : str
        Argument of the decoder that tells visual tokens, (batch, q_len) bool.
    features : str
        Argument of the decoder with a tensor (n_visual, hidden_size) for each of these layers, beginning with the
        first; rows are those of the mask, one sample behind the other.
    output : str
        Attribute of what ``get_image_features`` gives that holds the same, by layer and image.
    n_layers : int
        How many of the first layers get such.
    """

    mask: str
    features: str
    output: str
    n_layers: int

    def come_behind(self, layer: int, arguments: Mapping[str, Any]) -> bool:
        """Tells whether the output of any layer behind a given one gets such, by the decoder's arguments."""
        return len(arguments.get(self.features) or ()) > layer + 1


@dataclass(frozen=True)
class BlockModules:
    """Modules of one decoder layer by role.

    Attributes
    ----------
    attention, mlp : nn.Module
        Whole parts.
    attention_norm, mlp_norm : nn.Module
        RMS norms before them, with ``weight`` and ``variance_epsilon``.
    query, key, value, output, gate, up, down : nn.Linear
    activation : nn.Module
    head_dim : int
    scaling : float
    query_norm, key_norm : nn.Module or None
        RMS norms of every head before it is rotated.
    """

    attention: Any
    mlp: Any
    attention_norm: Any
    mlp_norm: Any
    query: Any
    key: Any
    value: Any
    output: Any
    gate: Any
    up: Any
    down: Any
    activation: Any
    head_dim: int
    scaling: float
    query_norm: Any = None
    key_norm: Any = None


@dataclass(frozen=True)
class DecoderBlock:
    """A decoder layer that the engine can run: paths of its modules by role.

    Stands for ``h += output(attention(norm(h)))``, then ``h += down(activation(gate(norm(h))) · up(norm(h)))``, with
    RMS norms, rotary positions over whole heads in halves and, where they are named, RMS norms of queries and keys by
    head before these are rotated. A family describes a layer where that is all it does, see :mod:`~.blocks`.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    query_norm: str | None = None
    key_norm: str | None = None

    def modules_of(self, layer: nn.Module) -> BlockModules:
        """The modules of a layer."""
        found = {name: attrgetter(path)(layer) for name, path in vars(self).items() if path is not None}
        attention = found["attention"]
        return BlockModules(**found, head_dim=attention.head_dim, scaling=attention.scaling)


@dataclass(frozen=True)
class Decoder:
    """The decoder stack of a model.

    Attributes
    ----------
    module : nn.Module
        Called with ``inputs_embeds``.
    layers : nn.ModuleList
        Each called as ``layer(hidden_states, attention_mask=, position_embeddings=, …)``.
    attentions : tuple of nn.Module or None
        Attention module of each layer, which looks its function up under ``self.config._attn_implementation``;
        ``None``: the layer is recurrent.
    embed, norm, rotary, head : nn.Module
        Token embeddings, last norm, rotary embeddings and language-model head.
    n_position_axes : int
        Axes of its rotary positions: 3 for M-RoPE.
    block : DecoderBlock or None
        What the engine has to know of a layer; ``None``: the family runs on hooks only.
    undescribed : str
        Why ``block`` is ``None``, where more is known than that nobody has described the layers.
    late_features : LateFeatures or None
        ``None``: visual features are all in the embeddings.
    experts_per_token : int
        Of a layer whose MLP is made of experts, how many of them compute a token; 0: no layer is.
    state_size : int
        Numbers in the state that a recurrent layer carries from token to token.
    """

    module: Any
    layers: Any
    attentions: tuple[Any, ...]
    embed: Any
    norm: Any
    rotary: Any
    head: Any
    n_position_axes: int = 1
    block: DecoderBlock | None = None
    undescribed: str = ""
    late_features: LateFeatures | None = None
    experts_per_token: int = 0
    state_size: int = 0

    @functools.cached_property
    def layer_types(self) -> tuple[str, ...]:
        """Kind of each layer, by transformers' names."""
        config = self.module.config
        found = getattr(config, "layer_types", None)
        if found is None:
            found = [SLIDING if getattr(config, "sliding_window", None) else FULL] * len(self.layers)
        return tuple(found)

    @functools.cached_property
    def sliding_layers(self) -> frozenset[int]:
        """Layers with a sliding window."""
        return frozenset(i for i, kind in enumerate(self.layer_types) if kind == SLIDING)

    @property
    def default_targets(self) -> tuple[int, ...]:
        """Target layers where none are named: those with full attention if others have not, or every 4th from 2."""
        last, types = len(self.layers) - 1, self.layer_types
        full = tuple(i for i in range(last) if types[i] == FULL)
        return tuple(range(2, last, 4)) if len(full) in (0, last) else full

    @property
    def n_late(self) -> int:
        """How many of the first layers get visual features added."""
        return 0 if self.late_features is None else self.late_features.n_layers

    @classmethod
    def of_llama(cls, module: Any, head: Any, n_position_axes: int = 1) -> Decoder:
        """A decoder whose parts have the names that they have in transformers' Llama, as in most of its models."""
        attentions = tuple(getattr(layer, "self_attn", None) for layer in module.layers)
        parts = (module.embed_tokens, module.norm, module.rotary_emb, head)
        return cls(module, module.layers, attentions, *parts, n_position_axes)


@dataclass(frozen=True)
class TowerBlock:
    """One block of a :class:`PackedTower`, its modules by role.

    Attributes
    ----------
    module : nn.Module
        The whole block.
    attention, mlp : nn.Module
        Whole parts; the MLP runs as it is where it is not gated.
    attention_norm, mlp_norm : nn.Module
        RMS norms, or ``nn.LayerNorm``.
    qkv, output : nn.Linear
    n_heads : int
    scaling : float
    is_full : bool
        Whether all patches of an image (or frame) see each other, not only those of a window.
    gate, up, down : nn.Linear or None
    """

    module: Any
    attention: Any
    mlp: Any
    attention_norm: Any
    mlp_norm: Any
    qkv: Any
    output: Any
    n_heads: int
    scaling: float
    is_full: bool
    gate: Any = None
    up: Any = None
    down: Any = None


@dataclass(frozen=True)
class PackedTower:
    """A vision tower that the engine can run: over the packed patches of all images, with rotary positions.

    Attributes
    ----------
    projection : nn.Module
        Embeds a patch; a convolution whose kernel is its stride, without bias.
    rotary : nn.Module
        ``rotary(like, positions)`` gives cosines and sines.
    blocks : tuple of TowerBlock
    merger : nn.Module
        From patches to visual tokens.
    side : int
        Patches per side that form one visual token.
    window : int or None
        Visual tokens per side of a window; ``None``: no block has windows.
    """

    projection: Any
    rotary: Any
    blocks: tuple[TowerBlock, ...]
    merger: Any
    side: int
    window: int | None = None


@dataclass(frozen=True)
class Vision:
    """The vision tower of a model.

    Attributes
    ----------
    module : nn.Module
    readable : tuple of (int, nn.Module)
        Index and attention module of each block in which all patches of an image (or frame) see each other and whose
        output is used, ascending; it looks its function up as those of the decoder do.
    n_blocks : int
        Number of blocks whose output is used.
    patches_per_token : int
        Patches that form one visual token.
    n_prefix : int
        Tokens of the tower before the patches of each image, such as a class token.
    program : PackedTower or None
        What the engine has to know of it; ``None``: its own modules run.
    unreadable : str
        Why ``readable`` is empty, where that is not for want of blocks with full attention.
    blocks : tuple of nn.Module
        All blocks, of which the output of the first ``n_blocks`` is used; empty: they are not known.
    projector : nn.Module or None
        What makes visual tokens of its output, where that is not part of it.
    """

    module: Any
    readable: tuple[tuple[int, Any], ...]
    n_blocks: int
    patches_per_token: int = 1
    n_prefix: int = 0
    program: PackedTower | None = None
    unreadable: str = ""
    blocks: tuple[Any, ...] = ()
    projector: Any = None

    @property
    def read_blocks(self) -> tuple[tuple[int, Any], tuple[int, Any]]:
        """Of ``readable``, which selectors read: the one nearest to the middle of the tower (of two as near, the
        earlier) and the last."""
        return min(self.readable, key=lambda block: abs(2 * block[0] - self.n_blocks)), self.readable[-1]


class Family:
    """A model family: subclassed once per family, without state; all answers come from the model that is given."""

    model_types: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    # Whether placeholders that stand for no patch, such as the end of a row, are never dropped.
    protects_separators: bool = True
    # Whether the first request has to show that gathering all rows changes nothing.
    must_be_proven: bool = False
    speaks: ClassVar[bool] = False  # another model makes speech of the hidden states that generate returns
    layer_kinds: ClassVar[frozenset[str]] = frozenset({FULL, SLIDING})

    def check(self, model: Any) -> None:
        """Refuse a model of the family that cannot be pruned: with layers of another kind, capped scores, or
        tensor-parallel.

        Raises
        ------
        ValueError, NotImplementedError
            With the remedy.
        """
        if unknown := set(self.decoder(model).layer_types) - self.layer_kinds:
            raise NotImplementedError(
                f"decoder layers of kind {min(unknown)!r} are not supported in a {type(model).__name__}: pruning "
                f"them was not tested. Supported are {', '.join(sorted(self.layer_kinds))}."
            )
        if cap := getattr(self.decoder(model).module.config, "attn_logit_softcapping", None):
            raise NotImplementedError(
                f"decoder layers that cap attention scores (attn_logit_softcapping={cap}) are not supported: what is "
                "read of them would not be the model's attention. Use a model without, such as Gemma 3 or PaliGemma."
            )
        if getattr(model, "_tp_size", None) not in (None, 1):
            raise NotImplementedError(
                "tensor-parallel models are not supported: each rank would choose other tokens. Load without tp_plan."
            )

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model."""
        raise NotImplementedError

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model."""
        raise NotImplementedError

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Kinds of visual input by name, in the order in which features of several kinds are joined."""
        raise NotImplementedError

    def base_model(self, model: Any) -> Any:
        """The module that merges visual features into the embeddings and calls the decoder."""
        return model.model

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """Sizes (t, h, w) in visual tokens of the images of a kind, in order; ``None``: the inputs do not tell.

        Parameters
        ----------
        adapter : ModelAdapter
        kind : str
            Of the model's modalities.
        inputs : mapping
            Arguments of the model.
        """
        return None

    def layouts(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> Sequence[Layout] | None:
        """Arrangement of the visual tokens of each image of a kind, in order; ``None``: the inputs do not tell.

        ``inputs`` are those of the pass, over those of the call of ``generate``. Only a family whose images form no
        single grid answers otherwise than :meth:`grids`.
        """
        return self.grids(adapter, kind, inputs)

    def blank_image(self, adapter: ModelAdapter, grid: Grid) -> BlankImage | None:
        """An image of about (t, h, w) visual tokens; ``None``: the family has none that is made in code."""
        return None

    def blank_images(self, adapter: ModelAdapter, grid: Grid) -> tuple[BlankImage, ...]:
        """Images as users send them that have, together, about (t, h, w) visual tokens; empty: as above."""
        image = self.blank_image(adapter, grid)
        return () if image is None else (image,) * max(1, round(math.prod(grid) / image.n_visual))

    def inputs_of(self, adapter: ModelAdapter, images: Sequence[BlankImage], n_text: int) -> dict[str, Tensor]:
        """Inputs of ``generate`` with images amid ``n_text`` other tokens, as the processor makes them."""
        return blank_inputs(adapter, images, n_text)

    def example_size(self, adapter: ModelAdapter, n_visual: int) -> int:
        """Visual tokens of the example with about ``n_visual`` of them."""
        return n_visual

    def example(self, adapter: ModelAdapter, grid: Grid, n_text: int) -> dict[str, Tensor]:
        """Inputs of ``generate`` with one blank image of about (t, h, w) visual tokens amid ``n_text`` other tokens.

        Raises
        ------
        NotImplementedError
            If the family has none.
        """
        if (image := self.blank_image(adapter, grid)) is None:
            raise NotImplementedError(
                f"there are no examples for a {adapter.name}: name typical inputs of generate, as the processor makes "
                "them."
            )
        return self.inputs_of(adapter, (image,), n_text)

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """The same from the arguments of the vision tower."""
        return None

    def reading_order(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Tensor | None:
        """Index in reading order of each visual token, (n_tokens,), in the order in which the tower works.

        ``None``: it works in reading order. ``arguments`` are those of the tower.
        """
        return None

    def patch_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Sequence[tuple[int, int]] | None:
        """Patches (h, w) of each image in a tower that has them row by row, one image behind the other.

        ``None``: patches of one visual token are neighbours, and images are apart. ``arguments`` are the tower's.
        """
        return None

    def coordinates(self, layouts: Iterable[Layout], position_ids: Tensor | None, visual: Tensor) -> Tensor:
        """Coordinates (time, height, width) of a sample's visual tokens.

        Parameters
        ----------
        layouts : iterable of Layout
            Of its images; empty where they are not known.
        position_ids : Tensor of shape (n_axes, q_len), int64, optional
            Rotary positions of its tokens.
        visual : Tensor of shape (n_visual,), int64
            Where they are.

        Returns
        -------
        Tensor of shape (3, n_visual), int64
        """
        return grid_coordinates(layouts, visual)


@dataclass(frozen=True)
class ModelAdapter:
    """One model under its family.

    Attributes
    ----------
    family : Family
    model : PreTrainedModel
        What the user calls ``generate`` on.
    base_model : nn.Module
        Merges visual features into the embeddings and calls the decoder.
    decoder : Decoder
    vision : Vision
    modalities : dict of Modality
        By kind.
    special_token_ids : frozenset of int
        Tokens that never vote.
    n_layers : int
        Number of decoder layers.
    """

    family: Family
    model: Any
    base_model: Any
    decoder: Decoder
    vision: Vision
    modalities: dict[str, Modality]
    special_token_ids: frozenset[int]
    n_layers: int

    @classmethod
    def of(cls, family: Family, model: Any) -> ModelAdapter:
        """Look at a model; raises what :meth:`Family.check` raises."""
        family.check(model)
        decoder = family.decoder(model)
        return cls(
            family=family,
            model=model,
            base_model=family.base_model(model),
            decoder=decoder,
            vision=family.vision(model),
            modalities=family.modalities(model),
            special_token_ids=_special_token_ids(model),
            n_layers=len(decoder.layers),
        )

    @property
    def name(self) -> str:
        """Class name of the model."""
        return type(self.model).__name__

    @functools.cached_property
    def token_ids_apart(self) -> Tensor:
        """Ids that are no words: placeholders and special tokens, (n,), on the host."""
        placeholders = {modality.token_id for modality in self.modalities.values()}
        return torch.tensor(sorted(self.special_token_ids | placeholders), device="cpu")

    def refreshed(self) -> ModelAdapter:
        """The adapter of the model as it is now, whose modules may have been replaced."""
        decoder, vision = self.family.decoder(self.model), self.family.vision(self.model)
        return dataclasses.replace(self, decoder=decoder, vision=vision)

    def with_special_tokens(self, token_ids: Iterable[int]) -> ModelAdapter:
        """A copy with more tokens that never vote."""
        return dataclasses.replace(self, special_token_ids=self.special_token_ids | frozenset(token_ids))


def _special_token_ids(model: Any) -> frozenset[int]:
    found: set[int] = set()
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name in _SPECIAL_TOKENS:
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)):
                found.update(value)
            elif value is not None:
                found.add(value)
    return frozenset(found)
