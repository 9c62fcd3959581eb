"""Requests and their samples, by hand: what is left, where it stands, and what is reported of a stage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from made_requests import make_request, make_sample
from sparsevlm.request.kv_cache import stack_rows
from sparsevlm.request.sample import StageRecord
from sparsevlm.request.slots import PAD_SLOT


def test_rows_of_unequal_numbers_are_filled_on_the_left():
    rows = [torch.tensor([4, 7]), torch.tensor([0, 1, 2, 5]), torch.tensor([], dtype=torch.long)]
    assert stack_rows(rows).tolist() == [[PAD_SLOT, PAD_SLOT, 4, 7], [0, 1, 2, 5], [PAD_SLOT] * 4]
    assert stack_rows(rows[:1]).tolist() == [[4, 7]]


def test_a_sample_follows_its_tokens_through_two_cuts():
    sample = make_sample([2, 3, 4, 7, 8], [0, 1, 5, 6, 9])
    assert sample.all_positions.tolist() == list(range(10))
    sample.keep(torch.tensor([0, 2, 3, 4]))
    assert sample.positions.tolist() == [2, 4, 7, 8]
    sample.keep(torch.tensor([1, 3]))  # of the four that were left
    assert sample.alive.tolist() == [2, 4]
    assert sample.positions.tolist() == [4, 8]
    assert sample.all_positions.tolist() == [0, 1, 4, 5, 6, 8, 9]
    sample.keep_only(torch.tensor([0, 3]))  # of all
    assert sample.positions.tolist() == [2, 7]
    assert sample.visual.tolist() == [2, 3, 4, 7, 8]


def test_visual_tokens_are_counted_at_the_input_of_every_layer():
    sample = make_sample([2, 3, 4, 7, 8], [0, 1, 5, 6, 9])
    sample.enter_layer()
    sample.keep(torch.tensor([0, 2]))
    sample.enter_layer()
    sample.enter_layer(4)
    assert sample.layer_tokens == [5, 2, 4]


def test_rows_are_found_by_position():
    request = make_request(make_sample([2, 3], [0, 1, 4]), make_sample([1, 2], [3, 4]))
    positions = torch.tensor([1, 3, 4])
    assert request.local_rows(0, positions).tolist() == [1, 3, 4]  # nothing was dropped yet
    request.place(torch.tensor([[0, 1, 3, 4], [PAD_SLOT, 1, 3, 4]]))
    assert request.local_rows(0, positions).tolist() == [1, 2, 3]
    assert request.local_rows(1, positions).tolist() == [1, 2, 3]
    assert request.local_rows(0, torch.tensor([0])).tolist() == [0]


@pytest.mark.parametrize(
    ("alive", "counts", "wanted"),
    [
        ([5, 5], [[4, 2], [5, 5]], (False, False)),  # the first sample drops at both
        ([5, 5], [[5, 4], [6, 5]], (True, False)),
        ([2, 5], [[1, 1], [5, 5]], (True, True)),  # the first has no more than min_keep
        ([3, 5], [[1, 1], [5, 5]], (False, False)),
        ([0, 5], [[0, 0], [5, 4]], (True, False)),
        ([5, 5], [None, [5, 5]], (False, False)),  # the rank decides
        ([2, 2], [None, None], (True, True)),
    ],
)
def test_where_budgets_are_known_to_keep_all(alive, counts, wanted):
    samples = [
        make_sample(range(10), [10], alive=list(range(n)), counts=of_sample)
        for n, of_sample in zip(alive, counts, strict=True)
    ]
    request = make_request(*samples)
    assert (request.keeps_all(1), request.keeps_all(3)) == wanted
    assert request.drops_nothing == all(wanted)


class Rotary:
    """A family whose coordinates are its rotary positions."""

    def coordinates(self, grids, position_ids, visual):
        return torch.tensor([[len(tuple(grids))]] * 3) if position_ids is None else position_ids[:, visual]


def test_coordinates_are_the_last_axes_at_what_is_left():
    request = make_request(make_sample([0, 2, 3], [1, 4]), make_sample([1, 2], [3, 4]))
    first, second = request.samples
    assert first.coordinates_on(torch.device("cpu")).tolist() == [[0, 2, 3]] * 3  # none were seen
    adapter = SimpleNamespace(family=Rotary(), decoder=SimpleNamespace(n_position_axes=3))
    positions = torch.arange(4 * 2 * 5).view(4, 2, 5)
    request.see_positions(adapter, positions)
    first.keep(torch.tensor([1, 2]))
    assert first.coordinates_on(torch.device("cpu")).tolist() == [[12, 13], [22, 23], [32, 33]]
    assert second.coordinates_on(torch.device("cpu")).tolist() == [[16, 17], [26, 27], [36, 37]]
    request.see_positions(adapter, positions[:3, :1])  # shared by the batch
    assert first.coordinates_on(torch.device("cpu")).tolist() == [[2, 3], [12, 13], [22, 23]]
    assert second.coordinates.tolist() == [[1, 2], [11, 12], [21, 22]]
    second.layouts = ((1, 1, 2),)
    request.see_positions(adapter, positions[0])  # of one axis: the grids have to do
    assert (first.coordinates.tolist(), second.coordinates.tolist()) == ([[0]] * 3, [[1]] * 3)


def test_a_request_knows_its_cache_while_it_lives():
    request, cache = make_request(make_sample([0], [1])), DynamicCache()
    assert not request.fills(cache)
    request.finish(cache, (3, 4), "note")
    assert request.fills(cache)
    assert not request.fills(DynamicCache())
    assert not request.fills(None)
    assert (request.kv_bytes, request.kv_note, request.finished) == ((3, 4), "note", True)
    del cache
    assert request.cache() is None
    assert not request.fills(None)


def test_recycled_tokens_are_reported_apart():
    record = StageRecord(3, 9, 4, None, torch.tensor([20, 22]), torch.tensor([1, 2, 5, 7]), torch.tensor([7, 2]))
    report = record.report()
    assert (report.layer, report.n_in, report.rank, report.raters) == (3, 9, 4, (20, 22))
    assert (report.kept, report.n_kept) == ((1, 5), 2)
    assert (report.recycled, report.n_recycled) == ((2, 7), 2)
    skipped = StageRecord(3, 9, None, "for a reason", kept=torch.tensor([0, 4])).report()
    assert (skipped.kept, skipped.n_kept, skipped.skipped_because) == ((0, 4), 2, "for a reason")
    everything = StageRecord(3, 2, None, None, kept=torch.tensor([0, 1])).report()
    assert (everything.n_kept, everything.skipped_because) == (2, "budget and floors keep every visual token here")
    nothing = StageRecord(3, 9, None, "for a reason").report()
    assert (nothing.kept, nothing.n_kept, nothing.raters, nothing.recycled) == ((), 9, (), ())
