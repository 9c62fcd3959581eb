"""Configuration, construction and growth of the model."""

from typing import TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from training.tokenizer import TOKEN_IDS, VOCAB_SIZE

Module = TypeVar("Module", bound=nn.Module)

TEXT_HIDDEN = 256
_EMBEDDING_STD = 0.5  # about the size of the visual tokens at the start
_LAYERS = "model.language_model.layers."
_END, _PAD = TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]


def make_config(layers: int, mlp: int, rope_theta: float) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL at toy width.

    ``rope_theta`` and the sections of M-RoPE decide what attention can tell apart. To find what a word names wherever
    it lies takes frequencies that hardly turn over a chat; where it lies takes some that do. The width axis owns the
    lowest frequencies, so it gets most of them: its fastest turns by 0.06 rad a token, and 28 of the 64 channels of a
    head by less than 0.005. At a base of 300 with sections [4, 14, 14] only four did, and shapes were never found by
    name within 9000 steps. At Qwen's 1e6 left and right would look alike in so few tokens.
    """
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": TEXT_HIDDEN,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": [2, 8, 22]},
        "bos_token_id": _PAD,
        "eos_token_id": _END,
        "pad_token_id": _PAD,
    }
    vision = {
        "depth": 6,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_heads": 4,
        "out_hidden_size": TEXT_HIDDEN,
        "window_size": 112,
        "fullatt_block_indexes": [2, 5],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=TOKEN_IDS["<|image_pad|>"],
        video_token_id=TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=TOKEN_IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_model(layers: int, mlp: int, rope_theta: float = 1e4) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model in float32; seed torch before calling.

    The classes initialise every matrix with standard deviation 0.02, made for widths in the thousands. At width 256
    attention then starts out uniform and hardly learns where to look, so each matrix is scaled to its fan-in, and the
    matrices that write into the residual stream also to the depth.
    """
    model = Qwen2_5_VLForConditionalGeneration(make_config(layers, mlp, rope_theta))
    model.generation_config = GenerationConfig(eos_token_id=_END, pad_token_id=_PAD, bos_token_id=_PAD)
    visual, text = model.model.visual, model.model.language_model
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    nn.init.normal_(text.embed_tokens.weight, std=_EMBEDDING_STD)
    with torch.no_grad():
        for block in visual.blocks:
            for module in (block.attn.proj, block.mlp.down_proj):
                module.weight.mul_((2 * len(visual.blocks)) ** -0.5)
        for layer in text.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.mul_((2 * layers) ** -0.5)
    return model


def grow(model: Qwen2_5_VLForConditionalGeneration, layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """Add decoder layers that change nothing yet, evenly among the old ones.

    The output projections of the new layers are zero, so the function is exactly the same. A shallow model learns
    faster; spread over the depth, what it does with a picture does not all end up in the first layers.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        The trained model.
    layers : int
        Number of decoder layers wanted, at least as many as ``model`` has.

    Raises
    ------
    ValueError
        If ``layers`` is smaller than the model's depth.
    """
    text = model.config.text_config
    depth = text.num_hidden_layers
    if layers < depth:
        raise ValueError(f"cannot grow {depth} decoder layers to {layers}")
    grown = build_model(layers, text.intermediate_size, text.rope_parameters["rope_theta"])
    old, new = model.model.language_model.layers, grown.model.language_model.layers
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith(_LAYERS)}
    missing = grown.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    kept = {index * layers // depth: layer for index, layer in enumerate(old)}
    with torch.no_grad():
        for index, layer in enumerate(new):
            if index in kept:
                layer.load_state_dict(kept[index].state_dict())
            else:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return cast_weights(grown, model.dtype)


def cast_weights(model: Module, dtype: torch.dtype) -> Module:
    """Cast the parameters in place, as ``from_pretrained(dtype=...)`` would.

    ``model.to(dtype)`` would also round the rotary frequencies, which turns far positions by up to a radian in bf16.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
