"""FlashAttention's semantics on the CPU: what transformers' flash path means by its masks, computed plainly."""

from __future__ import annotations

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

NAME = "emulated_flash"


def attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """Bottom-right causal attention over unpadded sequences; refuses what would be taken for packed ones."""
    batch, n_heads, q_len, _ = query.shape
    if batch == 1 and position_ids is not None and attention_mask is None:
        assert bool((position_ids.diff(dim=-1) == 1).all()), "flash attention would take this row for packed sequences"
    assert attention_mask is None or attention_mask.ndim == 2
    if attention_mask is not None:
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
        assert attention_mask.shape[1] == key.shape[2]
    groups = n_heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.zeros_like(query)
    for b in range(batch):
        alive = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[b].bool()
        rows = alive[-q_len:].nonzero().squeeze(-1)
        keys = alive.nonzero().squeeze(-1)
        logits = query[b][:, rows] @ key[b][:, keys].transpose(-1, -2) * scaling
        hidden = torch.ones(len(rows), len(keys), dtype=torch.bool).triu(len(keys) - len(rows) + 1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
        out[b][:, rows] = weights @ value[b][:, keys]
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the emulation known to transformers under :data:`NAME`."""
    AttentionInterface.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
    return NAME
