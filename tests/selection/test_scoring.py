"""Scores, raters and top-k against hand-worked numbers and the full softmax."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels import received_attention as received_attention_kernel
from sparsevlm.selection import raters, scoring
from sparsevlm.selection.raters import attention_raters, embedding_raters
from sparsevlm.selection.scoring import (
    received_attention,
    text_to_visual_attention,
    top_k,
    visual_head_count,
    visual_scores,
)


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


def heads_that_look_at(*masses):
    """Queries and keys of one row over one visual and one other token, a head per mass on the visual one."""
    query = torch.tensor([[[m / (1 - m)]] for m in masses]).log()
    return query, torch.tensor([[[1.0], [0.0]]])


@pytest.mark.parametrize("block", [1 << 26, 2])
def test_top_heads_by_hand(block, monkeypatch):
    monkeypatch.setattr(scoring, "_MAX_BLOCK_ELEMENTS", block)
    query, key = heads_that_look_at(0.2, 0.9, 0.5, 0.7)
    query = torch.cat([query, query], dim=1)  # two rows, which small blocks take one by one
    given = (query, key, torch.tensor([0]), torch.tensor([1, 1]), 1.0)
    assert text_to_visual_attention(*given, n_top_heads=2).flatten().tolist() == pytest.approx([0.8, 0.8])
    assert text_to_visual_attention(*given, n_top_heads=1).flatten().tolist() == pytest.approx([0.9, 0.9])
    assert torch.equal(text_to_visual_attention(*given, n_top_heads=4), text_to_visual_attention(*given))


@pytest.mark.parametrize("block", [1 << 26, 2])
def test_mass_of_a_head_is_summed_over_all_rows(block, monkeypatch):
    """Head 0 looks hard in the first row only, head 1 rather hard in both."""
    monkeypatch.setattr(scoring, "_MAX_BLOCK_ELEMENTS", block)
    first, key = heads_that_look_at(0.9, 0.6)
    second, _ = heads_that_look_at(0.1, 0.7)
    for rows in ([first, second], [second, first]):
        got = text_to_visual_attention(
            torch.cat(rows, dim=1), key, torch.tensor([0]), torch.tensor([1, 1]), 1.0, n_top_heads=1
        )
        assert sorted(got.flatten().tolist()) == pytest.approx([0.6, 0.7])


def test_equal_heads_tie_to_the_lower():
    query = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # equal mass on the visual tokens, on one of them each
    key = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    got = text_to_visual_attention(query, key, torch.tensor([0, 1]), torch.tensor([1]), 1.0, n_top_heads=1)
    assert got[0, 0] > got[0, 1]


@pytest.mark.parametrize(("n_heads", "wanted"), [(32, 14), (28, 12), (16, 7), (4, 2), (2, 1), (1, 1)])
def test_fourteen_of_thirty_two_heads(n_heads, wanted):
    assert visual_head_count(n_heads) == wanted


def test_received_attention_by_hand():
    # row 0: softmax(ln 3, 0) = (3/4, 1/4); row 1: softmax(0, 0) = (1/2, 1/2); second head: all 1/2
    query = torch.tensor([[[1.0], [0.0]], [[0.0], [0.0]]])
    key = torch.tensor([[[3.0], [1.0]], [[5.0], [7.0]]])
    got = received_attention(query, key.log(), 1.0)
    assert got.tolist() == pytest.approx([(5 / 4 + 1) / 2, (3 / 4 + 1) / 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [1 << 26, 100])
def test_received_attention_equals_the_whole_matrix(dtype, block, monkeypatch):
    monkeypatch.setattr(received_attention_kernel, "_MAX_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 17, 8, generator=generator).mul(3).to(dtype) for _ in range(2))
    logits = query.double() @ key.double().transpose(-1, -2) * 8**-0.5
    got = received_attention(query, key, 8**-0.5)
    torch.testing.assert_close(got, logits.softmax(-1).mean(dim=0).sum(dim=0).float())
    assert float(got.mean()) == pytest.approx(1)


def test_received_attention_of_a_large_image_is_bounded(monkeypatch):
    sizes, real = [], torch.matmul

    def spy(a, b):
        out = real(a, b)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(received_attention_kernel, "_MAX_BLOCK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(torch, "matmul", spy)
    received_attention(torch.randn(2, 900, 4), torch.randn(2, 900, 4), 0.5)
    assert max(sizes) <= 1 << 16
    assert sum(sizes) == 2 * 900 * 900


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


@pytest.mark.parametrize("block", [1 << 26, 2])
def test_embedding_raters_hear_every_visual_token(block, monkeypatch):
    """Two of three look at the first text token, the last one at the second; small blocks take one by one."""
    monkeypatch.setattr(raters, "_MAX_BLOCK_ELEMENTS", block)
    features = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    assert embedding_raters(features, torch.eye(2)).tolist() == [True, False]
    assert embedding_raters(features.flip(1), torch.eye(2)).tolist() == [False, True]


def test_visual_scores_are_column_sums():
    assert visual_scores(torch.tensor([[0.25, 0.5], [0.5, 0.0]])).tolist() == [0.75, 0.5]


def test_top_k_breaks_ties_by_lower_index():
    assert top_k(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    assert top_k(torch.zeros(5), 3).tolist() == [0, 1, 2]


def test_top_k_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([0.0, torch.nan]), 1)
