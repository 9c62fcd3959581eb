"""Masks of pruned layers, by hand, in every layout that transformers hands to a layer."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.hooks import masks
from sparsevlm.hooks.masks import pruned_mask
from sparsevlm.request.slots import PAD_SLOT

X = PAD_SLOT
LEAST = torch.finfo(torch.float32).min


def rows_of(mask):
    return [["".join(".#"[int(value)] for value in row) for row in sample[0]] for sample in mask]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([[0, 2]])])
def test_nothing_masked_and_nothing_dead_needs_no_mask(rows, flash):
    assert pruned_mask(None, rows, torch.tensor([[0, 2, 3]]), 2, 2, has_padding=False, flash=flash) is None


def test_dead_slots_are_hidden_from_flash_attention():
    slots = torch.tensor([[X, 0, 2], [0, 1, 2]])
    found = pruned_mask(None, None, slots, 2, 1, has_padding=True, flash=True)
    assert found.tolist() == [[False, True, True], [True, True, True]]  # position 0 is alive


def test_causality_where_there_was_no_mask_all_rows():
    # Five positions are past; this pass brings 5, 6 and 7. A static layer has one slot to spare.
    slots = torch.tensor([[X, 0, 3, 5, 6, 7, X], [0, 1, 3, 5, 6, 7, X]])
    found = pruned_mask(None, None, slots, 5, 3, has_padding=True, flash=False)
    assert found.shape == (2, 1, 3, 7)
    assert found.dtype == torch.bool
    assert rows_of(found) == [[".###...", ".####..", ".#####."], ["####...", "#####..", "######."]]


def test_causality_where_there_was_no_mask_rows_that_are_left():
    # This pass brings 4 to 8 behind four past ones; 0, 2, 4 of it are left, of the second sample 1 and 4.
    rows = torch.tensor([[0, 2, 4], [X, 1, 4]])
    slots = torch.tensor([[0, 1, 2, 3, 4, 6, 8], [0, 1, 2, 3, X, 5, 8]])
    found = pruned_mask(None, rows, slots, 4, 5, has_padding=True, flash=False)
    assert rows_of(found) == [["#####..", "######.", "#######"], ["#######", "####.#.", "####.##"]]


def numbered(batch, heads, n_rows, n_columns):
    """An additive mask whose every entry tells where it stands: sample, head, row, column."""
    b, h, r, c = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, n_rows, n_columns)), indexing="ij")
    return (b * 1000 + h * 100 + r * 10 + c).float()


@pytest.mark.parametrize("at_once", [0, 16])
def test_an_additive_mask_is_gathered(at_once, monkeypatch):
    monkeypatch.setattr(masks, "_GATHER_AT_ONCE", at_once)
    rows, slots = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0, 3, 5], [1, 4, 5]])
    found = pruned_mask(numbered(2, 2, 3, 6), rows, slots, 3, 3, has_padding=False, flash=False)
    assert found.tolist() == [
        [[[0, 3, 5], [20, 23, 25]], [[100, 103, 105], [120, 123, 125]]],
        [[[1011, 1014, 1015], [1021, 1024, 1025]], [[1111, 1114, 1115], [1121, 1124, 1125]]],
    ]
    every_row = pruned_mask(numbered(2, 1, 2, 6), None, slots, 4, 2, has_padding=False, flash=False)
    assert every_row[:, 0].tolist() == [[[0, 3, 5], [10, 13, 15]], [[1001, 1004, 1005], [1011, 1014, 1015]]]
    shared = pruned_mask(numbered(1, 1, 3, 6), rows, slots, 3, 3, has_padding=False, flash=False)
    assert shared[:, 0].tolist() == [[[0, 3, 5], [20, 23, 25]], [[11, 14, 15], [21, 24, 25]]]


@pytest.mark.parametrize("at_once", [0, 16])
def test_dead_slots_are_hidden_and_filler_rows_see_everything(at_once, monkeypatch):
    monkeypatch.setattr(masks, "_GATHER_AT_ONCE", at_once)
    rows, slots = torch.tensor([[0, 2], [X, 2]]), torch.tensor([[X, 3, 5], [1, X, 5]])
    found = pruned_mask(numbered(2, 1, 3, 6), rows, slots, 3, 3, has_padding=True, flash=False)
    assert found[:, 0].tolist() == [[[LEAST, 3, 5], [LEAST, 23, 25]], [[0, 0, 0], [1021, LEAST, 1025]]]
    found = pruned_mask(numbered(2, 1, 1, 6), None, slots, 5, 1, has_padding=True, flash=False)
    assert found[:, 0].tolist() == [[[LEAST, 3, 5]], [[1001, LEAST, 1005]]]


@pytest.mark.parametrize("at_once", [0, 16])
def test_a_boolean_mask_is_gathered(at_once, monkeypatch):
    monkeypatch.setattr(masks, "_GATHER_AT_ONCE", at_once)
    mask = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4).clone()
    mask[1, :, :, 0] = False  # padding
    rows, slots = torch.tensor([[0, 2, 3], [X, 1, 3]]), torch.tensor([[0, 2, 3], [X, 1, 3]])
    found = pruned_mask(mask, rows, slots, 0, 4, has_padding=True, flash=False)
    assert found.dtype == torch.bool
    assert rows_of(found) == [["#..", "##.", "###"], ["###", ".#.", ".##"]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_of_two_dimensions_is_gathered(dtype):
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).to(dtype)
    slots = torch.tensor([[X, 0, 3], [0, 1, 3]])
    found = pruned_mask(mask, None, slots, 3, 1, has_padding=True, flash=True)
    assert found.tolist() == [[0, 1, 1], [0, 1, 1]]
    assert found.dtype == dtype
    found = pruned_mask(mask[1:], torch.tensor([[0], [1]]), slots.clamp_min(0), 3, 1, has_padding=False, flash=True)
    assert found.tolist() == [[0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 3), "block mask"])
def test_other_masks_are_refused(mask):
    with pytest.raises(NotImplementedError, match=rf"type {type(mask).__name__} cannot be pruned\. Use .*sdpa"):
        pruned_mask(mask, None, torch.tensor([[0, 1]]), 1, 1, has_padding=False, flash=False)
