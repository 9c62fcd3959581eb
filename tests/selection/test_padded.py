"""Selectors before the decoder over samples filled up to one size: as they choose for each alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from selector_contexts import grid_coordinates, make_context
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsevlm.config import SparseVLMConfig
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.decide import checked_selection
from sparsevlm.selection.padded import PaddedContext, padded_sample, select_padded, unpadded
from sparsevlm.selection.selectors import SELECTORS

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
    found = select_padded(selector, joined(given, fill), None, None, 0)
    for b, (one, (_, _, n_keep)) in enumerate(zip(given, SAMPLES, strict=True)):
        if one is None or n_keep == one.n_visual:  # nothing is asked of the selector
            assert found.is_kept[b].sum() == n_keep
            assert found.merge_target is None or (found.merge_target[b] == -1).all()
            continue
        wanted = checked_selection(selector.select(one, n_keep), one.features, n_keep, name)
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
    select_padded(selector, context, none, torch.zeros_like(context.n_keep), n_images)
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
