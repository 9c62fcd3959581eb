"""Tiny random models of all families, made in code."""

from __future__ import annotations

import torch

from .copies import Copies
from .kinds import EOS, N_LAYERS, PAD, Family
from .qwen import QWEN_FAMILIES
from .sized import SIZED_FAMILIES
from .tiled import TILED_FAMILIES

FAMILIES = {**QWEN_FAMILIES, **TILED_FAMILIES, **SIZED_FAMILIES}
_MADE, _MOST_MADE = {}, 64  # copies of models, each with the state of the generator behind it
ON_ENGINE = tuple(name for name, family in FAMILIES.items() if family.on_engine)


def family_of(model) -> Family:
    return FAMILIES[model.config.model_type]


def tiny_model(
    family: str = "qwen2_5_vl", attn: str = "sdpa", seed: int = 0, n_layers: int = N_LAYERS, vision_options=None,
    text_options=None,
):  # fmt: skip
    """A random model whose attention is far from uniform, so that pruning changes its logits.

    Each call gets a copy of one that is made once, which is quicker, and leaves generators as if it had made one.
    """
    if not FAMILIES[family].runs(attn, "dynamic"):
        attn = FAMILIES[family].attentions[0]
    key = (family, attn, seed, n_layers, repr(vision_options), repr(text_options))
    if key not in _MADE or torch.cuda.is_available():
        torch.manual_seed(seed)  # slow, as it notes down for a GPU to come who called it
    if key not in _MADE:
        if len(_MADE) == _MOST_MADE:
            _MADE.clear()
        made = _made(FAMILIES[family], attn, _text(n_layers, text_options), vision_options or {})
        _MADE[key] = (Copies(made), torch.get_rng_state())
    copies, state = _MADE[key]
    torch.set_rng_state(state)
    return copies.new()


def _text(n_layers: int, options) -> dict:
    """Configuration of the text model."""
    return {
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
        **(options or {}),
    }


def _made(family: Family, attn: str, text, vision_options):
    cls, config = family.make(text, vision_options)
    model = cls._from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():  # what begins as zeros: all images would be alike
                weight.normal_(std=0.2)
        for name, weight in family.decoder_of(model).named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(6)
            if "q_norm.weight" in name or "k_norm.weight" in name:  # which take the length out again
                weight.mul_(family.sharpness)
    model.generation_config.eos_token_id = None  # generate exactly as many tokens as asked for
    model.generation_config.pad_token_id = PAD
    return model


def use_attention(model, name: str) -> None:
    """Set the decoder's attention by its bare name, without transformers' look at the hub."""
    for config in (model.config, family_of(model).decoder_of(model).config):  # generation looks at the whole model's
        config._attn_implementation_internal = name


def of_each_decoder() -> tuple[str, ...]:
    """One family for each class of decoders that the engine runs."""
    found = {type(FAMILIES[name].decoder_of(tiny_model(name))): name for name in reversed(ON_ENGINE)}
    return tuple(reversed(found.values()))
