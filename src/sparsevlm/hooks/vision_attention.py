"""The vision tower's attention in one call per block, instead of one per window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from ..kernels.attention import varlen_attention
from ..models import ModelAdapter
from .attention_probe import RenamedAttention

# A vision block hands over its windows packed, in one call, where the name of its attention tells of flash attention.
_NAME = "sparsevlm_flash_varlen"


class VarlenVision:
    """Sets the tower's attention for one run.

    Parameters
    ----------
    adapter : ModelAdapter
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._modules = [module for module in adapter.vision.module.modules() if hasattr(module, "config")]
        self._before = [module.config for module in self._modules]
        AttentionInterface.register(_NAME, _attention)
        renamed = RenamedAttention(adapter.vision.module.config, _NAME)
        for module in self._modules:
            module.config = renamed

    @staticmethod
    def suits(adapter: ModelAdapter) -> bool:
        """Tells whether the tower's own attention would go window by window, and ours can take its place."""
        if adapter.vision.program is None:
            return False
        config: Any = adapter.vision.module.config
        weight = next(adapter.vision.module.parameters())
        takes = weight.device.type == "cpu" or weight.dtype in (torch.float16, torch.bfloat16)
        return takes and config._attn_implementation in ("sdpa", "eager") and not adapter.vision.module.training

    def disarm(self) -> None:
        """Give the tower its own attention back."""
        for module, config in zip(self._modules, self._before, strict=True):
            module.config = config


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int | Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function: (1, heads, n, head_dim) in, (1, n, heads, head_dim) out."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    cu_seqlens = cu_seq_lens_q.to(torch.int32)
    return varlen_attention(query, key, value, cu_seqlens, int(max_length_q), scaling, causal=False)[None], None
