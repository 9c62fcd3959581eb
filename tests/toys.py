"""Tiny random models and inputs, made in code; what the tests have to know of a model family is a row of FAMILIES."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    SiglipVisionConfig,
)

IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 90, 91, 92, 93, 94, 95
PATCH = 14
N_LAYERS = 6


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

    tokens: Callable[..., list[int]] | None = None

    def size_of(self, asked: Sequence[int]) -> Sequence[int]:
        return asked if self.size is None else self.size

    def ids(self, *size: int) -> list[int]:
        return self.tokens(*size) if self.tokens is not None else [self.token] * math.prod(size)


@dataclass(frozen=True)
class Family:
    """One model family; its key in :data:`FAMILIES` is the ``model_type`` of its configuration.

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
        Whether the engine runs it.
    groups_images : bool
        Whether every transformers knows which images belong to one prompt when it copies prompts.
    """

    make: Callable[[dict[str, Any], dict[str, Any]], tuple[type, Any]]
    kinds: Mapping[str, Kind]
    decoder: str = "model.language_model"
    tower: str = "model.visual"
    n_position_axes: int = 1
    remembered: tuple[str, ...] = ()
    on_engine: bool = True
    groups_images: bool = False

    def decoder_of(self, model) -> nn.Module:
        return operator.attrgetter(self.decoder)(model)

    def tower_of(self, model) -> nn.Module:
        return operator.attrgetter(self.tower)(model)

    def takes(self, rows) -> bool:
        """Whether the rows of a prompt hold only what the family knows."""
        return all(kind == "text" or kind in self.kinds for row in rows for kind, *_ in row)


def _patches(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 3 * 2 * PATCH * PATCH, generator=generator)


def _qwen_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": _patches(4 * h * w, generator), "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}


def _qwen_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    pixels, grid = _patches(t * 4 * h * w, generator), torch.tensor([[t, 2 * h, 2 * w]])
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}


def _timed_qwen_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {**_qwen_video(generator, t, h, w), "second_per_grid_ts": torch.ones(1)}


_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _qwen2_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, **vision_options}
    text = {**text, "rope_parameters": _MROPE}
    return Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen2_5_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], **vision_options}
    text = {**text, "rope_parameters": _MROPE}
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen_kinds(video: Callable[..., dict[str, Tensor]]) -> dict[str, Kind]:
    around = ((VISION_START,), (VISION_END,))
    return {"image": Kind(IMAGE, _qwen_image, *around, 1), "video": Kind(VIDEO, video, *around, 2)}


def _llava(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 4 * PATCH, "patch_size": PATCH, "projection_dim": 32, **vision_options}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=IMAGE
    )
    return LlavaForConditionalGeneration, config


def _llava_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, h * PATCH, w * PATCH, generator=generator)}


# Towers of 3 x 3 patches; pictures of 4 x 6 patches in four tiles, of whose margins two rows are cut off.
_TILE, _PINPOINTS = 3 * PATCH, [[3 * PATCH, 6 * PATCH], [6 * PATCH, 3 * PATCH], [6 * PATCH, 6 * PATCH]]
_SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
_SMALL_TOWER |= {"image_size": _TILE, "patch_size": PATCH}


def _llava_next(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = CLIPVisionConfig(**_SMALL_TOWER, projection_dim=32, **vision_options)
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE, image_grid_pinpoints=_PINPOINTS
    )
    return LlavaNextForConditionalGeneration, config


def _llava_onevision(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = SiglipVisionConfig(**_SMALL_TOWER, vision_use_head=False, **vision_options)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration, config


def _tiles(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    pixels = torch.randn(1, 5, 3, _TILE, _TILE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[h * PATCH, w * PATCH]])}


def _frames(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(1, t, 3, _TILE, _TILE, generator=generator)}


_IN_TILES = Kind(IMAGE, _tiles, size=(4, 6), tokens=lambda h, w: [IMAGE] * (9 + h * (w + 1)))
_IN_FRAMES = Kind(VIDEO, _frames, size=(3, 2, 2), tokens=lambda t, h, w: [VIDEO] * (t * h * w + 1))


def _internvl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    """As in InternVL 3.5; 3 has Qwen2 for a text model."""
    vision = {**_SMALL_TOWER, "image_size": [4 * PATCH] * 2, "patch_size": [PATCH] * 2, **vision_options}
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen3Config(**text, head_dim=16), image_token_id=IMAGE, image_seq_length=4
    )
    return InternVLForConditionalGeneration, config


def _three_tiles(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(t, 3, 2 * h * PATCH, 2 * w * PATCH, generator=generator)}


_OF_QWEN = {"n_position_axes": 3, "remembered": ("model.rope_deltas",), "groups_images": True}
FAMILIES = {
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen_kinds(_timed_qwen_video), **_OF_QWEN),
    "qwen2_vl": Family(_qwen2_vl, _qwen_kinds(_qwen_video), **_OF_QWEN),
    "llava": Family(
        _llava, {"image": Kind(IMAGE, _llava_image, size=(4, 4))}, tower="model.vision_tower", on_engine=False
    ),
    "llava_next": Family(_llava_next, {"image": _IN_TILES}, tower="model.vision_tower", on_engine=False),
    "llava_onevision": Family(
        _llava_onevision, {"image": _IN_TILES, "video": _IN_FRAMES}, tower="model.vision_tower", on_engine=False
    ),
    "internvl": Family(
        _internvl,
        {"image": Kind(IMAGE, _three_tiles, (VISION_START,), (VISION_END,), size=(3, 2, 2))},
        tower="model.vision_tower",
        on_engine=False,
    ),
}
ON_ENGINE = tuple(name for name, family in FAMILIES.items() if family.on_engine)


def family_of(model) -> Family:
    return FAMILIES[model.config.model_type]


def tiny_model(
    family: str = "qwen2_5_vl", attn: str = "sdpa", seed: int = 0, n_layers: int = N_LAYERS, vision_options=None
):
    """A random model whose attention is far from uniform, so that pruning changes its logits."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    cls, config = FAMILIES[family].make(text, vision_options or {})
    model = cls._from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for name, weight in FAMILIES[family].decoder_of(model).named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(6)
    model.generation_config.eos_token_id = None  # generate exactly as many tokens as asked for
    model.generation_config.pad_token_id = PAD
    return model


