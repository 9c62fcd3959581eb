"""Smol as a Qwen2.5-VL: configuration, model, tokenizer and processor files around a decoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from ..bundled import bundled_path
from .decoder import Decoder

# Qwen's names, in the order of their ids, which follow those of the decoder's vocabulary.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_ROWS = 64  # of the embedding, added for them: a multiple of what matrix products are fast at
_TIME, _HEIGHT = 2, 6
_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif -%}
"""
_PROCESSOR_FILE = "preprocessor_config.json"


def bundled_tower() -> dict[str, Any]:
    """``vision_config`` of the bundled model."""
    config: dict[str, Any] = json.loads((bundled_path() / "config.json").read_text(encoding="utf-8"))
    vision: dict[str, Any] = config["vision_config"]
    return vision


def make_config(decoder: LlamaConfig, tower: dict[str, Any]) -> Qwen2_5_VLConfig:
    """The configuration of a Qwen2.5-VL with the sizes of a Llama.

    The first channels of a head turn fastest. Of those, two go with time, six with height and all others, from about
    0.06 rad a token on, with width; positions of text are the same on all three, so that they are those of a Llama.

    Parameters
    ----------
    decoder : LlamaConfig
    tower : dict
        ``vision_config``, whose output width is set here.
    """
    half = decoder.hidden_size // decoder.num_attention_heads // 2
    same = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    text = {name: getattr(decoder, name) for name in same}
    rope: Any = decoder.rope_parameters
    text["vocab_size"] = decoder.vocab_size + _ROWS
    text["tie_word_embeddings"] = True
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": rope["rope_theta"],
        "mrope_section": [_TIME, _HEIGHT, half - _TIME - _HEIGHT],
    }
    start, end, image, video = range(decoder.vocab_size, decoder.vocab_size + len(VISION_TOKENS))
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower | {"out_hidden_size": decoder.hidden_size},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )


def build_model(decoder: Decoder, tower: dict[str, Any]) -> Qwen2_5_VLForConditionalGeneration:
    """The model in float32 with the weights of a decoder and a new tower; seed torch before calling.

    New rows of the embedding are the mean of the others, biases of queries, keys and values zero.
    """
    config = make_config(decoder.config, tower)
    model = Qwen2_5_VLForConditionalGeneration(config)
    text: Any = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    weights = dict(decoder.weights)
    embedding = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([embedding, embedding.mean(dim=0, keepdim=True).expand(_ROWS, -1)])
    loaded = model.model.language_model.load_state_dict(weights, strict=False)
    biases = {name for name in loaded.missing_keys if name.endswith(".bias")}
    if loaded.unexpected_keys or len(biases) != len(loaded.missing_keys):
        raise ValueError(f"the GGUF file lacks weights of a SmolLM2: {sorted(set(loaded.missing_keys) - biases)}.")
    with torch.no_grad():
        for name in biases:
            model.model.language_model.get_parameter(name).zero_()
    return model.eval()


def make_tokenizer(decoder: Decoder) -> PreTrainedTokenizerFast:
    """Tokenizer of the decoder with the tokens of Qwen2.5-VL's images, and the chat template of both."""
    config: Any = decoder.config
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=decoder.tokenizer,
        bos_token=decoder.tokenizer.id_to_token(config.bos_token_id),
        eos_token=decoder.tokenizer.id_to_token(config.eos_token_id),
        pad_token=decoder.tokenizer.id_to_token(config.pad_token_id),
        additional_special_tokens=list(VISION_TOKENS),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = _SYSTEM + (bundled_path() / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def write_processor_files(decoder: Decoder, folder: Path) -> None:
    """Write tokenizer, chat template and image processor settings into ``folder``."""
    make_tokenizer(decoder).save_pretrained(folder)
    shutil.copyfile(bundled_path() / _PROCESSOR_FILE, folder / _PROCESSOR_FILE)
