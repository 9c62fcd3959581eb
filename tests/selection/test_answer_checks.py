"""What of a selector's answer is refused, and with which words."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.selection.context import Selection
from sparsevlm.selection.decide import checked_selection

N_VISUAL, N_KEEP = 8, 3
STATES = torch.zeros(N_VISUAL, 4)
KEEP = torch.tensor([1, 4, 6])
TARGET = torch.tensor([1, 1, -1, 4, 4, 6, 6, -1])
WEIGHT = torch.full((N_VISUAL,), 0.5)


def check(result, states=STATES):
    return checked_selection(result, states, N_KEEP, "mine")


def merged(target=TARGET, weight=WEIGHT):
    return Selection(KEEP, target, weight)


def recycled(rows):
    return Selection(KEEP, recycled_idx=rows)


def test_what_is_right_passes():
    assert torch.equal(check(KEEP).keep_idx, KEEP)
    for kind in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert check(KEEP.to(kind)).keep_idx.dtype == torch.int64
    got = check(Selection(KEEP, TARGET.int(), WEIGHT.double().requires_grad_(), torch.tensor([6, 1])))
    assert torch.equal(got.merge_target, TARGET)
    assert got.weight.dtype == torch.float32
    assert not got.weight.requires_grad
    assert got.recycled_idx.tolist() == [6, 1]
    assert check(recycled(KEEP[:0])).recycled_idx.tolist() == []
    assert check(merged(weight=torch.ones(N_VISUAL, dtype=torch.long))).weight.tolist() == [1.0] * N_VISUAL


@pytest.mark.parametrize(
    "kept", [KEEP.float(), KEEP + 0.5j, KEEP > 1, KEEP.tolist(), KEEP.numpy(), None, Selection(None)]
)
def test_kept_rows_are_a_tensor_of_whole_numbers(kept):
    with pytest.raises(TypeError, match="'mine' must return a Selection or a tensor of whole indices"):
        check(kept)


@pytest.mark.parametrize(("kept", "got"), [(KEEP.tolist(), "a list"), (KEEP.numpy(), "a ndarray"), (None, "None")])
def test_other_kinds_are_named_with_the_remedy(kept, got):
    with pytest.raises(
        TypeError, match=rf"got {got}: return int64 row indices in ascending order, as a torch\.Tensor\."
    ):
        check(kept)


@pytest.mark.parametrize("wrap", [lambda mask: mask, Selection])
def test_a_mask_is_told_by_dtype_and_shape_with_the_remedy(wrap):
    with pytest.raises(TypeError, match=r"got torch\.bool of shape \(3,\): return int64 row indices .*, not a mask"):
        check(wrap(KEEP > 1))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (KEEP[None], r"shape \(1, 3\), expected \(3,\)"),
        (KEEP[:, None], r"shape \(3, 1\), expected \(3,\)"),
        (KEEP[:2], r"shape \(2,\), expected \(3,\)"),
        (KEEP - 2, "outside 0..7"),
        (KEEP + 2, "outside 0..7"),
        (KEEP.flip(0), "unsorted"),
        (torch.tensor([1, 4, 4]), "duplicate"),
    ],
)
def test_kept_rows_are_distinct_sorted_and_as_many_as_asked_for(kept, message):
    with pytest.raises(ValueError, match=f"'mine' returned .*{message}"):
        check(kept)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_states_that_no_selector_looked_at_are_finite(value):
    states = STATES.clone()
    states[3, 2] = value
    with pytest.raises(ValueError, match="hold NaN or infinity; check the model's inputs and dtype"):
        check(KEEP, states)


@pytest.mark.parametrize("target", [TARGET.float(), TARGET + 0j, TARGET > 1, TARGET.tolist()])
def test_merge_targets_are_a_tensor_of_whole_numbers(target):
    with pytest.raises(TypeError, match="'mine': merge_target must be a tensor of whole indices"):
        check(merged(target))


@pytest.mark.parametrize("target", [TARGET.where(TARGET >= 0, -2), TARGET.where(TARGET >= 0, 8), TARGET.clamp_min(0)])
def test_merge_targets_are_kept_rows_or_minus_one(target):
    with pytest.raises(ValueError, match="'mine': merge_target must be -1 or a kept row, and a kept row's own index"):
        check(merged(target))


@pytest.mark.parametrize("target", [TARGET.where(TARGET != 4, 6), TARGET.where(TARGET != 4, -1)])
def test_kept_rows_are_their_own_targets(target):
    with pytest.raises(ValueError, match="a kept row's own index"):
        check(merged(target))


@pytest.mark.parametrize("weight", [WEIGHT > 0, WEIGHT + 0j, WEIGHT.tolist()])
def test_weights_are_a_tensor_of_numbers(weight):
    with pytest.raises(TypeError, match="'mine': weight must be a tensor of numbers"):
        check(merged(weight=weight))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (merged(weight=WEIGHT / 0), "NaN or infinite weights"),
        (merged(weight=None), "go together"),
        (merged(target=None), "go together"),
        (merged(weight=WEIGHT[1:]), r"must have shape \(8,\), got \(8,\) and \(7,\)"),
        (merged(target=TARGET[None]), r"must have shape \(8,\), got \(1, 8\) and \(8,\)"),
    ],
)
def test_targets_and_weights_belong_together(selection, message):
    with pytest.raises(ValueError, match=f"'mine'.*{message}"):
        check(selection)


@pytest.mark.parametrize("beyond", [-2, 8])
def test_no_row_beyond_either_end_stands_for_the_one_there(beyond):
    kept = torch.tensor([0, 4, 7])
    with pytest.raises(ValueError, match="recycled_idx is not a part of keep_idx"):
        check(Selection(kept, recycled_idx=torch.tensor([beyond])))
    target = torch.tensor([0, beyond, -1, 4, 4, -1, 7, 7])
    with pytest.raises(ValueError, match="merge_target must be -1 or a kept row"):
        check(Selection(kept, target, WEIGHT))
    target[1] = 0
    assert check(Selection(kept, target, WEIGHT)).merge_target.tolist() == target.tolist()


@pytest.mark.parametrize("rows", [torch.tensor([1.0]), torch.tensor([1j]), torch.arange(N_VISUAL) == 1, [1, 4]])
def test_recycled_rows_are_a_tensor_of_whole_numbers(rows):
    with pytest.raises(TypeError, match="'mine': recycled_idx must be a tensor of whole indices"):
        check(recycled(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 4]], "one dimension"),
        ([1, 4, 1], "holds a row twice"),
        ([1, 2], "not a part of keep_idx"),
        ([-1], "not a part of keep_idx"),
        ([8], "not a part of keep_idx"),
    ],
)
def test_recycled_rows_are_distinct_kept_ones(rows, message):
    with pytest.raises(ValueError, match=f"'mine': recycled_idx .*{message}"):
        check(recycled(torch.tensor(rows)))
