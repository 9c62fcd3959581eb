"""Scores, raters and top-k against hand-worked numbers and the full softmax."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.selection import scoring
from sparsevlm.selection.raters import attention_raters, embedding_raters
from sparsevlm.selection.scoring import text_to_visual_attention, top_k, visual_scores


def full_attention(query, key, scaling, visible):
    groups = query.shape[0] // key.shape[0]
    logits = query @ key.repeat_interleave(groups, 0).transpose(-1, -2) * scaling
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize("mask_kind", ["causal", "key mask", "bool", "additive"])
@pytest.mark.parametrize("block", [1 << 26, 64])
def test_attention_equals_full_softmax(mask_kind, block, monkeypatch):
    monkeypatch.setattr(scoring, "_MAX_BLOCK_ELEMENTS", block)  # small: every row is a chunk of its own
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 9, 8, generator=generator), torch.randn(2, 12, 8, generator=generator)
    rows, visual = torch.tensor([7, 9, 11]), torch.tensor([2, 3, 6])
    visible = torch.arange(12) <= rows[:, None]
    kwargs = {}
    if mask_kind == "key mask":
        kwargs["key_mask"] = torch.arange(12) >= 2
        visible = visible & kwargs["key_mask"]
    elif mask_kind == "bool":
        kwargs["mask"] = visible
    elif mask_kind == "additive":
        kwargs["mask"] = torch.zeros(3, 12).masked_fill(~visible, torch.finfo(torch.float32).min)
    got = text_to_visual_attention(query[:, :3], key, visual, rows, 8**-0.5, **kwargs)
    wanted = full_attention(query[:, :3], key, 8**-0.5, visible)[:, visual]
    torch.testing.assert_close(got, wanted)


def test_long_prompt_over_long_context_fits_in_bounded_memory():
    """The block of logits stays under its limit, whatever the number of rows."""
    seen = []
    real = torch.matmul

    def spy(a, b):
        out = real(a, b)
        seen.append(out.numel())
        return out

    query, key = torch.randn(2, 600, 4), torch.randn(1, 20_000, 4)
    torch.matmul, before = spy, torch.matmul
    try:
        limit = scoring._MAX_BLOCK_ELEMENTS
        scoring._MAX_BLOCK_ELEMENTS = 1 << 20
        out = text_to_visual_attention(query, key, torch.arange(50), torch.full((600,), 19_999), 0.5)
    finally:
        torch.matmul, scoring._MAX_BLOCK_ELEMENTS = before, limit
    assert out.shape == (600, 50)
    assert max(seen) <= 1 << 20


def test_attention_raters_take_rows_at_or_above_the_mean():
    attention = torch.tensor([[0.4, 0.2], [0.1, 0.0], [0.1, 0.2]])  # masses 0.6, 0.1, 0.3; mean 1/3
    assert attention_raters(attention).tolist() == [True, False, False]
    assert attention_raters(torch.full((3, 2), 0.1)).tolist() == [True, True, True]


def test_attention_raters_fall_back_to_the_last_row():
    assert attention_raters(torch.full((2, 3), torch.nan)).tolist() == [False, True]


def test_embedding_raters_by_hand():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[3.0, 0.0], [0.0, 5.0]])  # softmax over text of (3, 0) for both visual rows
    assert embedding_raters(features, text).tolist() == [True, False]


def test_visual_scores_are_column_sums():
    assert visual_scores(torch.tensor([[0.25, 0.5], [0.5, 0.0]])).tolist() == [0.75, 0.5]


def test_top_k_breaks_ties_by_lower_index():
    assert top_k(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    assert top_k(torch.zeros(5), 3).tolist() == [0, 1, 2]


def test_top_k_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([0.0, torch.nan]), 1)
