"""Descriptions of models as data; both paths read them and name no family."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compat import unsupported_parallelism
from .decoder import FULL, SLIDING, Decoder
from .examples import BlankImage, blank_inputs
from .layout import Grid, Layout, grid_coordinates, n_tokens
from .tower import Vision

_AROUND = tuple(f"{kind}_{end}_token_id" for kind in ("vision", "image", "video", "audio") for end in ("start", "end"))
_OF_GEMMA = tuple(f"{end}{kind}_token_{name}" for end in ("bo", "eo") for kind in "ia" for name in ("id", "index"))
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", *_AROUND, *_OF_GEMMA)


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


class Family:
    """A model family: subclassed once per family, without state; all answers come from the model that is given."""

    model_types: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    # Whether placeholders that stand for no patch, such as the end of a row, are never dropped.
    protects_separators: bool = True
    # Whether every token of a prompt attends to all of it, those behind it among them.
    sees_whole_prompt: bool = False
    # Whether the first request has to show that gathering all rows changes nothing.
    must_be_proven: bool = False
    # Whether the pixels of all images of a batch are one row, which older transformers repeat as a whole.
    packs_pixels: ClassVar[bool] = False
    speaks: ClassVar[bool] = False  # another model makes speech of the hidden states that generate returns
    layer_kinds: ClassVar[frozenset[str]] = frozenset({FULL, SLIDING})

    def check(self, model: Any) -> None:
        """Refuse a model of the family that cannot be pruned: with layers of another kind, or spread over
        processes by unknown means.

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
        if (problem := unsupported_parallelism(model)) is not None:
            raise NotImplementedError(problem)

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

    def n_placeholders(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> int | None:
        """How many placeholders the pixels of a kind need; ``None``: they do not tell, nor do the sizes beside them."""
        layouts = self.layouts(adapter, kind, inputs)
        return None if layouts is None else sum(map(n_tokens, layouts))

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
        """Visual tokens of the example with about ``n_visual`` of them; so many where the family has no examples."""
        image = self.blank_image(adapter, (1, 1, n_visual))
        return n_visual if image is None else image.n_visual

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
            special_token_ids=special_token_ids(model.config, model.config.get_text_config(), model.generation_config),
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


def special_token_ids(*configs: Any) -> frozenset[int]:
    """Ids of tokens that are no words, by the configurations of a model, its text model and its generation."""
    found: set[int] = set()
    for config in configs:
        for name in _SPECIAL_TOKENS:
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)):
                found.update(value)
            elif value is not None:
                found.add(value)
    return frozenset(found)
