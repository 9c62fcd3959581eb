"""Attention to visual tokens, from text rows and within the vision tower, and the top-k of score-based selectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.received_attention import received_attention as received_attention_packed
from .similarity import NOT_FINITE

# Upper bound of the elements of one (heads, rows, keys) float32 block: 64 Mi elements = 256 MiB.
_MAX_BLOCK_ELEMENTS = 1 << 26
# Heads that the authors' code (v2.0) takes for visual ones: 14 of the 32 of LLaVA's decoder.
_VISUAL_HEADS, _OF_HEADS = 14, 32


def information_gain(posterior: Tensor, prior: Tensor, valid: Tensor) -> Tensor:
    """``p log(p / q)`` of every token: what it adds to the divergence of p from q.

    Parameters
    ----------
    posterior, prior : Tensor of shape (batch, n_visual)
        Attention, not negative; p and q are these, scaled to a sum of 1.
    valid : Tensor of shape (batch, n_visual), bool
        False for rows that do not count.

    Returns
    -------
    Tensor of shape (batch, n_visual), float32
        Negative where attention fell.
    """
    p, q = (torch.where(valid, attention.float(), 0.0) for attention in (posterior, prior))
    p, q = (attention / attention.sum(dim=-1, keepdim=True).clamp_min(1e-10) for attention in (p, q))
    return p * ((p + 1e-10) / (q + 1e-10)).log()


def text_to_visual_attention(
    query: Tensor,
    key: Tensor,
    visual_idx: Tensor,
    row_limit: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    n_top_heads: int | None = None,
    softcap: float | None = None,
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
    n_top_heads : int, optional
        Average only over this many heads: those with the largest ``Σ_ij P_hij``, ties to the lower one. Costs a second
        pass over the chunks. ``None``: all heads.
    softcap : float, optional
        Logits are capped to ``softcap · tanh(logit / softcap)`` before the mask, as in Gemma 2.

    Returns
    -------
    Tensor of shape (n_rows, n_visual), float32
    """
    n_heads, n_rows, _ = query.shape
    given = (query, key, visual_idx, row_limit, scaling, mask, key_mask, softcap)
    heads: slice | Tensor = slice(None)
    if n_top_heads is not None:
        mass = query.new_zeros(n_heads, dtype=torch.float32)
        for _, block in _visual_blocks(*given):
            mass += block.sum(dim=(1, 2))
        heads = top_k(mass, n_top_heads)
    out = query.new_empty((n_rows, visual_idx.shape[0]), dtype=torch.float32)
    for rows, block in _visual_blocks(*given):
        out[rows] = block[heads].mean(dim=0)
    return out


def visual_head_count(n_heads: int) -> int:
    """Heads of a layer that ``heads="visual"`` averages over: 14 of 32, at least one."""
    return max(1, round(n_heads * _VISUAL_HEADS / _OF_HEADS))


def _visual_blocks(
    query: Tensor,
    key: Tensor,
    visual_idx: Tensor,
    row_limit: Tensor,
    scaling: float,
    mask: Tensor | None,
    key_mask: Tensor | None,
    softcap: float | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Attention per head, (heads, n_chunk_rows, n_visual), of one chunk of rows after the other."""
    n_heads, n_rows, _ = query.shape
    n_kv_heads, kv_len, _ = key.shape
    groups = n_heads // n_kv_heads
    chunk = max(1, _MAX_BLOCK_ELEMENTS // max(1, n_heads * kv_len))
    key_t = key.float().transpose(-1, -2)
    columns = torch.arange(kv_len, device=key.device)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        q = query[:, rows].float().reshape(n_kv_heads, groups, -1, query.shape[-1])
        logits = torch.matmul(q * scaling, key_t.unsqueeze(1)).flatten(0, 1)
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
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
        block = torch.exp(logits[..., visual_idx] - lse)
        del logits  # the next chunk's are as large
        yield rows, block


def received_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that each token of an unmasked sequence receives, without the matrix of all pairs.

    ``a_j = mean_h Σ_i softmax_j(q_hi · k_hj · scaling)``; 1 on average. Sums and not means over the queries, which
    would share out the same amount in every sequence: a token of a long one would hardly count.

    Parameters
    ----------
    query, key : Tensor of shape (heads, n_tokens, head_dim)
    scaling : float

    Returns
    -------
    Tensor of shape (n_tokens,), float32
    """
    cu_seqlens = torch.arange(2, dtype=torch.int32, device=query.device) * query.shape[1]
    return received_attention_packed(query.transpose(0, 1), key.transpose(0, 1), cu_seqlens, scaling)


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
        raise ValueError(NOT_FINITE)
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:k].sort().values


def visual_scores(rater_attention: Tensor) -> Tensor:
    """Score of each visual token: the attention it gets from all raters (paper, significance of visual tokens).

    Parameters
    ----------
    rater_attention : Tensor of shape (..., n_raters, n_visual)

    Returns
    -------
    Tensor of shape (..., n_visual)
        Column sums. The paper's mean differs by the factor ``n_raters`` and ranks alike.
    """
    return rater_attention.sum(dim=-2)
