"""What transformers' flash path means by its masks: computed plainly on the CPU, by torch's own kernel on a GPU."""

from __future__ import annotations

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

NAME = "emulated_flash"


def attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """Bottom-right causal attention over unpadded sequences; refuses what would be taken for packed ones."""
    batch, _, q_len, _ = query.shape
    if batch == 1 and position_ids is not None and attention_mask is None:
        assert bool((position_ids.diff(dim=-1) == 1).all()), "flash attention would take this row for packed sequences"
    assert attention_mask is None or attention_mask.ndim == 2
    if attention_mask is not None:
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
        assert attention_mask.shape[1] == key.shape[2]
    one = flash_kernel if query.is_cuda and query.dtype != torch.float32 else plain
    out = torch.zeros_like(query)
    for b in range(batch):
        alive = torch.ones(key.shape[2], dtype=torch.bool, device=query.device)
        if attention_mask is not None:
            alive = attention_mask[b].bool()
        rows, keys = alive[-q_len:].nonzero().squeeze(-1), alive.nonzero().squeeze(-1)
        out[b][:, rows] = one(query[b][:, rows], key[b][:, keys], value[b][:, keys], scaling)
    return out.transpose(1, 2).contiguous(), None


def plain(query, key, value, scaling):
    """(heads, rows, head_dim) against (kv_heads, keys, head_dim), aligned at the bottom right."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    logits = query @ key.transpose(-1, -2) * scaling
    n_rows, n_keys = logits.shape[-2:]
    hidden = torch.ones(n_rows, n_keys, dtype=torch.bool, device=query.device).triu(n_keys - n_rows + 1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def flash_kernel(query, key, value, scaling):
    """The same by the FlashAttention-2 kernel that torch carries."""
    lengths = [torch.tensor([0, x.shape[1]], dtype=torch.int32, device=query.device) for x in (query, key)]
    q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, query.shape[1], key.shape[1], 0.0, True, False, scale=scaling
    )
    return out[0].transpose(0, 1)


def register() -> str:
    """Make the emulation known to transformers under :data:`NAME`."""
    AttentionInterface.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
    return NAME
