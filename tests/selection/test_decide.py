"""Which samples a selector is given together."""

from __future__ import annotations

import pytest
import torch
from selector_contexts import make_context

from sparsevlm.config import SparseVLMConfig
from sparsevlm.selection import decide as module
from sparsevlm.selection.context import SelectorTraits
from sparsevlm.selection.decide import decide


class Single:
    def select(self, context, n_keep):
        return torch.arange(n_keep) + context.sample


class Batched(Single):
    def __init__(self):
        self.calls = []

    def select_batch(self, contexts, n_keep):
        self.calls.append(([context.sample for context in contexts], n_keep))
        return [self.select(context, n_keep) for context in contexts]


def decisions(selector, sizes, n_keeps, **options):
    config = SparseVLMConfig(min_keep=2, **options)
    contexts = [make_context(n, sample=b, config=config) for b, n in enumerate(sizes)]
    return decide(contexts, selector, SelectorTraits.of(selector), n_keeps)


SIZES, COUNTS = [20, 20, 9, 20, 2, 20], [5, 7, 5, 5, 1, 20]


def test_samples_that_are_alike_come_together_and_go_back_to_their_places():
    selector = Batched()
    found = decisions(selector, SIZES, COUNTS)
    assert sorted(selector.calls) == [([0, 3], 5), ([1], 7), ([2], 5)]
    for one, alone in zip(found, decisions(Single(), SIZES, COUNTS), strict=True):
        assert one.skipped_because == alone.skipped_because
        if alone.selection is None:
            assert one.selection is None
        else:
            assert torch.equal(one.selection.keep_idx, alone.selection.keep_idx)
    assert [one.selection is None for one in found] == [False] * 4 + [True] * 2


def test_a_group_fits_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(module, "_MAX_BATCH_ELEMENTS", 2 * 20 * 8)
    selector = Batched()
    decisions(selector, [20] * 5, [5] * 5)
    assert selector.calls == [([0, 1], 5), ([2, 3], 5), ([4], 5)]
    monkeypatch.setattr(module, "_MAX_BATCH_ELEMENTS", 1)
    decisions(selector, [20] * 2, [5] * 2)
    assert selector.calls[3:] == [([0], 5), ([1], 5)]


def test_the_rank_decides_for_each_sample():
    selector = Batched()
    found = decisions(selector, [20, 20], [None, None])
    assert sum(len(samples) for samples, _ in selector.calls) == 2
    assert all(one.rank is not None and one.selection.keep_idx.shape[0] >= 10 for one in found)


def ranked(rank, n=8, selector=None, **options):
    """A decision by the rank: as many raters, each of which looks at a token of its own."""
    config = SparseVLMConfig(**{"min_keep": 1, "rank_lambda": 0.5, "rank_tolerance": 0.01, **options})
    context = make_context(n, config=config, rater_attention=torch.eye(rank, n))
    selector = selector or Single()
    (decision,) = decide([context], selector, SelectorTraits.of(selector), [None])
    return decision


class Clusters(Single):
    """Notes how many clusters it is asked for."""

    recycles = True

    def select(self, context, n_keep):
        self.n_clusters = context.n_clusters
        return torch.arange(n_keep)


def test_the_rank_by_hand():
    decision = ranked(4)
    assert (decision.rank, decision.selection.keep_idx.tolist()) == (4, [0, 1, 2, 3, 4, 5])  # 8 - 0.5 (8 - 4)
    decision = ranked(8)
    assert (decision.selection, decision.rank) == (None, 8)
    assert decision.skipped_because == "rank 8 of 8 visual tokens leaves nothing to drop"
    selector = Clusters()
    decision = ranked(2, selector=selector, rank_lambda=1.0, tau=1.0, theta=1.0)  # all that is dropped comes back
    assert (decision.selection, decision.rank) == (None, 2)
    assert decision.skipped_because == "recycling with tau=1.0 and theta=1.0 puts back all that would be dropped"


def test_clusters_are_those_of_selectors_that_recycle_if_they_may():
    options = {"rank_lambda": 1.0, "tau": 1.0, "theta": 0.5}  # 6 of 8 are dropped, 3 clusters
    selector = Clusters()
    assert len(ranked(2, selector=selector, **options).selection.keep_idx) == 2 + 3
    assert selector.n_clusters == 3
    assert len(ranked(2, selector=selector, recycle=False, **options).selection.keep_idx) == 2
    assert selector.n_clusters == 0
    asked = Clusters()
    asked.recycles = False
    assert len(ranked(2, selector=asked, **options).selection.keep_idx) == 2
    assert asked.n_clusters is None


def test_a_subclass_that_selects_anew_is_asked_for_that():
    class Last(Batched):
        def select(self, context, n_keep):
            return torch.arange(context.n_visual - n_keep, context.n_visual)

    class Off(Batched):
        select_batch = None

    for selector, wanted in ((Last(), 15), (Off(), 0)):
        first, second = decisions(selector, [20, 20], [5, 5])
        assert not selector.calls
        assert first.selection.keep_idx.tolist() == list(range(wanted, wanted + 5))
        assert second.selection.keep_idx.shape == (5,)


@pytest.mark.parametrize("answer", [None, 3])
def test_an_answer_that_is_none(answer):
    class Wrong(Batched):
        def select_batch(self, contexts, n_keep):
            return answer

    with pytest.raises(TypeError, match=r"'Wrong': select_batch must return one result per sample, got"):
        decisions(Wrong(), [20, 20], [5, 5])


def test_an_answer_is_missing():
    class Short(Batched):
        def select_batch(self, contexts, n_keep):
            return super().select_batch(contexts, n_keep)[1:]

    with pytest.raises(ValueError, match=r"'Short': select_batch returned 1 results for 2 samples"):
        decisions(Short(), [20, 20], [5, 5])
