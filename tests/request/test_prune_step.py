"""The prune step, by hand: what a selector is given after an earlier cut, what is recorded, what goes on."""

from __future__ import annotations

import pytest
import torch

from made_requests import make_request, make_sample
from sparsevlm.request.step import Readout, VisionRows, choose_embedding_raters, prune_step
from sparsevlm.selection.context import Selection

NEEDS = (
    "features", "text_features", "rater_attention", "last_attention", "previous_hidden_states", "vision_attention",
    "vision_keys",
)  # fmt: skip


class Every:
    """Keeps every other row, from the sample's number on; notes and then spoils what it is given."""

    needs = frozenset(NEEDS)

    def __init__(self):
        self.seen = []

    def select(self, context, n_keep):
        given = {name: getattr(context, name) for name in (*NEEDS, "hidden_states", "coordinates", "indices")}
        self.seen.append((context.layer, context.sample, {name: value.tolist() for name, value in given.items()}))
        context.indices.fill_(0)
        return torch.arange(context.sample, context.n_visual, 2)[:n_keep]


def states_of(b):
    """Rows of a sample: their numbers in hundreds of the sample."""
    return 100.0 * b + torch.arange(4.0)[:, None].expand(-1, 2)


def cut_before():
    """Two samples of which an earlier target left four tokens each, and one without any."""
    first = make_sample([1, 2, 3, 4, 5, 6], [0, 7, 8, 9], alive=[0, 2, 3, 5], counts=(4, 2))
    second = make_sample([0, 1, 2, 3, 4], [5, 6, 7], alive=[0, 1, 3, 4], counts=(4, 2))
    third = make_sample([], [8, 9], counts=(0, 0))
    request = make_request(first, second, third, selector=Every(), raters="all")
    request.see_embeddings(torch.arange(30.0).view(3, 10, 1))
    return request


def readout():
    """Attention of each sample's rater_candidates; what the tower told is of all tokens."""
    return Readout(
        text=[torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.1], [0.5, 0.6, 0.7, 0.8]])] * 2
        + [torch.zeros(2, 0)],
        last=[torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.zeros(0)],
        previous=[-states_of(0), -states_of(1), torch.zeros(0, 2)],
        vision=[
            VisionRows(torch.arange(12.0).view(2, 6), torch.arange(6.0)[:, None]),
            VisionRows(torch.arange(10.0).view(2, 5), torch.arange(5.0)[:, None]),
            VisionRows(torch.zeros(2, 0), torch.zeros(0, 1)),
        ],
    )


def test_a_selector_is_given_what_belongs_to_the_tokens_that_are_left():
    request = cut_before()
    request.samples[0].coordinates = torch.arange(18).view(3, 6)
    prune_step(request, 3, states_of, readout())
    (layer, sample, first), (_, other, second) = request.selector.seen
    assert (layer, sample, other) == (3, 0, 1)
    assert first["indices"] == [0, 2, 3, 5]
    assert first["features"] == [[1.0], [3.0], [4.0], [6.0]]
    assert first["text_features"] == [[0.0], [7.0], [8.0], [9.0]]
    assert first["coordinates"] == [[0, 2, 3, 5], [6, 8, 9, 11], [12, 14, 15, 17]]
    assert first["vision_attention"] == [[0.0, 2.0, 3.0, 5.0], [6.0, 8.0, 9.0, 11.0]]
    assert first["vision_keys"] == [[0.0], [2.0], [3.0], [5.0]]
    assert first["rater_attention"] == readout().text[0].tolist()
    assert (first["last_attention"], second["last_attention"]) == ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
    assert (first["hidden_states"], second["hidden_states"]) == (states_of(0).tolist(), states_of(1).tolist())
    assert second["previous_hidden_states"] == (-states_of(1)).tolist()
    assert second["features"] == [[10.0], [11.0], [13.0], [14.0]]
    assert second["indices"] == [0, 1, 3, 4]


