"""Decoder of a GGUF file: configuration, weights and vocabulary of a Llama."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig

# llama.cpp's names within a block, and those of transformers.
_OF_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm"}
_CONTROL = 3  # token_type of special tokens
_PRE_TOKENIZER = "smollm"


@dataclass(frozen=True)
class Decoder:
    """What a GGUF file holds.

    Attributes
    ----------
    config : LlamaConfig
    weights : dict of str to torch.Tensor
        float32, by the names of ``LlamaModel``; the output projection is the embedding.
    tokenizer : tokenizers.Tokenizer
        Byte-level BPE, as trained with the decoder.
    """

    config: LlamaConfig
    weights: dict[str, torch.Tensor]
    tokenizer: Tokenizer


def read_decoder(path: Path) -> Decoder:
    """Read and dequantise a GGUF file of a SmolLM2.

    Raises
    ------
    ImportError
        If the package ``gguf`` is missing.
    ValueError
        If the file is damaged, or of another kind of model.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            "the decoder of smol is a GGUF file, which the package gguf reads: pip install gguf"
        ) from error
    try:
        reader = GGUFReader(path)
    except Exception as error:  # what it finds in a damaged file decides which
        raise ValueError(f"{path} is no GGUF file that can be read ({error}); fetch it again.") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = (fields.get("general.architecture"), fields.get("tokenizer.ggml.pre"))
    if kind != ("llama", _PRE_TOKENIZER):
        raise ValueError(f"{path} holds a model of type {kind[0]} with tokenizer {kind[1]}, not a SmolLM2.")
    try:
        config = _config(fields)
        return Decoder(config, _weights(reader.tensors, config), _tokenizer(fields))
    except KeyError as error:
        raise ValueError(
            f"{path} is not laid out as a SmolLM2: its field or weight {error} is missing or new."
        ) from error


def _config(fields: dict[str, Any]) -> LlamaConfig:
    def of_llama(name: str) -> Any:
        return fields[f"llama.{name}"]

    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=of_llama("embedding_length"),
        intermediate_size=of_llama("feed_forward_length"),
        num_hidden_layers=of_llama("block_count"),
        num_attention_heads=of_llama("attention.head_count"),
        num_key_value_heads=of_llama("attention.head_count_kv"),
        max_position_embeddings=of_llama("context_length"),
        rms_norm_eps=of_llama("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": of_llama("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.unknown_token_id"],
    )


def _weights(tensors: list[Any], config: LlamaConfig) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads: dict[str, Any] = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in tensors:
        prefix, kind = "", tensor.name.removesuffix(".weight")
        if kind.startswith("blk."):
            _, layer, kind = kind.split(".")
            prefix = f"layers.{layer}."
        # A copy: without quantisation it is the file's memory.
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:
            weight = _halves_of_heads(weight, heads[kind])
        weights[f"{prefix}{(_OF_BLOCK if prefix else _OTHERS)[kind]}.weight"] = weight
    return weights


def _halves_of_heads(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys as transformers wants them; llama.cpp rotates neighbours, not halves of a head."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    return tokenizer
