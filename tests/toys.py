"""Tiny random models and inputs, made in code; what the tests have to know of a model family is a row of FAMILIES."""

from __future__ import annotations

import inspect
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
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 90, 91, 92, 93, 94, 95
AUDIO, AUDIO_START, AUDIO_END = 87, 88, 89
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
    time : tuple of int
        Text before each frame, of which every one stands alone then; empty: one behind the other.
    """

    token: int
    inputs: Callable[..., dict[str, Tensor]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    token_type: int | None = None
    size: tuple[int, ...] | None = None
    time: tuple[int, ...] = ()

    def size_of(self, asked: Sequence[int]) -> Sequence[int]:
        return asked if self.size is None else self.size

    def ids(self, size: Sequence[int]) -> list[int]:
        """Tokens of an image or video in the prompt."""
        n_parts, n_tokens = (size[0], math.prod(size[1:])) if self.time else (1, math.prod(size))
        return [*self.time, *self.before, *[self.token] * n_tokens, *self.after] * n_parts


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
    positions_need_mask : bool
        Whether positions are plain ones without an attention mask, which ``generate`` makes and other calls do not.
    repeats : str
        What ``generate`` repeats for beams and returned sequences, one behind the other: visual inputs of whole
        "samples", as it should, or, in older transformers, single "images" or "patches".
    type_input : str
        Input that tells the kind of each token.
    attentions, caches : tuple of str, optional
        Those that it can run with; ``None``: all.
    masks_itself : bool
        Whether its layers see something else than all that came before.
    is_hybrid : bool
        Whether some of its layers are recurrent, where a token can only be removed, not hidden.
    second_images : bool
        Whether transformers takes new images on a kept cache.
    """

    make: Callable[[dict[str, Any], dict[str, Any]], tuple[type, Any]]
    kinds: Mapping[str, Kind]
    decoder: str = "model.language_model"
    tower: str = "model.visual"
    n_position_axes: int = 1
    remembered: tuple[str, ...] = ()
    on_engine: bool = True
    positions_need_mask: bool = False
    repeats: str = "samples"
    type_input: str = "mm_token_type_ids"
    attentions: tuple[str, ...] | None = None
    caches: tuple[str, ...] | None = None
    masks_itself: bool = False
    is_hybrid: bool = False
    second_images: bool = True

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


_AROUND = ((VISION_START,), (VISION_END,))


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
_OMNI = {
    **_QWEN,
    "audio_token_id": AUDIO,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
    "position_id_per_seconds": 2,
}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 36}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
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


def _qwen3_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, "head_dim": 16, "rope_parameters": _MROPE}
    return Qwen3VLForConditionalGeneration, Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen3_vl_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, **_EXPERTS, "head_dim": 16, "rope_parameters": _MROPE, "mlp_only_layers": [4]}
    return Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen2_5_omni(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], **vision_options}
    text = {**text, "rope_parameters": _MROPE}
    parts = {"text_config": text, "vision_config": vision, "audio_config": _audio(64)}
    return Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniThinkerConfig(**parts, **_OMNI)


def _qwen3_omni_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, **_EXPERTS, "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}}
    parts = {
        "text_config": text,
        "vision_config": vision,
        "audio_config": {**_audio(64), "n_window": 50, "downsample_hidden_size": 8},
    }
    return Qwen3OmniMoeThinkerForConditionalGeneration, Qwen3OmniMoeThinkerConfig(**parts, **_OMNI)


_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_HYBRID = ["linear_attention", "full_attention"]
_PARTIAL = {**_MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}


def _qwen3_5_parts(text: dict[str, Any], vision_options: dict[str, Any]) -> dict[str, Any]:
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 36, **vision_options}
    types = (_HYBRID * text["num_hidden_layers"])[: text["num_hidden_layers"]]
    text = {**text, **_DELTA, "head_dim": 16, "rope_parameters": _PARTIAL, "layer_types": types}
    return {"text_config": text, "vision_config": vision}


def _qwen3_5(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    return Qwen3_5ForConditionalGeneration, Qwen3_5Config(**_qwen3_5_parts(text, vision_options), **_QWEN)


def _qwen3_5_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    text = {**text, **_EXPERTS, "shared_expert_intermediate_size": 48}
    return Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig(**_qwen3_5_parts(text, vision_options), **_QWEN)


def _audio(width: int) -> dict[str, Any]:
    return {
        "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
        "n_window": 4, "output_dim": width,
    }  # fmt: skip


def _qwen_kinds(video: Callable[..., dict[str, Tensor]]) -> dict[str, Kind]:
    return {"image": Kind(IMAGE, _qwen_image, *_AROUND, 1), "video": Kind(VIDEO, video, *_AROUND, 2)}


def _omni_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {**_qwen_video(generator, t, h, w), "video_second_per_grid": torch.ones(1)}


def _llava(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 4 * PATCH, "patch_size": PATCH, "projection_dim": 32, **vision_options}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=IMAGE
    )
    return LlavaForConditionalGeneration, config


