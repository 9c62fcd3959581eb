"""Selectors before the decoder over samples filled up to one size: as they choose for each alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_contexts import grid_coordinates, make_context
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsevlm.config import SparseVLMConfig
from sparsevlm.kernels import bipartite_merge, clusters, places
from sparsevlm.selection import similarity
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.decide import checked_selection
from sparsevlm.selection.padded import PaddedContext, padded_sample, select_padded, unpadded
from sparsevlm.selection.selectors import SELECTORS, tome

TRAITS = {name: SelectorTraits.of(make()) for name, make in SELECTORS.items()}
BEFORE = [name for name, traits in TRAITS.items() if traits.placement == BEFORE_DECODER and traits.padded]
# Visual tokens, text tokens and tokens that go on, by sample; an empty one, and one that keeps all.
GRIDS = {"one": [(5, 8)], "two": [(3, 4), (2, 3, 4)], "a row": [(1, 7)], "whole": [(3, 5)]}
SAMPLES = [("one", 3, 17), ("two", 1, 20), (None, 0, 0), ("a row", 5, 1), ("whole", 4, 15), ("one", 0, 33)]
MOST_OF = {name: sum(math.prod(grid) for grid in grids) for name, grids in GRIDS.items()}
MOST, MOST_TEXT, MOST_KEPT = 48, 8, 40


def contexts(kind="random"):
    found = []
    for seed, (name, n_text, _) in enumerate(SAMPLES):
        if name is None:
            found.append(None)
            continue
        coordinates = grid_coordinates(*GRIDS[name])
        one = make_context(coordinates.shape[1], seed, 16, n_text, kind, coordinates=coordinates, layer=-1)
        found.append(one.at(one.indices))
    return found


def joined(given, fill):
    """The padded context of samples, with ``fill`` where nothing is."""

    def room(*shape):
        return torch.full((len(given), *shape), fill)

    states, text, keys = room(MOST, 16), room(MOST_TEXT, 16), room(MOST, 16)
    attention, coordinates = room(2, MOST), torch.full((len(given), 3, MOST), 7)
    valid, is_text = (torch.zeros((len(given), n), dtype=torch.bool) for n in (MOST, MOST_TEXT))
    for b, one in enumerate(given):
        if one is None:
            continue
        n, n_text = one.n_visual, one.text_features.shape[0]
        states[b, :n], text[b, :n_text], keys[b, :n] = one.features, one.text_features, one.vision_keys
        attention[b, :, :n], coordinates[b, :, :n] = one.vision_attention, one.coordinates
        valid[b, :n], is_text[b, :n_text] = True, True
    return PaddedContext(
        config=SparseVLMConfig(min_keep=1),
        hidden_states=states,
        valid=valid,
        n_keep=torch.tensor([n_keep for *_, n_keep in SAMPLES]),
        most_kept=MOST_KEPT,
        seeds=torch.zeros(len(given), dtype=torch.int64),
        text_features=text,
        is_text=is_text,
        vision_attention=attention,
        vision_keys=keys,
        coordinates=coordinates,
    )


@pytest.mark.parametrize("fill", [0.5, torch.nan])
@pytest.mark.parametrize("kind", ["random", "pairs", "identical", "zeros"])
@pytest.mark.parametrize("name", BEFORE)
def test_samples_are_chosen_from_as_alone(name, kind, fill):
    given, selector = contexts(kind), SELECTORS[name]()
    found = select_padded(selector, joined(given, fill), None, None, 0, 2)
    for b, (one, (_, _, n_keep)) in enumerate(zip(given, SAMPLES, strict=True)):
        if one is None or n_keep == one.n_visual:  # nothing is asked of the selector
            assert found.is_kept[b].sum() == n_keep
            assert found.merge_target is None or (found.merge_target[b] == -1).all()
            continue
        alone = dataclasses.replace(one, hidden_states=one.features)
        wanted = checked_selection(selector.select(alone, n_keep), one.features, n_keep, name)
        assert found.is_kept[b].nonzero()[:, 0].tolist() == wanted.keep_idx.tolist()
        if wanted.merge_target is None:
            continue
        n = one.n_visual
        assert torch.equal(found.merge_target[b, :n], wanted.merge_target)
        assert (found.merge_target[b, n:] == -1).all()
        torch.testing.assert_close(found.weight[b, :n], wanted.weight)
        assert found.is_recycled[b].nonzero()[:, 0].tolist() == wanted.recycled_idx.tolist()


@pytest.mark.parametrize("name", BEFORE)
def test_one_sample_as_a_batch(name):
    (one, *_), n_keep, selector = contexts(), 17, SELECTORS[name]()
    one = dataclasses.replace(one, hidden_states=one.features)
    found = unpadded(selector.select_padded(padded_sample(one, n_keep)))
    wanted = checked_selection(selector.select(one, n_keep), one.features, n_keep, name)
    assert torch.equal(found.keep_idx, wanted.keep_idx)
    assert (found.merge_target is None) == (wanted.merge_target is None)


def test_a_selector_may_say_how_many_tokens_it_takes():
    assert {TRAITS[name].most_padded for name in ("divprune", "cdpruner")} == {1 << 14}
    assert TRAITS["mmtok"].most_padded == 1 << 13


class Ordered:
    """In order, and remembers what it was told of the picks."""

    def order(self, states, valid, n_keep, counts=None):
        self.counts = counts
        return torch.arange(n_keep).expand(states.shape[0], -1)


@pytest.mark.parametrize("n_images", [0, 4])
def test_a_search_is_told_which_picks_are_looked_at(n_images):
    """None of samples that keep all; all, where every image has a floor."""
    context, selector = joined(contexts(), 0.5), Ordered()
    none = torch.zeros_like(context.valid, dtype=torch.int64)
    select_padded(selector, context, none, torch.zeros_like(context.n_keep), n_images, 2)
    wanted = [n_keep if name is not None and n_keep < MOST_OF[name] else 0 for name, _, n_keep in SAMPLES]
    assert (selector.counts is None) if n_images else (selector.counts.tolist() == wanted)


def everything(fill):
    """The padded context of all samples, with what selectors of target layers read."""
    context = joined(contexts(), fill)
    batch, n = context.valid.shape
    return dataclasses.replace(
        context,
        rater_attention=torch.rand((batch, 3, n)),
        last_attention=torch.rand((batch, n)),
        prior_attention=torch.rand((batch, n)),
        previous_hidden_states=torch.rand_like(context.hidden_states),
        n_clusters=torch.ones(batch, dtype=torch.int64),
    )


@pytest.mark.parametrize("name", [name for name, traits in TRAITS.items() if traits.padded])
def test_nothing_is_waited_for(name):
    """Tensors without values: what asks for one, or for a shape that depends on some, raises."""
    given = everything(0.5)
    with FakeTensorMode() as mode:
        tensors = {
            key: mode.from_tensor(value) for key, value in vars(given).items() if isinstance(value, torch.Tensor)
        }
        found = SELECTORS[name]().select_padded(dataclasses.replace(given, **tensors))
    assert found.is_kept.shape == given.valid.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", BEFORE)
def test_the_kernels_choose_as_for_each_sample(name):
    """At the sizes of real pictures: what differs is nearly tied."""
    selector, n_keep = SELECTORS[name](), 150
    for seed, size in enumerate([(30, 30), (1, 160), (24, 25)]):
        coordinates = grid_coordinates(size)
        one = make_context(coordinates.shape[1], seed, 256, 20 + seed, coordinates=coordinates, layer=-1)
        wanted = checked_selection(selector.select(one, n_keep), one.features, n_keep, name)
        on_gpu = {key: value.cuda() for key, value in vars(one).items() if isinstance(value, torch.Tensor)}
        given = dataclasses.replace(one, **on_gpu)
        given = dataclasses.replace(given, hidden_states=given.features)
        found = unpadded(selector.select_padded(padded_sample(given, n_keep)))
        assert found.keep_idx.shape == wanted.keep_idx.shape
        assert len({*found.keep_idx.tolist()} & {*wanted.keep_idx.tolist()}) >= 0.95 * n_keep


def drawn_features(n, size, kind, generator):
    """Rows of a sample: apart, many of them equal, in few directions, or many of them 0."""
    rows = torch.randn((n, size), generator=generator)
    if kind == "equal":
        return rows[torch.randint(max(1, n // 3), (n,), generator=generator)]
    if kind == "whole":
        return torch.randint(-1, 2, (n, size), generator=generator).float()
    return rows.masked_fill(torch.rand((n, 1), generator=generator) < (0.5 if kind == "zeros" else 0.0), 0.0)


def merging_context(numbers, n_keep, size, kind, seed):
    """Features of samples, which are filled up with NaN, and more room for what is kept than is needed."""
    generator = torch.Generator().manual_seed(seed)
    most = max(numbers) + seed % 3
    states = torch.full((len(numbers), most, size), torch.nan)
    for b, n in enumerate(numbers):
        states[b, :n] = drawn_features(n, size, kind, generator)
    return PaddedContext(
        config=SparseVLMConfig(min_keep=1),
        hidden_states=states,
        valid=torch.arange(most) < torch.tensor(numbers)[:, None],
        n_keep=torch.tensor(n_keep),
        most_kept=min(most, max(n_keep) + seed % 4),
        seeds=torch.zeros(len(numbers), dtype=torch.int64),
    )


def check_merges(context, found):
    for b, (n, n_keep) in enumerate(zip(context.n_visual.tolist(), context.n_keep.tolist(), strict=True)):
        wanted = SELECTORS["tome"]().select(make_context(n, features=context.hidden_states[b, :n]), n_keep)
        assert found.is_kept[b].nonzero()[:, 0].tolist() == wanted.keep_idx.tolist()
        assert torch.equal(found.merge_target[b, :n], wanted.merge_target)
        assert torch.equal(found.weight[b, :n], wanted.weight)
        assert (found.merge_target[b, n:] == -1).all()
        assert found.is_recycled[b].nonzero()[:, 0].tolist() == wanted.recycled_idx.tolist()


@st.composite
def merging(draw, most, kinds=("apart", "equal", "whole", "zeros"), sizes=(1, 2, 16, 70)):
    """Samples of one to many rows, which keep all, one less, half, or one."""
    numbers = draw(st.lists(st.integers(1, most), min_size=1, max_size=5))
    n_keep = [draw(st.sampled_from([1, max(1, n // 2), (n + 1) // 2, max(1, n - 1), n, (n + 4) // 5])) for n in numbers]
    kind, size = draw(st.sampled_from(kinds)), draw(st.sampled_from(sizes))
    return merging_context(numbers, n_keep, size, kind, draw(st.integers(0, 1 << 30)))


@settings(max_examples=150, deadline=None)
@given(context=merging(most=90))
def test_samples_are_merged_as_alone(context):
    check_merges(context, SELECTORS["tome"]().select_padded(context))


@settings(max_examples=8, deadline=None)
@given(context=merging(most=12, kinds=("apart", "zeros"), sizes=(16, 70)))
def test_kernels_merge_samples_as_alone(context):
    """Their lengths of rows are rounded differently, which may part what is tied all but exactly."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (bipartite_merge, clusters, places):
            patch.setattr(module, "use_triton", lambda tensor: True)
        found = SELECTORS["tome"]().select_padded(context)
    check_merges(context, found)


