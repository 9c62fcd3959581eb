"""Configuration, construction and growth of the model."""

import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from training.tokenizer import TOKEN_IDS, VOCAB_SIZE

TEXT_HIDDEN = 256
_END, _PAD = TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]


def make_config(layers: int, mlp: int) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL at toy width.

    The rotary base is 30, not Qwen's 1e6: with M-RoPE sections [8, 12, 12] the width axis owns the lowest
    frequencies, and at 1e6 they turn by less than 0.01 rad across an image, so left and right look alike.
    """
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": TEXT_HIDDEN,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [8, 12, 12]},
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


def build_model(layers: int, mlp: int) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model in float32; seed torch before calling."""
    model = Qwen2_5_VLForConditionalGeneration(make_config(layers, mlp))
    model.generation_config = GenerationConfig(eos_token_id=_END, pad_token_id=_PAD, bos_token_id=_PAD)
    return model


def grow(model: Qwen2_5_VLForConditionalGeneration, layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """Append decoder layers that change nothing yet.

    A deep model trained from scratch stalls; a shallow one trains. The new layers sit on top, so the early layers go
    on finding what was asked for, and their output projections are zero, so the function is exactly the same.

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
    depth = model.config.text_config.num_hidden_layers
    if layers < depth:
        raise ValueError(f"cannot grow {depth} decoder layers to {layers}")
    grown = build_model(layers, model.config.text_config.intermediate_size)
    missing = grown.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        for layer in grown.model.language_model.layers[depth:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return cast_weights(grown, model.dtype)


def cast_weights(model: Qwen2_5_VLForConditionalGeneration, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Cast the parameters in place, as ``from_pretrained(dtype=...)`` would.

    ``model.to(dtype)`` would also round the rotary frequencies, which turns far positions by up to a radian in bf16.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
