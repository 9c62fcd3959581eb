"""Rater selection: which text tokens vote."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.rater_choice import at_least_mean

_MAX_BLOCK_ELEMENTS = 1 << 26


def attention_raters(text_attention: Tensor) -> Tensor:
    """The default raters: text tokens whose visual attention is at least the mean over text tokens.

    Parameters
    ----------
    text_attention : Tensor of shape (n_text, n_visual)
        Head-mean attention of the text rows that may vote.

    Returns
    -------
    Tensor of shape (n_text,), bool
        ``rater_mask``; at least one row is True unless there are none.
    """
    return _at_least_mean(text_attention.sum(dim=-1))


def padded_embedding_raters(features: Tensor, valid: Tensor, text_features: Tensor, is_text: Tensor) -> Tensor:
    """:func:`embedding_raters` of several samples filled up to one size, (batch, n_text); waits for nothing.

    Parameters
    ----------
    features : Tensor of shape (batch, n_visual, hidden_size)
    valid : Tensor of shape (batch, n_visual), bool
    text_features : Tensor of shape (batch, n_text, hidden_size)
    is_text : Tensor of shape (batch, n_text), bool
    """
    products = features.float() @ text_features.float().mT
    share = products.masked_fill_(~is_text[:, None], -torch.inf).softmax(dim=-1)
    relevance = torch.where(valid[..., None], share, 0.0).sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1)
    return at_least_mean(relevance, is_text)


def embedding_raters(features: Tensor, text_features: Tensor) -> Tensor:
    """Raters of the paper (relevant text token selection), from the decoder's input embeddings, once per prompt.

    ``r = mean_over_visual softmax_over_text(H_v H_qᵀ)``; a text token votes if ``r_i ≥ mean(r)``, which is 1/n_text.

    Parameters
    ----------
    features : Tensor of shape (n_visual, hidden_size)
    text_features : Tensor of shape (n_text, hidden_size)

    Returns
    -------
    Tensor of shape (n_text,), bool
        ``rater_mask``.
    """
    n_visual, n_text = features.shape[0], text_features.shape[0]
    text = text_features.float().T
    relevance = features.new_zeros(n_text, dtype=torch.float32)
    chunk = max(1, _MAX_BLOCK_ELEMENTS // max(1, n_text))
    for start in range(0, n_visual, chunk):
        relevance += torch.softmax(features[start : start + chunk].float() @ text, dim=-1).sum(dim=0)
    return _at_least_mean(relevance / max(n_visual, 1))


def _at_least_mean(mass: Tensor) -> Tensor:
    rater_mask = mass >= mass.mean()
    if mass.shape[0] and not bool(rater_mask.any()):
        rater_mask[-1] = True  # rounding (or NaN) can push the mean above every row: the last row votes
    return rater_mask