def _llava_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, h * PATCH, w * PATCH, generator=generator)}


_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _siglip(n_patches: int, options: dict[str, Any]) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = {"image_size": n_patches * PATCH, "patch_size": PATCH, "vision_use_head": False}
    return vision | size | {"model_type": "siglip_vision_model"} | options


def _gemma3(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    types = (_MIXED * text["num_hidden_layers"])[: text["num_hidden_layers"]]
    text = {**text, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12, "layer_types": types}
    parts = {"text_config": text, "vision_config": _siglip(8, vision_options), "mm_tokens_per_image": 16}
    tokens = {"image_token_index": IMAGE, "boi_token_index": VISION_START, "eoi_token_index": VISION_END}
    return Gemma3ForConditionalGeneration, Gemma3Config(**parts, **tokens)


def _gemma3_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 8 * PATCH, 8 * PATCH, generator=generator)}


_TIMED_FRAMES = {
    "image": Kind(IMAGE, _qwen_image, *_AROUND, 1),
    "video": Kind(VIDEO, _qwen_video, *_AROUND, 2, time=(81, 82)),
}
_OMNI_KINDS = {"image": Kind(IMAGE, _qwen_image, *_AROUND), "video": Kind(VIDEO, _omni_video, *_AROUND)}
_OF_QWEN = {"n_position_axes": 3, "remembered": ("model.rope_deltas",)}
# Older transformers have the parts of a thinker on the thinker itself.
_FLAT = {"decoder": "model", "tower": "visual", "remembered": ("rope_deltas",)}
_OF_OMNI = {**_OF_QWEN, "positions_need_mask": True}
_OF_OMNI |= {} if hasattr(modeling_qwen2_5_omni, "Qwen2_5OmniThinkerModel") else _FLAT
# Newer transformers encode images before they are repeated.
_IS_OLD = "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters
_OF_OMNI |= {"repeats": "patches"} if _IS_OLD else {}
_OF_LLAVA = {"tower": "model.vision_tower"} | ({"repeats": "images"} if _IS_OLD else {})
FAMILIES = {
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen_kinds(_timed_qwen_video), **_OF_QWEN),
    "qwen2_vl": Family(_qwen2_vl, _qwen_kinds(_qwen_video), **_OF_QWEN),
    "qwen3_vl": Family(_qwen3_vl, _TIMED_FRAMES, **_OF_QWEN, on_engine=False),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, _TIMED_FRAMES, **_OF_QWEN, on_engine=False),
    "qwen2_5_omni_thinker": Family(_qwen2_5_omni, _OMNI_KINDS, **_OF_OMNI, on_engine=False),
    "qwen3_omni_moe_thinker": Family(_qwen3_omni_moe, _OMNI_KINDS, **_OF_OMNI, on_engine=False),
    "qwen3_5": Family(_qwen3_5, _TIMED_FRAMES, **_OF_QWEN, on_engine=False, is_hybrid=True),
    "qwen3_5_moe": Family(_qwen3_5_moe, _TIMED_FRAMES, **_OF_QWEN, on_engine=False, is_hybrid=True),
    "llava": Family(_llava, {"image": Kind(IMAGE, _llava_image, size=(4, 4))}, **_OF_LLAVA, on_engine=False),
    "gemma3": Family(
        _gemma3, {"image": Kind(IMAGE, _gemma3_image, *_AROUND, 1, size=(4, 4))}, tower="model.vision_tower",
        on_engine=False, type_input="token_type_ids", attentions=("sdpa", "eager"), caches=("dynamic", "none"),
        masks_itself=True, second_images=not _IS_OLD,
    ),
}  # fmt: skip
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
    if not FAMILIES[family].runs(attn, "dynamic"):
        attn = FAMILIES[family].attentions[0]
    model = cls._from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for name, weight in FAMILIES[family].decoder_of(model).named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(6)
            if "q_norm.weight" in name or "k_norm.weight" in name:  # which take the length out again
                weight.mul_(1.5)
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
            own = kind.ids(size)
            row_ids += own
            row_types += [kind.token_type if token == kind.token else 0 for token in own]
            for key, value in kind.inputs(generator, *size).items():
                visual.setdefault(key, []).append(value)
        ids.append(row_ids)
        types.append(row_types)
    width = max(map(len, ids))

    def padded(values, filler):
        return torch.tensor([[filler] * (width - len(row)) + row for row in values])

    inputs = {"input_ids": padded(ids, PAD)}
    if all(kind.token_type is not None for kind in kinds.values()):
        inputs[FAMILIES[family].type_input] = padded(types, 0)
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
