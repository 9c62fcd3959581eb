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