def test_what_goes_on_is_recorded_by_its_place_among_all_tokens():
    request = cut_before()
    survivors = prune_step(request, 3, states_of, readout())
    first, second, third = request.samples
    assert (first.alive.tolist(), second.alive.tolist()) == ([0, 3], [1, 4])
    assert [one.before.tolist() for one in survivors] == [[1, 3, 4, 6], [0, 1, 3, 4], []]
    assert [one.after.tolist() for one in survivors] == [[1, 4], [1, 4], []]
    assert not any(one.merges for one in survivors)
    (stage,) = first.stages
    assert (stage.layer, stage.n_in, stage.rank, stage.skipped_because) == (3, 4, None, None)
    assert (stage.kept.tolist(), stage.recycled) == ([0, 3], None)
    assert stage.raters.tolist() == [7, 8, 9]  # positions of the text that votes
    assert [stage.kept.tolist() for stage in second.stages] == [[1, 4]]
    assert [(stage.n_in, stage.skipped_because) for stage in third.stages] == [(0, "no image or video in this sample")]


@pytest.mark.parametrize(("raters", "wanted"), [("all", [7, 8, 9]), ("attention", [7, 9]), ("embedding", [8])])
def test_raters_are_those_of_the_option(raters, wanted):
    request = cut_before()
    request.config = request.config.replace(raters=raters)
    request.samples[0].embedding_raters = torch.tensor([False, True, False])
    request.samples[1].embedding_raters = torch.tensor([True, True, False])
    attention = readout()
    attention.text[0] = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.1], [0.5, 0.6, 0.7, 0.8]])
    prune_step(request, 3, states_of, attention)
    assert request.samples[0].stages[0].raters.tolist() == wanted
    rows = [position - 7 for position in wanted]
    assert request.selector.seen[0][2]["rater_attention"] == attention.text[0][rows].tolist()


def test_raters_by_embeddings_are_chosen_among_the_text_that_votes():
    """The text before the image is the most alike to it, and has no vote."""
    sample = make_sample([1, 2], [0, 3, 4], counts=(1, 1))
    request = make_request(sample, selector=Every(), raters="embedding", min_keep=1)
    embeddings = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    choose_embedding_raters(request, lambda b, positions: embeddings[positions])
    assert sample.embedding_raters.tolist() == [False, True]


def test_a_merge_is_taken_from_the_rows_that_reached_the_layer():
    class Merges:
        recycles = True

        def select(self, context, n_keep):
            target, weight = torch.tensor([0, 0, -1, 3]), torch.tensor([0.25, 0.75, 0.0, 1.0])
            return Selection(torch.tensor([0, 3]), target, weight, torch.tensor([0]))

    request = make_request(make_sample([1, 2, 3, 4, 5], [0, 6], alive=[0, 2, 3, 4], counts=(4, 2)), selector=Merges())
    (survivors,) = prune_step(request, 3, states_of, Readout())
    assert survivors.merges
    assert survivors.merged(states_of(0)).tolist() == [[0.75, 0.75], [3.0, 3.0]]
    (stage,) = request.samples[0].stages
    assert (stage.kept.tolist(), stage.recycled.tolist()) == ([0, 4], [0])
    assert stage.raters is None


def test_nothing_goes_where_all_is_kept():
    def states(b):
        return torch.zeros(request.samples[b].alive.shape[0], 2)

    request = make_request(make_sample([0, 1, 2, 3], [4], counts=(4, 4)), make_sample([0, 1], [4], counts=(1, 1)))
    assert prune_step(request, 1, states, Readout()) is None
    reasons = [sample.stages[0].skipped_because for sample in request.samples]
    assert reasons == [
        "the budget keeps all 4 visual tokens that have come this far",
        "2 visual tokens are not more than min_keep=2",
    ]
    assert [sample.stages[0].kept.tolist() for sample in request.samples] == [[0, 1, 2, 3], [0, 1]]
    request = make_request(request.samples[0], make_sample([0, 1, 2, 3], [4], counts=(2, 2)))
    survivors = prune_step(request, 1, states, Readout())
    assert [survivor.after.tolist() for survivor in survivors] == [[0, 1, 2, 3], [0, 1]]
    assert [survivor.selection is None for survivor in survivors] == [True, False]