@pytest.mark.parametrize("most", [1, 100, 1 << 11])
def test_similarities_are_held_in_blocks(most, monkeypatch):
    context = merging_context([90, 41, 7], [11, 41, 1], 16, "equal", 0)
    whole = SELECTORS["tome"]().select_padded(context)
    monkeypatch.setattr(similarity, "_MAX_BLOCK_ELEMENTS", most)
    monkeypatch.setattr(
        tome, "best_partners", lambda block, n_left: seen.append(block.numel()) or given_best(block, n_left)
    )
    seen, given_best = [], bipartite_merge.best_partners
    blocks = SELECTORS["tome"]().select_padded(context)
    assert len(seen) > 7
    assert max(seen) <= max(most, 3 * 45)
    assert all(torch.equal(*pair) for pair in zip(vars(whole).values(), vars(blocks).values(), strict=True))


def test_what_is_no_number_stays_in_its_sample():
    """The prune step says so of the states; all others merge as ever."""
    numbers, n_keep = [30, 30, 17], [8, 8, 3]
    context = merging_context(numbers, n_keep, 16, "apart", 0)
    wanted = SELECTORS["tome"]().select_padded(context)
    context.hidden_states[1, 3] = torch.nan
    context.hidden_states[1, 4, 0] = torch.inf
    found = SELECTORS["tome"]().select_padded(context)
    assert found.is_kept.sum(dim=1).tolist() == n_keep
    assert (found.is_kept.gather(1, found.merge_target.clamp_min(0)) | ~context.valid).all()
    for one, other in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert torch.equal(one[::2], other[::2])
