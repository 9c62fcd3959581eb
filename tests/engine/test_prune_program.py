"""The prune step as a program, by hand: which rows go on, what a request brings, and the record."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from made_requests import make_request, make_sample
from sparsevlm.engine.call import Prompt
from sparsevlm.engine.text.prefill import PackedRows, fill
from sparsevlm.engine.text.stages import Choice, TokenCounts, record
from sparsevlm.engine.text.workspace import PromptInputs, PromptShape, n_integers
from sparsevlm.kernels.close_up import compact
from sparsevlm.selection.budget import rank_adaptive_count
from sparsevlm.selection.padded import rank_adaptive_counts
from sparsevlm.selection.selectors.sparsevlm import SparseVLMSelector

# Rows 0 to 4 are one sample, with visual tokens in 1 to 3; 5 to 8 another one, with two in 5 and 6; 9 to 11 fill up.
VISUAL_ROWS = torch.tensor([[1, 2, 3], [5, 6, 0]])


def test_rows_that_go_on_close_up():
    """Of the first sample the tokens 0 and 2 are left, of the second token 1."""
    dropped = torch.tensor([[False, True, False], [True, False, False]])
    rows, place = compact(VISUAL_ROWS, dropped, 12)
    assert rows.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 2, 5]  # what is dropped comes last
    assert place[VISUAL_ROWS[0, [0, 2]]].tolist() == [1, 2]
    assert place[6] == 4
    assert torch.equal(place[rows], torch.arange(12))


def test_all_may_go_on():
    rows, place = compact(VISUAL_ROWS, torch.zeros(2, 3, dtype=torch.bool), 12)
    assert rows.tolist() == place.tolist() == list(range(12))


def request_of(*numbers, min_keep=3, target_layers=(1, 3)):
    """Samples of (visual, others, counts)."""
    samples = [
        make_sample(range(visual), range(visual, visual + others), counts=counts) for visual, others, counts in numbers
    ]
    return make_request(*samples, min_keep=min_keep, target_layers=target_layers)


def test_stages_are_the_targets_that_drop_something():
    counts = TokenCounts.of(request_of((40, 15, (20, 20)), (3, 6, (2, 2)), (0, 5, (0, 0))))
    assert counts.targets == (1,)  # the second has no more than min_keep
    assert counts.most == counts.least == [[40, 3, 0], [20, 3, 0]]
    counts = TokenCounts.of(request_of((40, 15, (40, 20)), (8, 6, (8, 4))))
    assert counts.targets == (3,)
    assert counts.most == counts.least == [[40, 8], [20, 4]]
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
    shape = PromptShape(rows=12, batch=4, n_visual=4, n_text=2)
    brought = PromptInputs.of(shape, 3, torch.zeros(n_integers(shape, 3), dtype=torch.int64))
    packed = PackedRows.of(request)
    fill(brought, request, Prompt(ids, positions, features, 5), packed, TokenCounts.of(request))
    assert brought.ids.tolist() == [1, 90, 90, 2, 90, 3, 90, 90, 4, 5, 0, 0]
    assert brought.positions[:, :10].tolist() == [
        [2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
        [26, 27, 28, 29, 30, 31, 32, 33, 34, 35],
    ]
    assert brought.feature_rows.tolist() == [-1, 3, 4, -1, 0, -1, 1, 2, -1, -1, -1, -1]
    assert [own[:n].tolist() for own, n in zip(brought.visual_rows, (2, 3), strict=False)] == [[1, 2], [4, 6, 7]]
    assert brought.cu_seqlens.tolist() == [0, 4, 10, 10, 10]  # samples that fill up are empty
    assert brought.n_visual.tolist() == [2, 3, 0, 0]
    assert brought.counts[:2].tolist() == [[1, 2, 0, 0], [0, 0, 0, 0]]
    assert brought.n_text.tolist() == [1, 2, 0, 0]  # behind the last visual token
    assert brought.text_rows.tolist() == [[3, 0], [8, 9], [0, 0], [0, 0]]


def choice_of(alive, n_visual, ranks=None, n_text=4):
    """What a step chose, of samples without raters and recycled tokens."""
    alive = torch.tensor(alive)
    none = torch.zeros_like(alive)
    numbers = torch.tensor(n_visual)
    return Choice(alive, none, numbers, numbers * 0 if ranks is None else torch.tensor(ranks), none[:, :0])


def test_a_choice_is_one_tensor():
    choice = choice_of([[0, 2, 3], [1, 2, 0]], [3, 2], [1, 5])
    again = Choice.of(choice.packed(), 2, 3, 0)
    assert all(torch.equal(one, other) for one, other in zip(vars(again).values(), vars(choice).values(), strict=True))


def test_what_is_left_is_recorded_as_a_prune_step_does():
    request = request_of((6, 3, (4, 2)), (5, 3, (5, 5)), (0, 4, (0, 0)), min_keep=2)
    choices = [
        choice_of([[0, 2, 4, 5, 1], [0, 1, 2, 3, 4], [0] * 5], [4, 5, 0]),
        choice_of([[2, 5, 9, 9, 9], [0, 1, 2, 3, 4], [0] * 5], [2, 5, 0]),
    ]
    record(request, TokenCounts.of(request), choices, n_layers=6)
    first, second, third = request.samples
    assert first.layer_tokens == [6, 6, 4, 4, 2, 2]
    assert second.layer_tokens == [5] * 6
    assert [stage.kept.tolist() for stage in first.stages] == [[0, 2, 4, 5], [2, 5]]
    assert [(stage.layer, stage.n_in, stage.skipped_because) for stage in first.stages] == [(1, 6, None), (3, 4, None)]
    assert {stage.skipped_because for stage in second.stages} == {
        "the budget keeps all 5 visual tokens that have come this far"
    }
    assert [stage.kept.tolist() for stage in second.stages] == [[0, 1, 2, 3, 4]] * 2
    assert [(stage.kept, stage.skipped_because) for stage in third.stages] == [
        (None, "no image or video in this sample")
    ] * 2


def test_what_the_tower_left_out_is_no_token_of_the_record():
    sample = make_sample(range(8), [8, 9], alive=[1, 2, 4, 6, 7], counts=(3, 3))
    request = make_request(sample, min_keep=1)
    record(request, TokenCounts.of(request), [choice_of([[0, 2, 4]], [3])], 4)
    assert sample.alive.tolist() == [1, 4, 7]
    assert [stage.kept.tolist() for stage in sample.stages] == [[1, 4, 7], [1, 4, 7]]
    assert sample.layer_tokens == [5, 5, 3, 3]


@settings(max_examples=200, deadline=None)
@given(
    n_visual=st.integers(0, 300), n_raters=st.integers(1, 40), rank_lambda=st.floats(0, 1), tau=st.floats(0, 1),
    theta=st.floats(0, 1), min_keep=st.integers(1, 60), recycles=st.booleans(), data=st.data(),
)  # fmt: skip
def test_what_the_rank_leaves_is_within_bounds(n_visual, n_raters, rank_lambda, tau, theta, min_keep, recycles, data):
    """Whatever the ranks are, the host's bounds hold, and the device counts as the host does."""
    sample = make_sample(range(n_visual), range(n_visual, n_visual + n_raters))
    options = {"rank_lambda": rank_lambda, "tau": tau, "theta": theta, "min_keep": min_keep, "recycle": recycles}
    request = make_request(sample, target_layers=(1, 2, 3), selector=SparseVLMSelector(), **options)
    counts = TokenCounts.of(request)
    n = n_visual
    for target, low, high in zip(counts.targets, counts.least[1:], counts.most[1:], strict=True):
        rank = data.draw(st.integers(0, min(n, n_raters)), label=f"rank at {target}")
        wanted, n_clusters = n, 0
        if n > min_keep:
            wanted, n_clusters = rank_adaptive_count(n, rank, rank_lambda, tau, theta, recycles, min_keep)
            wanted, n_clusters = (n, 0) if wanted >= n else (wanted, n_clusters)
        number, ranks = torch.tensor([n]), torch.tensor([rank])
        found = rank_adaptive_counts(number, ranks, n_visual, request.config, True)
        assert [int(one) for one in found] == [wanted, n_clusters]
        n = wanted
        assert low[0] <= n <= high[0]