def use_attention(model, name: str) -> None:
    """Set the decoder's attention by its bare name, without transformers' look at the hub."""
    for config in (model.config, family_of(model).decoder_of(model).config):  # generation looks at the whole model's
        config._attn_implementation_internal = name


def text(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1, 80, (n,), generator=generator).tolist()


def make_inputs(*rows, seed: int = 0, pad: bool = True, family: str = "qwen2_5_vl"):
    """Inputs of a batch; each row is a list of ``("text", n)``, ``("image", h, w)``, ``("video", t, h, w)``.

    Heights and widths count visual (merged) tokens. Left padding, as ``generate`` wants it.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = FAMILIES[family].kinds
    ids, types, visual = [], [], {}
    for row in rows:
        row_ids, row_types = [], []
        for name, *asked in row:
            if name == "text":
                row_ids += text(asked[0], generator)
                row_types += [0] * asked[0]
                continue
            kind = kinds[name]
            size = kind.size_of(asked)
            between = kind.ids(*size)
            row_ids += [*kind.before, *between, *kind.after]
            of_kind = [kind.token_type if token == kind.token else 0 for token in between]
            row_types += [0] * len(kind.before) + of_kind + [0] * len(kind.after)
            for key, value in kind.inputs(generator, *size).items():
                visual.setdefault(key, []).append(value)
        ids.append(row_ids)
        types.append(row_types)
    width = max(map(len, ids))

    def padded(values, filler):
        return torch.tensor([[filler] * (width - len(row)) + row for row in values])

    inputs = {"input_ids": padded(ids, PAD)}
    if all(kind.token_type is not None for kind in kinds.values()):
        inputs["mm_token_type_ids"] = padded(types, 0)
    if pad:
        inputs["attention_mask"] = padded([[1] * len(row) for row in ids], 0)
    return inputs | {key: torch.cat(values) for key, values in visual.items()}


def equally_long(rows, family: str = "qwen2_5_vl"):
    """Rows that take no padding: short ones get more text at their end."""
    lengths = [make_inputs(row, family=family)["input_ids"].shape[1] for row in rows]
    return [
        row if length == max(lengths) else [*row, ("text", max(lengths) - length)]
        for row, length in zip(rows, lengths, strict=True)
    ]


def split_visual(inputs, rows, family: str = "qwen2_5_vl"):
    """The visual inputs of every sample, in prompt order: a list of dicts, one a row of ``rows``."""
    kinds, queues = FAMILIES[family].kinds, {}
    samples = []
    for row in rows:
        samples.append({})
        for name, *size in row:
            if name == "text":
                continue
            for key, value in kinds[name].inputs(torch.Generator(), *kinds[name].size_of(size)).items():
                start = queues.get(key, 0)
                queues[key] = start + value.shape[0]
                samples[-1].setdefault(key, []).append(inputs[key][start : queues[key]])
    return [{key: torch.cat(values) for key, values in sample.items()} for sample in samples]


def join_visual(samples):
    """The visual inputs of a batch from those of its samples."""
    keys = dict.fromkeys(key for sample in samples for key in sample)
    return {key: torch.cat([sample[key] for sample in samples if key in sample]) for key in keys}


PROMPTS = {
    "one image": [[("text", 3), ("image", 4, 6), ("text", 7)]],
    "image first": [[("image", 5, 4), ("text", 6)]],
    "two images": [[("text", 2), ("image", 4, 4), ("text", 4), ("image", 3, 6), ("text", 5)]],
    "video": [[("text", 2), ("video", 3, 3, 4), ("text", 6)]],
    "image and video": [[("image", 4, 4), ("text", 3), ("video", 2, 4, 4), ("text", 5)]],
    "batch, same size": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 3), ("image", 4, 6), ("text", 7)],
    ],
    "batch, left padding": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 2), ("image", 4, 6), ("text", 3)],
    ],
    "batch, unequal counts": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 9), ("image", 3, 4), ("text", 4), ("image", 4, 4), ("text", 2)],
        [("text", 12)],
    ],
}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def pairwise(values):
    return list(itertools.pairwise(values))
