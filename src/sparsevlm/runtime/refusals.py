"""What a model cannot do under SparseVLM, refused with the remedy before it is tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models import ModelAdapter


def check_call(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> None:
    """Refuse arguments of the model that speak of the whole sequence.

    Raises
    ------
    NotImplementedError
    """
    if inputs.get("labels") is not None:
        raise NotImplementedError(
            "labels= needs a loss over the whole sequence, of which pruning leaves a part. Compute the loss "
            "after remove_sparsevlm(model)."
        )
    has_pixels = any(inputs.get(modality.pixels) is not None for modality in adapter.modalities.values())
    if isinstance(inputs.get("logits_to_keep"), Tensor) and has_pixels:
        raise NotImplementedError(
            "logits_to_keep as a tensor names rows of the whole sequence, of which pruning leaves a part. Pass an "
            "int, or take the rows by state.report.logit_positions."
        )


def check_prefill(generation_config: Any) -> None:
    """Refuse a prompt that comes in parts.

    Raises
    ------
    NotImplementedError
    """
    if generation_config.prefill_chunk_size is not None:
        raise NotImplementedError(
            "prefill_chunk_size splits a prompt into parts that cannot be judged one by one. Unset it, or remove "
            "SparseVLM for this request with remove_sparsevlm(model)."
        )


def check_mode(adapter: ModelAdapter) -> None:
    """Refuse gradient checkpointing, and attentions whose masks cannot be gathered.

    Raises
    ------
    NotImplementedError
    """
    if adapter.decoder.module.training and getattr(adapter.decoder.module, "gradient_checkpointing", False):
        raise NotImplementedError(
            "gradient checkpointing runs layers a second time, outside of the pass that chose the tokens. Call "
            "model.gradient_checkpointing_disable(), or train after remove_sparsevlm(model)."
        )
    name = adapter.attn_implementation
    if "flex" in name or name.startswith("paged"):
        raise NotImplementedError(
            f"attention {name!r} is not supported under SparseVLM. Call "
            "model.set_attn_implementation('sdpa') (or 'eager', 'flash_attention_2')."
        )


def check_packing(positions: Tensor, attention_mask: Any) -> None:
    """Refuse several sequences packed into one row: pruning would tear them apart.

    Raises
    ------
    NotImplementedError
    """
    text = positions[0]
    if positions.shape[0] != 4 or text.shape[0] != 1 or isinstance(attention_mask, Tensor):
        return
    if bool((text.diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "packed sequences (position_ids that start again within a row) are not supported under SparseVLM; "
            "pass them as a batch with an attention_mask."
        )
