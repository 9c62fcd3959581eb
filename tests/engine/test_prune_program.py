"""The prune step as a program, by hand: which rows go on, what a request brings, and the record."""

from __future__ import annotations

import torch

from made_requests import make_request, make_sample
from sparsevlm.engine.call import Prompt
from sparsevlm.engine.text.prefill import PackedRows, fill
from sparsevlm.engine.text.prune_program import TokenCounts, ascending, compact, record
from sparsevlm.engine.text.workspace import PromptInputs, PromptShape, n_integers


def test_picks_that_count_are_put_in_order_and_the_others_behind():
    picks = torch.tensor([[5, 1, 3, 0], [2, 0, 1, 3], [4, 3, 2, 1]])
    found = ascending(picks, torch.tensor([2, 3, 0]), 6)
    assert found.tolist() == [[1, 5, 0, 3], [0, 1, 2, 3], [1, 2, 3, 4]]
    assert ascending(picks, torch.tensor([4, 4, 4]), 6).tolist() == [[0, 1, 3, 5], [0, 1, 2, 3], [1, 2, 3, 4]]


# Rows 0 to 4 are one sample, with visual tokens in 1 to 3; 5 to 8 another one, with two in 5 and 6; 9 to 11 fill up.
VISUAL_ROWS = torch.tensor([[1, 2, 3], [5, 6, 0]])
VALID = torch.tensor([[True, True, True], [True, True, False]])


def test_rows_that_go_on_close_up():
    """Of the first sample the tokens 0 and 2 are left, of the second token 1."""
    chosen, left = torch.tensor([[0, 2], [1, 0]]), torch.tensor([2, 1])
    rows, visual_rows = compact(VISUAL_ROWS, VALID, chosen, left, 12)
    assert rows.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 2, 5]  # what is dropped comes last
    assert visual_rows[0].tolist() == [1, 2]
    assert visual_rows[1, 0] == 4


def test_a_sample_may_keep_all_or_have_none():
    chosen, left = torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.tensor([3, 0])
    rows, visual_rows = compact(VISUAL_ROWS, VALID & torch.tensor([[True], [False]]), chosen, left, 12)
    assert rows.tolist() == list(range(12))  # the second has none: its rows 5 and 6 are text
    assert visual_rows[0].tolist() == [1, 2, 3]


def test_a_second_cut_goes_on_from_the_first():
    chosen, left = torch.tensor([[0, 2], [1, 0]]), torch.tensor([2, 1])
    rows, visual_rows = compact(VISUAL_ROWS, VALID, chosen, left, 12)
    again, visual_rows = compact(
        visual_rows, torch.arange(2) < left[:, None], torch.tensor([[1], [0]]), torch.tensor([1, 1]), 12
    )
    assert rows[again][:8].tolist() == [0, 3, 4, 6, 7, 8, 9, 10]
    assert visual_rows.tolist() == [[1], [3]]


def request_of(*numbers, min_keep=3, target_layers=(1, 3)):
    """Samples of (visual, others, counts)."""
    samples = [
        make_sample(range(visual), range(visual, visual + others), counts=counts) for visual, others, counts in numbers
    ]
    return make_request(*samples, min_keep=min_keep, target_layers=target_layers)


def test_stages_are_the_targets_that_drop_something():
    counts = TokenCounts.of(request_of((40, 15, (20, 20)), (3, 6, (2, 2)), (0, 5, (0, 0))))
    assert counts.targets == (1,)  # the second has no more than min_keep
    assert counts.visual == [[40, 3, 0], [20, 3, 0]]
    counts = TokenCounts.of(request_of((40, 15, (40, 20)), (8, 6, (8, 4))))
    assert counts.targets == (3,)
    assert counts.visual == [[40, 8], [20, 4]]
    assert TokenCounts.of(request_of((40, 15, (40, 40)))).targets == ()


def test_what_a_padded_batch_brings():
    # The first is padded by two; visual tokens are 90.
    ids = torch.tensor([[0, 0, 1, 90, 90, 2], [90, 3, 90, 90, 4, 5]])
    visual = ids == 90
    features = torch.full_like(ids, -1)
    features[visual] = torch.tensor([3, 4, 0, 1, 2])  # not in the order of the rows
    positions = torch.arange(36).view(3, 2, 6)
    request = make_request(
        make_sample([3, 4], [2, 5], counts=(1, 1)), make_sample([0, 2, 3], [1, 4, 5], counts=(2, 2)), min_keep=1
    )
    shape = PromptShape(rows=12, batch=4, n_visual=4)
    given = PromptInputs.of(shape, 3, torch.zeros(n_integers(shape, 3), dtype=torch.int64))
    packed = PackedRows.of(request)
    fill(given, request, Prompt(ids, positions, features, 5), packed, TokenCounts.of(request))
    assert given.ids.tolist() == [1, 90, 90, 2, 90, 3, 90, 90, 4, 5, 0, 0]
    assert given.positions[:, :10].tolist() == [
        [2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
        [26, 27, 28, 29, 30, 31, 32, 33, 34, 35],
    ]
    assert given.feature_rows.tolist() == [-1, 3, 4, -1, 0, -1, 1, 2, -1, -1, -1, -1]
    assert [own[:n].tolist() for own, n in zip(given.visual_rows, (2, 3), strict=False)] == [[1, 2], [4, 6, 7]]
    assert given.cu_seqlens.tolist() == [0, 4, 10, 10, 10]  # samples that fill up are empty
    assert given.n_visual[:3].tolist() == [[2, 3, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0]]


def test_what_is_left_is_recorded_as_a_prune_step_does():
    request = request_of((6, 3, (4, 2)), (5, 3, (5, 5)), (0, 4, (0, 0)))
    counts = TokenCounts((1, 3), [[6, 5, 0], [4, 5, 0], [2, 5, 0]])
    kept = [
        torch.tensor([[0, 2, 4, 5, 1], [0, 1, 2, 3, 4], [0] * 5]),
        torch.tensor([[2, 5, 9, 9, 9], [0, 1, 2, 3, 4], [0] * 5]),
    ]
    request.config = request.config.replace(min_keep=2)
    record(request, counts, kept, n_layers=6)
    first, second, third = request.samples
    assert first.layer_tokens == [6, 6, 4, 4, 2, 2]
    assert second.layer_tokens == [5] * 6
    assert [stage.kept.tolist() for stage in first.stages] == [[0, 2, 4, 5], [2, 5]]
    assert [(stage.layer, stage.n_in, stage.skipped_because) for stage in first.stages] == [(1, 6, None), (3, 4, None)]
    assert {stage.skipped_because for stage in second.stages} == {"the budget keeps every visual token here"}
    assert [stage.kept.tolist() for stage in second.stages] == [[0, 1, 2, 3, 4]] * 2
    assert [(stage.kept, stage.skipped_because) for stage in third.stages] == [
        (None, "no image or video in this sample")
    ] * 2


def test_what_the_tower_left_out_is_no_token_of_the_record():
    sample = make_sample(range(8), [8, 9], alive=[1, 2, 4, 6, 7], counts=(3, 3))
    request = make_request(sample, min_keep=1)
    record(request, TokenCounts.of(request), [torch.tensor([[0, 2, 4]])], 4)
    assert sample.alive.tolist() == [1, 4, 7]
    assert [stage.kept.tolist() for stage in sample.stages] == [[1, 4, 7], [1, 4, 7]]
    assert sample.layer_tokens == [5, 5, 3, 3]
