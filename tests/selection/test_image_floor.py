"""Floors of the images of a sample: the closed form against one pick after the other, and who is asked again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_contexts import make_context

from sparsevlm.config import SparseVLMConfig
from sparsevlm.selection.budget import clamped_floors
from sparsevlm.selection.context import Selection, SelectorTraits
from sparsevlm.selection.decide import decide
from sparsevlm.selection.image_floor import choose_by_order, evenly_spaced, floors_within
from sparsevlm.selection.selectors import SELECTORS


def shares_one_by_one(left, n_keep, min_keep):
    """Floors handed out token by token, round after round, to the first image that still lacks some."""
    floors, wanted = [0] * len(left), [min(n, min_keep) for n in left]
    if sum(wanted) <= n_keep:
        return wanted
    while n_keep:
        for i, most in enumerate(wanted):
            if n_keep and floors[i] < most:
                floors[i] += 1
                n_keep -= 1
    return floors


def picks_one_by_one(picks, images, n_keep, floors):
    """The first picks, but never a seat that is reserved for another image; what is missing in even steps."""
    taken, kept = [], [0] * len(floors)
    free = n_keep - sum(floors)
    for pick in picks[:n_keep]:
        image = images[pick]
        if kept[image] < floors[image]:
            kept[image] += 1
        elif free:
            free -= 1
        else:
            continue
        taken.append(pick)
    for image, floor in enumerate(floors):
        rest = [row for row in range(len(images)) if images[row] == image and row not in taken]
        lacking = max(0, floor - sum(images[row] == image for row in taken))
        taken += [rest[((2 * i + 1) * len(rest)) // (2 * lacking)] for i in range(lacking)]
    return sorted(taken)


@st.composite
def samples(draw):
    """Tokens of each image, an order of all rows, a number to keep and a floor."""
    left = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0))
    n = sum(left)
    return left, draw(st.permutations(range(n))), draw(st.integers(1, n)), draw(st.integers(0, 8))


@given(st.lists(samples(), min_size=1, max_size=3))
@settings(deadline=None, max_examples=300)
def test_the_closed_form_is_the_walk_along_the_order(given_samples):
    n_visual, n_images = (max(len(part) for part in parts) for parts in (
        [order for _, order, _, _ in given_samples], [left for left, _, _, _ in given_samples]
    ))  # fmt: skip
    most = max(n_keep for _, _, n_keep, _ in given_samples)
    picks = torch.zeros(len(given_samples), most, dtype=torch.long)
    images = torch.zeros(len(given_samples), n_visual, dtype=torch.long)
    valid = torch.zeros(len(given_samples), n_visual, dtype=torch.bool)
    for b, (left, order, _, _) in enumerate(given_samples):
        own = torch.tensor(order)[:most]
        picks[b, : len(own)] = own
        images[b, : sum(left)] = torch.arange(len(left)).repeat_interleave(torch.tensor(left))
        valid[b, : sum(left)] = True
    n_keep, min_keep = (torch.tensor([one[place] for one in given_samples]) for place in (2, 3))
    chosen = choose_by_order(picks, images, valid, n_keep, min_keep, n_images)
    for b, (left, order, count, floor) in enumerate(given_samples):
        floors = shares_one_by_one(left, count, floor)
        own = images[b, : sum(left)].tolist()
        assert chosen[b].nonzero().squeeze(-1).tolist() == picks_one_by_one(order, own, count, floors)
        if not floor:
            assert chosen[b].nonzero().squeeze(-1).tolist() == sorted(order[:count])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 12))
def test_floors_that_do_not_fit_become_even_shares(left, n_keep, min_keep):
    (found,) = floors_within(torch.tensor([left]), torch.tensor([n_keep]), torch.tensor([min_keep])).tolist()
    assert found == shares_one_by_one(left, n_keep, min_keep)


def test_the_closed_form_waits_for_no_value():
    """Tensors without values: what reads one raises."""
    rows, numbers = torch.zeros(2, 9, dtype=torch.long, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    chosen = choose_by_order(rows[:, :5], rows, rows.bool(), numbers, numbers, 4)
    assert (chosen.shape, chosen.dtype) == ((2, 9), torch.bool)


def test_floors_by_hand():
    def floors(left, n_keep, min_keep=4):
        return floors_within(torch.tensor([left]), torch.tensor([n_keep]), torch.tensor([min_keep]))[0].tolist()

    assert floors([50, 1, 50], 9) == [4, 1, 4]
    assert floors([50, 1, 50], 8) == [4, 1, 3]
    assert floors([50, 1, 50], 7) == [3, 1, 3]
    assert floors([50, 50, 50], 2) == [1, 1, 0]
    assert floors([50, 0, 50], 3) == [2, 0, 1]


@given(st.integers(1, 40), st.data())
def test_even_steps_are_those_of_grid(n, data):
    k = data.draw(st.integers(0, n))
    member = evenly_spaced(torch.arange(n), torch.tensor(n), torch.tensor(k))
    assert member.nonzero().squeeze(-1).tolist() == [((2 * i + 1) * n) // (2 * k) for i in range(k)]


def test_what_is_said_of_floors_that_do_not_fit():
    said = clamped_floors([50, 1, 0, 50], 8, 4, 2)
    assert said == (
        "min_keep_per_image=4 takes 9 tokens of 3 images, but 8 go on after layer 2: each image keeps an even share"
    )
    assert "go on before the decoder" in clamped_floors([5, 5], 3, 2, -1)
    assert clamped_floors([50, 1, 0, 50], 9, 4, 2) is None
    assert clamped_floors([50, 0], 3, 4, 2) is None


class Scored:
    """Keeps the highest scores; notes what it is asked, and spoils what it is given."""

    def __init__(self, scores):
        self.scores, self.asked = torch.tensor(scores), []

    def select(self, context, n_keep):
        indices = context.indices.clone()
        self.asked.append((indices.tolist(), context.image_idx.tolist(), n_keep))
        context.indices.fill_(0)
        context.image_idx.fill_(0)
        return self.scores[indices].argsort(descending=True, stable=True)[:n_keep].sort().values


def decided(selector, sizes, n_keep, **fields):
    options = {"min_keep": 1, **fields.pop("options", {})}
    images = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    context = make_context(
        sum(sizes), config=SparseVLMConfig(**options), image_idx=images, n_images=len(sizes), **fields
    )
    (found,) = decide([context], selector, SelectorTraits.of(selector), [n_keep])
    return found, images


def test_a_selector_without_an_order_is_asked_again():
    scores = [9.0, 8.0, 7.0, 6.0, 5.0, 4.5, 0.0, 0.1, 0.2, 0.3, 4.4, 4.3]
    selector = Scored(scores)
    found, _ = decided(selector, [6, 4, 2], 6, options={"min_keep_per_image": 2})
    # The second and third have none: four seats are theirs, the first has the other two.
    assert found.selection.keep_idx.tolist() == [0, 1, 8, 9, 10, 11]
    everything, first = list(range(12)), list(range(6))
    assert selector.asked == [
        (everything, [0] * 6 + [1] * 4 + [2] * 2, 6),
        (first, [0] * 6, 2),
        ([6, 7, 8, 9], [1] * 4, 2),  # of the third all are kept
    ]
    selector = Scored(scores)
    found, _ = decided(selector, [6, 4, 2], 9, options={"min_keep_per_image": 1})
    assert len(selector.asked) == 1  # nobody is short
    assert found.selection.keep_idx.tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    found, _ = decided(Scored(scores), [6, 4, 2], 6, options={"min_keep_per_image": 0})
    assert found.selection.keep_idx.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_it_is_given_again_is_of_its_rows():
    context = make_context(
        9, image_idx=torch.tensor([0] * 4 + [1] * 5), n_images=2, coordinates=torch.arange(27).view(3, 9)
    )
    rows = torch.tensor([1, 4, 8])
    part = context.at(rows)
    for name, value in vars(part).items():
        whole = getattr(context, name)
        if not isinstance(whole, torch.Tensor):
            assert value is whole
        elif name == "text_features":
            assert torch.equal(value, whole)
        else:
            by_column = name in ("coordinates", "rater_attention", "vision_attention")
            assert torch.equal(value, whole[:, rows] if by_column else whole[rows]), name
        assert whole is None or not isinstance(whole, torch.Tensor) or value.data_ptr() != whole.data_ptr()


def test_an_image_that_falls_short_of_the_rest_is_set_apart_in_turn():
    selector = Scored([9.0, 8.0, 7.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    found, _ = decided(selector, [3, 3, 3], 4, options={"min_keep_per_image": 1})
    assert found.selection.keep_idx.tolist() == [0, 1, 3, 6]
    assert [(len(rows), k) for rows, _, k in selector.asked] == [(9, 4), (6, 3), (3, 2), (3, 1), (3, 1)]


def test_too_few_for_every_floor():
    found, images = decided(Scored([1.0] * 12), [4, 4, 4], 5)
    assert torch.bincount(images[found.selection.keep_idx]).tolist() == [2, 2, 1]
    assert found.clamped is None  # that of a budget is said where it is planned
    found, images = decided(Scored([1.0] * 12), [4, 4, 4], 2)
    assert torch.bincount(images[found.selection.keep_idx]).tolist() == [1, 1]


def test_the_rank_may_leave_too_few():
    options = {"rank_lambda": 1.0, "min_keep_per_image": 3, "recycle": False}
    attention = torch.ones(3, 12)
    found, _ = decided(Scored([1.0] * 12), [4, 4, 4], None, options=options, rater_attention=attention)
    assert (found.rank, len(found.selection.keep_idx)) == (1, 1)
    assert "min_keep_per_image=3 takes 9 tokens of 3 images, but 1 go on after layer 2" in found.clamped
    found, _ = decided(Scored([1.0] * 12), [4, 4, 4], None, options={**options, "rank_lambda": 0.1},
                       rater_attention=attention)  # fmt: skip
    assert found.clamped is None


class Merging:
    """Merges each row into the first kept one, which is recycled."""

    def select(self, context, n_keep):
        target = torch.zeros(context.n_visual, dtype=torch.long)
        target[:n_keep] = torch.arange(n_keep)
        weight = torch.ones(context.n_visual)
        weight[target == 0] = 1 / int((target == 0).sum())
        return Selection(torch.arange(n_keep), target, weight, torch.tensor([0]))


def test_what_is_merged_apart_stays_within_its_image():
    found, _ = decided(Merging(), [5, 3, 1], 5, options={"min_keep_per_image": 2})
    selection = found.selection
    assert selection.keep_idx.tolist() == [0, 1, 5, 6, 8]
    assert selection.merge_target.tolist() == [0, 1, 0, 0, 0, 5, 6, 5, 8]
    torch.testing.assert_close(selection.weight, torch.tensor([0.25, 1.0, 0.25, 0.25, 0.25, 0.5, 1.0, 0.5, 1.0]))
    assert selection.recycled_idx.tolist() == [0, 5]


class Descending:
    """Picks from the end on."""

    def __init__(self):
        self.n_samples = []

    def select(self, context, n_keep):
        raise AssertionError

    def order(self, states, valid, n_keep):
        self.n_samples.append(len(states))
        return torch.arange(valid.shape[1] - 1, -1, -1)[:n_keep].expand(len(states), -1)


def test_samples_with_an_order_come_together():
    selector, config = Descending(), SparseVLMConfig(min_keep=1, min_keep_per_image=2)
    contexts = [
        make_context(10, config=config, image_idx=torch.tensor([0] * n + [1] * (10 - n)), n_images=2) for n in (6, 3, 9)
    ]
    found = decide(contexts, selector, SelectorTraits.of(selector), [4, 4, 5])
    assert sorted(selector.n_samples) == [1, 2]
    kept = [one.selection.keep_idx.tolist() for one in found]
    assert kept == [[1, 4, 8, 9], [0, 2, 8, 9], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("answer", [None, torch.zeros(1, 3), torch.zeros(2, 4, dtype=torch.long)])
def test_an_order_that_is_none(answer):
    selector = Descending()
    selector.order = None
    Descending.order, kept = lambda *given: answer, Descending.order
    try:
        with pytest.raises(ValueError, match=r"'Descending': order must return indices of shape \(1, 4\), got"):
            decided(Descending(), [5, 5], 4)
    finally:
        Descending.order = kept


BLANK = [6, 30, 4]


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("n_keep", [9, 14, 25])
def test_a_blank_image_keeps_its_floor_under_every_selector(name, n_keep):
    """The first image is blank; without floors most selectors keep one of its tokens or none."""
    context = make_context(40)
    fields = {
        field: getattr(context, field).clone()
        for field in ("hidden_states", "features", "previous_hidden_states", "vision_keys")
    }
    for value in fields.values():
        value[:6] = value[6:36].mean(dim=0)
    for field in ("rater_attention", "vision_attention", "last_attention"):
        fields[field] = getattr(context, field).clone()
        fields[field][..., :6] = 0.0
    fields["hidden_states"][:6] = fields["previous_hidden_states"][:6]
    found, images = decided(SELECTORS[name](), BLANK, n_keep, **fields)
    kept = torch.bincount(images[found.selection.keep_idx], minlength=3).tolist()
    assert sum(kept) == n_keep
    assert all(one >= least for one, least in zip(kept, shares_one_by_one(BLANK, n_keep, 4), strict=True))


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_every_way_of_asking_ends_with_the_number_and_the_floors(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    n, min_keep = sum(sizes), data.draw(st.integers(1, 5))
    n_keep = data.draw(st.integers(1, n - 1))
    scores = data.draw(st.lists(st.floats(0, 1, width=16), min_size=n, max_size=n))
    options = {"min_keep": 1, "min_keep_per_image": min_keep}
    for name in ("sparsevlm", "fastv", "tome", "visionzip", "random", "grid", "span"):
        attention = torch.tensor(scores)
        found, images = decided(
            SELECTORS[name](), sizes, n_keep, options=options, rater_attention=attention.expand(2, -1),
            last_attention=attention, vision_attention=attention.expand(2, -1),
        )  # fmt: skip
        if found.selection is None:
            continue
        kept = torch.bincount(images[found.selection.keep_idx], minlength=len(sizes)).tolist()
        assert sum(kept) == n_keep
        assert all(a >= b for a, b in zip(kept, shares_one_by_one(sizes, n_keep, min_keep), strict=True)), name
