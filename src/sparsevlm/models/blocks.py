"""Decoders that the engine runs, by the classes that transformers builds them of: any other runs on hooks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .decoder import Decoder, DecoderBlock

_PLAIN = DecoderBlock()
_WITH_HEAD_NORMS = DecoderBlock(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
# Rotary positions whose tables are those of the position alone, not of how long a prompt is.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
# Those that are default ones as far as a model was trained.
_DYNAMIC = "dynamic"


@dataclass(frozen=True)
class _Classes:
    """Classes of one file of transformers that make up a decoder, and its layer."""

    model: str
    layer: str
    attention: str
    mlp: str
    norm: str
    rotary: str
    block: DecoderBlock = _PLAIN


def _named(name: str, mlp: str = "", block: DecoderBlock = _PLAIN, model: str = "") -> _Classes:
    """Classes whose names begin alike."""
    return _Classes(
        model=model or f"{name}Model",
        layer=f"{name}DecoderLayer",
        attention=f"{name}Attention",
        mlp=mlp or f"{name}MLP",
        norm=f"{name}RMSNorm",
        rotary=f"{name}RotaryEmbedding",
        block=block,
    )


_BY_FILE = {
    f"transformers.models.{folder}.modeling_{folder}": classes
    for folder, classes in {
        "llama": _named("Llama"),
        "mistral": _named("Mistral"),
        "qwen2": _named("Qwen2"),
        "qwen2_vl": _named("Qwen2VL", mlp="Qwen2MLP", model="Qwen2VLTextModel"),
        "qwen2_5_vl": _named("Qwen2_5_VL", mlp="Qwen2MLP", model="Qwen2_5_VLTextModel"),
        "qwen3": _named("Qwen3", block=_WITH_HEAD_NORMS),
        "qwen3_vl": _named("Qwen3VLText", block=_WITH_HEAD_NORMS),
    }.items()
}


def with_block(decoder: Decoder) -> Decoder:
    """A decoder with the description of its layers, if all its parts are of known classes; else with the reason."""
    classes = _BY_FILE.get(type(decoder.module).__module__)
    if classes is None or type(decoder.module).__name__ != classes.model:
        return without_block(decoder, f"a decoder of class {type(decoder.module).__name__}, which is not described")
    if reason := _unknown_part(decoder, classes) or _other_rotation(decoder):
        return without_block(decoder, reason)
    most = decoder.rotary.original_max_seq_len if decoder.rotary.rope_type == _DYNAMIC else None
    return dataclasses.replace(decoder, block=classes.block, most_positions=most)


def without_block(decoder: Decoder, reason: str) -> Decoder:
    """A decoder that runs on hooks for a reason."""
    return dataclasses.replace(decoder, block=None, undescribed=reason)


def _unknown_part(decoder: Decoder, classes: _Classes) -> str | None:
    """A part of another class, whose work the description would not be."""
    wanted = [(decoder.norm, classes.norm), (decoder.rotary, classes.rotary)]
    for layer in decoder.layers:
        wanted.append((layer, classes.layer))
        for name in ("attention", "mlp", "attention_norm", "mlp_norm", "query_norm", "key_norm"):
            path, expected = getattr(classes.block, name), getattr(classes, name, classes.norm)
            if path is not None:
                wanted.append((_part(layer, path), expected))
    for part, expected in wanted:
        if (type(part).__module__, type(part).__name__) != (type(decoder.module).__module__, expected):
            return f"a {type(part).__name__} in the decoder in the place of a {expected}"
    return None


def _part(layer: Any, path: str) -> Any:
    for name in path.split("."):
        layer = getattr(layer, name, None)
    return layer


def _other_rotation(decoder: Decoder) -> str | None:
    """Rotary positions of another kind, or heads of several sizes."""
    kind = getattr(decoder.rotary, "rope_type", None)
    if kind not in _ROPE_TYPES and (kind != _DYNAMIC or decoder.n_position_axes > 1):
        return f"rotary positions of type {kind!r}, whose tables depend on more than the position"
    rotated = 2 * decoder.rotary.inv_freq.shape[0]
    sizes = {attention.head_dim for attention in decoder.attentions} | {rotated}
    return f"heads of {max(sizes)} numbers beside {min(sizes)} that are rotated" if len(sizes) > 1 else None
