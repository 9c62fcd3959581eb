"""Attention of text rows to visual tokens, and the top-k that every score-based selector uses."""

from __future__ import annotations

import torch
from torch import Tensor

# Upper bound of the elements of one (heads, rows, keys) float32 block: 64 Mi elements = 256 MiB.
_MAX_BLOCK_ELEMENTS = 1 << 26


def text_to_visual_attention(
    query: Tensor,
    key: Tensor,
    visual_idx: Tensor,
    row_limit: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Head-mean attention of text rows to visual keys, without any L×L matrix.

    ``P[i, j] = mean_h exp(q_hi · k_hj · scaling − LSE_hi)`` over the visual keys j, the softmax running over all
    visible keys (paper, significance of visual tokens; its appendix B aims at the log-sum-exp form). Rows are
    processed in chunks, so memory is bounded by ``heads × chunk × kv_len``.

    Parameters
    ----------
    query : Tensor of shape (heads, n_rows, head_dim)
        Rotated queries of the text rows.
    key : Tensor of shape (num_kv_heads, kv_len, head_dim)
        Rotated keys.
    visual_idx : Tensor of shape (n_visual,), int64
        Columns of ``key`` that are visual tokens.
    row_limit : Tensor of shape (n_rows,), int64
        Last key index that each row may see (causality); ignored where ``mask`` is given.
    scaling : float
        Factor of the logits, ``head_dim ** -0.5``.
    mask : Tensor of shape (n_rows, kv_len), optional
        Boolean (True: visible) or additive; replaces causality.
    key_mask : Tensor of shape (kv_len,), bool, optional
        Keys that are alive, joined with causality.

    Returns
    -------
    Tensor of shape (n_rows, n_visual), float32
    """
    n_heads, n_rows, _ = query.shape
    n_kv_heads, kv_len, _ = key.shape
    groups = n_heads // n_kv_heads
    out = query.new_empty((n_rows, visual_idx.shape[0]), dtype=torch.float32)
    chunk = max(1, _MAX_BLOCK_ELEMENTS // max(1, n_heads * kv_len))
    key_t = key.float().transpose(-1, -2)
    columns = torch.arange(kv_len, device=key.device)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        q = query[:, rows].float().reshape(n_kv_heads, groups, -1, query.shape[-1])
        logits = torch.matmul(q * scaling, key_t.unsqueeze(1)).flatten(0, 1)
        if mask is not None:
            block = mask[rows]
            is_bool = block.dtype == torch.bool
            logits = logits.masked_fill_(~block, -torch.inf) if is_bool else logits.add_(block.float())
        else:
            hidden = columns > row_limit[rows, None]
            if key_mask is not None:
                hidden = hidden | ~key_mask
            logits = logits.masked_fill_(hidden, -torch.inf)
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        out[rows] = torch.exp(logits[..., visual_idx] - lse).mean(dim=0)
    return out


def top_k(scores: Tensor, k: int) -> Tensor:
    """Sorted indices of the ``k`` highest scores; ties go to the lower index.

    Parameters
    ----------
    scores : Tensor of shape (n,)
    k : int

    Returns
    -------
    Tensor of shape (k,), int64

    Raises
    ------
    ValueError
        If a score is NaN.
    """
    if bool(torch.isnan(scores).any()):
        raise ValueError("the scores of the visual tokens hold NaN; check the model's inputs and dtype.")
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:k].sort().values


def visual_scores(rater_attention: Tensor) -> Tensor:
    """Score of each visual token: the attention it gets from all raters (paper, significance of visual tokens).

    Parameters
    ----------
    rater_attention : Tensor of shape (n_raters, n_visual)

    Returns
    -------
    Tensor of shape (n_visual,)
        Column sums. The paper's mean differs by the factor ``n_raters`` and ranks alike.
    """
    return rater_attention.sum(dim=0)
