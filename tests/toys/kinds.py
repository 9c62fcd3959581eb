"""What the tests have to know of a model family: its kinds of visual input, and where its parts are."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 90, 91, 92, 93, 94, 95
INDICATORS = (81, 82, 83, 84, 85)  # of Ovis2, around images
AUDIO, AUDIO_START, AUDIO_END = 87, 88, 89
PATCH = 14
N_LAYERS = 6
# Newer transformers encode images before they are repeated.
IS_OLD = "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters
AROUND = ((VISION_START,), (VISION_END,))


@dataclass(frozen=True)
class Kind:
    """One kind of visual input of a family.

    Attributes
    ----------
    token : int
        Placeholder of one visual token.
    inputs : callable
        ``inputs(generator, *size)`` draws the model's inputs for one image or video; those of several are concatenated.
    before, after : tuple of int
        Tokens around the placeholders.
    token_type : int, optional
        Its value in ``mm_token_type_ids``; ``None``: the family has no such input.
    size : tuple of int, optional
        Visual tokens of every input by height and width, whatever a prompt asks for; ``None``: as it asks.
    time : tuple of int
        Text before each frame, of which every one stands alone then; empty: one behind the other.
    tokens : callable, optional
        ``tokens(*size)`` lists the ids between ``before`` and ``after``, where they are not as many placeholders as
        the size says.
    """

    token: int
    inputs: Callable[..., dict[str, Tensor]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    token_type: int | None = None
    size: tuple[int, ...] | None = None
    time: tuple[int, ...] = ()
    tokens: Callable[..., list[int]] | None = None

    def size_of(self, asked: Sequence[int]) -> Sequence[int]:
        return asked if self.size is None else self.size

    def ids(self, size: Sequence[int]) -> list[int]:
        """Tokens of an image or video in the prompt."""
        if self.tokens is not None:
            return [*self.before, *self.tokens(*size), *self.after]
        n_parts, n_tokens = (size[0], math.prod(size[1:])) if self.time else (1, math.prod(size))
        return [*self.time, *self.before, *[self.token] * n_tokens, *self.after] * n_parts


@dataclass(frozen=True)
class Family:
    """One model family; its key in :data:`FAMILIES` is the ``model_type`` of its configuration.

    PaliGemma 2, of the same type as PaliGemma, differs from it in what can be asked of it only.

    Attributes
    ----------
    make : callable
        ``make(text, vision_options)`` gives the class and the configuration of a tiny model with this text model.
    kinds : mapping of str to Kind
        By ``"image"``, ``"video"``.
    decoder, tower : str
        Where the text model, which holds ``layers``, and the vision tower are.
    n_position_axes : int
        Coordinates of one token.
    remembered : tuple of str
        Attributes in which positions outlast a call.
    on_engine : bool
        Whether the engine runs its decoder.
    only_on_hooks : tuple of str
        Kinds of input that the engine leaves to the hooks all the same.
    tower_on_engine : bool
        Whether the engine runs its vision tower.
    positions_need_mask : bool
        Whether positions are plain ones without an attention mask, which ``generate`` makes and other calls do not.
    type_input : str
        Input that tells the kind of each token.
    attentions, caches : tuple of str, optional
        Those that it can run with; ``None``: all.
    prefix : bool
        Whether all of a prompt sees all of it, but not what was generated, which is of kind 1.
    is_hybrid : bool
        Whether some of its layers are recurrent, where a token can only be removed, not hidden.
    second_images : bool
        Whether transformers takes new images on a kept cache.
    packed : bool
        Whether pixels of several images follow each other along the last axis, not the first.
    sharpness : float
        Factor of the norms of queries and keys, so that attention is far from uniform, and not so far that rounding
        grows.
    repeats : str
        What ``generate`` repeats for beams and returned sequences, one behind the other: visual inputs of whole
        "samples", as it should, or, in older transformers, single "images" or "patches", or "packs" of all images.
    """

    make: Callable[[dict[str, Any], dict[str, Any]], tuple[type, Any]]
    kinds: Mapping[str, Kind]
    decoder: str = "model.language_model"
    tower: str = "model.visual"
    n_position_axes: int = 1
    remembered: tuple[str, ...] = ()
    on_engine: bool = True
    only_on_hooks: tuple[str, ...] = ()
    tower_on_engine: bool = False
    positions_need_mask: bool = False
    type_input: str = "mm_token_type_ids"
    attentions: tuple[str, ...] | None = None
    caches: tuple[str, ...] | None = None
    prefix: bool = False
    is_hybrid: bool = False
    second_images: bool = True
    packed: bool = False
    sharpness: float = 1.5
    repeats: str = "samples"

    def axis_of(self, name: str) -> int:
        """Axis along which a visual input has the images."""
        return -1 if self.packed and name.startswith("pixel") else 0

    def decoder_of(self, model) -> nn.Module:
        return operator.attrgetter(self.decoder)(model)

    def tower_of(self, model) -> nn.Module:
        return operator.attrgetter(self.tower)(model)

    def takes(self, rows) -> bool:
        """Whether the rows of a prompt hold only what the family knows."""
        return all(kind == "text" or kind in self.kinds for row in rows for kind, *_ in row)

    def runs(self, attention: str, cache: str) -> bool:
        """Whether it can run with an attention and a cache."""
        return attention in (self.attentions or (attention,)) and cache in (self.caches or (cache,))


AS_IMAGES: dict[str, Any] = {"repeats": "images" if IS_OLD else "samples"}
AS_PATCHES: dict[str, Any] = {"repeats": "patches" if IS_OLD else "samples"}
