"""Each selector on cases worked by hand; the greedy kernels behind some have references in test_greedy.py."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from selector_contexts import grid_coordinates, make_context, run

from sparsevlm.config import SparseVLMConfig
from sparsevlm.selection.context import BEFORE_DECODER, NEEDS, SelectorTraits
from sparsevlm.selection.selectors import SELECTORS
from sparsevlm.selection.selectors.span_prior import SpanPriorSelector

DOCS = Path(__file__).parents[2] / "docs/selectors.md"


def directions(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_last_attention_ranks(name):
    context = make_context(5, last_attention=torch.tensor([0.1, 0.3, 0.1, 0.05, 0.3]))
    assert run(name, context, 3).keep_idx.tolist() == [0, 1, 4]  # 0 and 2 tie


def test_priortr_by_hand():
    """p = .5 .3 .1 .1 and q = .7 .1 .1 .1: p log(p/q) is -.168, .330, 0 and 0; scale does not count."""
    given = {
        "last_attention": torch.tensor([5.0, 3.0, 1.0, 1.0]),
        "prior_attention": torch.tensor([0.7, 0.1, 0.1, 0.1]),
    }
    assert [run("priortr", make_context(4, **given), k).keep_idx.tolist() for k in (1, 2, 3)] == [
        [1],
        [1, 2],
        [1, 2, 3],
    ]
    assert run("fastv", make_context(4, **given), 1).keep_idx.tolist() == [0]


def test_span_prior_by_hand():
    """Of CROSS 0 and 2 lie far from the mean, 16, and 1 and 3 near it, 1. Asked for are 2 and 3, or 3 alone: others
    count a relevance of 0.001 ** 0.25, 0.178, squared."""

    def picks(*posterior, k=1, **fields):
        given = {"last_attention": torch.tensor(posterior), "prior_attention": torch.ones(4)}
        return SpanPriorSelector(**fields).select(make_context(4, hidden_states=CROSS, **given), k).keep_idx.tolist()

    assert [picks(1.0, 1.0, 2.0, 2.0, k=k) for k in (1, 2, 3)] == [[2], [2, 3], [0, 2, 3]]
    assert picks(1.0, 1.0, 2.0, 4.0) == [3]
    assert picks(1.0, 1.0, 2.0, 4.0, alpha=0.15) == [0]
    assert picks(1.0, 1.0, 2.0, 4.0, alpha=0.15, least=1e-6) == [3]
    assert picks(1.0, 1.0, 2.0, 4.0, alpha=0.0) == picks(1.0, 1.0, 1.0, 1.0) == [0]  # as span


def test_v2drop_keeps_the_largest_change():
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    after = before + torch.tensor([[3.0, 4.0], [0.0, -4.9], [0.0, 0.0]])  # changes 5, 4.9, 0; norms 5.7, 2.9, 7.1
    context = make_context(3, hidden_states=after, previous_hidden_states=before)
    assert run("v2drop", context, 1).keep_idx.tolist() == [0]
    assert run("v2drop", context, 2).keep_idx.tolist() == [0, 1]


def test_divprune_by_hand():
    """Nearest neighbours at 0.015, 0.015, 0.826 and 1.342: token 3 is first. Then 1 (1.985 from it), then 2."""
    context = make_context(4, features=directions(0.0, 10.0, 90.0, 200.0))
    assert [run("divprune", context, k).keep_idx.tolist() for k in (1, 2, 3)] == [[3], [1, 3], [1, 2, 3]]


CROSS = torch.tensor([[4.0, 0.0], [0.0, 1.0], [-4.0, 0.0], [0.0, -1.0]]) + torch.tensor([7.0, -5.0])


def test_span_by_hand():
    """From their mean 0 and 2 lie farthest, 0 is first; then 1 and 3 tie, as 0 explains 2. Both span the plane: anew,
    with 2 (16) before 3 (1)."""
    context = make_context(4, hidden_states=CROSS)
    assert [run("span", context, k).keep_idx.tolist() for k in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


def test_span_is_qr_with_column_pivoting():
    states = make_context(20, seed=4, dim=32).hidden_states
    pivots = linalg.qr((states - states.mean(dim=0)).double().numpy().T, mode="r", pivoting=True)[1]
    for n_keep in range(1, 20):
        found = run("span", make_context(20, hidden_states=states), n_keep).keep_idx
        assert found.tolist() == sorted(pivots[:n_keep].tolist())


def test_span_takes_equal_states_in_their_order():
    context = make_context(12, dim=64, hidden_states=torch.full((12, 64), 0.1) * torch.linspace(0.1, 9.0, 64))
    assert run("span", context, 5).keep_idx.tolist() == list(range(5))


def test_span_joint_by_hand():
    """Attention breaks the tie of 0 and 2. Kept: 2 and 1; of the rest 5 points where 2 does, 4 to the other side."""
    states = torch.cat([CROSS, torch.tensor([[9.0, -5.0], [5.0, -5.0]])])
    attention = torch.tensor([0.1, 0.1, 0.2, 0.1, 0.1, 0.1])
    context = make_context(6, hidden_states=states, last_attention=attention)
    selection = run("span-joint", context, 2)
    assert selection.keep_idx.tolist() == [1, 2]
    assert selection.merge_target.tolist() == [-1, 1, 2, -1, -1, 2]
    assert selection.weight.tolist() == [0, 1, 0.5, 0, 0, 0.5]
    context = make_context(
        6, hidden_states=states, last_attention=attention, config=SparseVLMConfig(min_keep=1, merge="sum")
    )
    assert run("span-joint", context, 2).weight.tolist() == [0, 1, 1, 0, 0, 1]
    context = make_context(
        6, hidden_states=states, last_attention=attention, config=SparseVLMConfig(min_keep=1, recycle=False)
    )
    assert run("span-joint", context, 2).merge_target is None
    # r² is (0.2 / 25.6)^0.2 = 0.38 for 0 and 2, so that 16 · 0.38 of 0 is less than 16 of 1 once that leads.
    attention = torch.tensor([0.2, 25.6, 0.2, 0.2, 0.2, 0.2])
    context = make_context(4, hidden_states=CROSS * torch.tensor([1.0, 3.0]), last_attention=attention[:4])
    assert run("span-joint", context, 1).keep_idx.tolist() == [1]
    assert run("span", context, 1).keep_idx.tolist() == [0]


@pytest.mark.parametrize("attention", [torch.zeros(40), torch.eye(40)[5]])
def test_span_joint_without_attention_is_span(attention):
    context = make_context(40, dim=64, last_attention=attention)
    wanted = set(run("span", context, 8).keep_idx.tolist())
    assert len(wanted & set(run("span-joint", context, 8).keep_idx.tolist())) >= 7


def test_cdpruner_by_hand():
    """Cosines to the text 0.6, 0.96, 0.8, so r = 0, 1, 0.56: token 1 is first. Then token 0 is left 0² · (1 − 0.8²)
    and token 2 0.56² · (1 − 0.6²)."""
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    context = make_context(3, features=features, text_features=torch.tensor([[0.6, 0.8]]))
    assert [run("cdpruner", context, k).keep_idx.tolist() for k in (1, 2)] == [[1], [1, 2]]
    # Towards (1, 0) r = 1, 0.8, 0: token 1 with 0.8² · 0.36 beats token 2, which is orthogonal but irrelevant.
    context = make_context(3, features=features, text_features=torch.tensor([[2.0, 0.0]]))
    assert run("cdpruner", context, 2).keep_idx.tolist() == [0, 1]


def test_cdpruner_without_text_is_diversity_alone():
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    context = make_context(3, features=features, text_features=torch.zeros(0, 2))
    assert run("cdpruner", context, 2).keep_idx.tolist() == [0, 2]


def test_scope_by_hand():
    """Two equal tokens and one across: gains 0.5 · 2, 0.4 · 2 and 0.3 · 1; after token 0 they are 0.4 · 0 and 0.3."""
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    attention = torch.tensor([[9.0, 9.0, 9.0], [0.5, 0.4, 0.3]])
    context = make_context(3, features=features, vision_attention=attention)
    assert [run("scope", context, k).keep_idx.tolist() for k in (1, 2)] == [[0], [0, 2]]
    attention = torch.tensor([[9.0, 9.0, 9.0], [0.5, 0.4, 1.1]])
    context = make_context(3, features=features, vision_attention=attention)
    assert run("scope", context, 1).keep_idx.tolist() == [2]


def test_mmtok_by_hand():
    """Text (1, 0): P = (1, 0, 0). Q rows softmax(5, 0, 0) = (.987, .007, .007) and twice softmax(0, 5, 5) =
    (.003, .498, .498), times 1/6. Gains 1.166, 0.167, 0.167; then 1 and 2 tie."""
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    context = make_context(3, features=features, text_features=torch.tensor([[1.0, 0.0]]))
    assert [run("mmtok", context, k).keep_idx.tolist() for k in (1, 2)] == [[0], [0, 1]]
    # Without text the two equal tokens cover more of the picture: 0.167 against 0.166.
    context = make_context(3, features=features, text_features=torch.zeros(0, 2))
    assert run("mmtok", context, 1).keep_idx.tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_keep", [1, 4, 11])
def test_mmtok_follows_the_formula(seed, n_keep):
    context = make_context(12, seed=seed)
    text, unit = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (context.text_features, context.features))
    values = torch.cat([(text @ unit.T / 0.02).softmax(-1) / 3, 0.5 * (unit @ unit.T / 0.2).softmax(-1) / 12])
    picks = []
    while len(picks) < n_keep:
        total = [float(values[:, [*picks, i]].max(dim=1).values.sum()) if i not in picks else -1.0 for i in range(12)]
        picks.append(total.index(max(total)))
    assert run("mmtok", context, n_keep).keep_idx.tolist() == sorted(picks)


def test_visionzip_by_hand():
    """13 of 17: 11 dominant and ⌊13 · 10 / 64⌋ = 2 contextual. Of the six others every third is a target: 2 and 10."""
    attention = torch.ones(2, 17)
    attention[1, [2, 5, 7, 10, 12, 16]] = 0.1
    keys = torch.zeros(17, 2)
    keys[:, 0] = 1.0
    keys[[2, 7, 16]] = torch.tensor([0.0, 3.0])  # of the rest 5 and 12 look like target 10
    selection = run("visionzip", make_context(17, vision_attention=attention, vision_keys=keys), 13)
    assert selection.keep_idx.tolist() == [0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 13, 14, 15]
    assert selection.recycled_idx.tolist() == [2, 10]
    assert selection.merge_target.tolist() == [0, 1, 2, 3, 4, 10, 6, 2, 8, 9, 10, 11, 10, 13, 14, 15, 2]
    third = pytest.approx(1 / 3)
    assert selection.weight.tolist() == [1, 1, third, 1, 1, third, 1, third, 1, 1, third, 1, third, 1, 1, 1, third]


@pytest.mark.parametrize(("n_keep", "n_contextual"), [(64, 10), (128, 20), (192, 30), (6, 0), (7, 1)])
def test_visionzip_has_the_published_split(n_keep, n_contextual):
    selection = run("visionzip", make_context(576), n_keep)
    assert (0 if selection.recycled_idx is None else len(selection.recycled_idx)) == n_contextual


def attention_with(n, middle, last):
    """Attention rows whose highest values are at the given places, in their order."""
    rows = torch.zeros(2, n)
    for row, places in zip(rows, (middle, last), strict=True):
        for rank, place in enumerate(places):
            row[place] = 2.0 - rank / 1000
    return rows


@pytest.mark.parametrize(
    ("anchor", "neighbours", "registers"), [(4, [1, 3, 5, 7], []), (8, [5, 7], [0, 2]), (1, [0, 2, 4], [8])]
)
def test_hiprune_by_hand(anchor, neighbours, registers):
    """A picture of 3 × 3, one anchor for five tokens; at the border the last block fills up (0, 2, 8, …)."""
    attention = attention_with(9, [anchor], [0, 2, 8, 6])
    context = make_context(9, vision_attention=attention, coordinates=grid_coordinates((3, 3)))
    assert run("hiprune", context, 5).keep_idx.tolist() == sorted([anchor, *neighbours, *registers])


@pytest.mark.parametrize(
    ("coordinates", "anchor", "neighbours"),
    [
        (grid_coordinates((2, 2), (2, 2)), 3, [1, 2]),  # the second picture begins right after token 3
        (grid_coordinates((2, 2), (2, 2)), 4, [5, 6]),
        (grid_coordinates((2, 2, 2)), 3, [1, 2]),  # another frame is no neighbour
        (grid_coordinates((2, 2, 2), fast=True), 3, [1, 2]),  # nor one at the same time coordinate
        (grid_coordinates((4, 1, 2), fast=True), 2, [3]),
        (grid_coordinates((2, 4)), 1, [0, 2, 5]),  # not square
        (grid_coordinates((8, 1)), 3, [2, 4]),
        (grid_coordinates((6, 1, 3), (2, 2)), 17, [16]),  # the video ends at the picture's time coordinate
        (grid_coordinates((6, 1, 3), (2, 2)), 18, [19, 20]),
        (torch.arange(8).expand(3, -1), 3, []),  # plain positions: no grid is known
    ],
)
def test_hiprune_stays_within_a_frame(coordinates, anchor, neighbours):
    n = coordinates.shape[1]
    registers = [i for i in range(n) if i not in (anchor, *neighbours)][: 5 - 1 - len(neighbours)]
    attention = attention_with(n, [anchor], registers)
    context = make_context(n, vision_attention=attention, coordinates=coordinates)
    assert run("hiprune", context, 5).keep_idx.tolist() == sorted([anchor, *neighbours, *registers])


@pytest.mark.parametrize(("n_keep", "n_anchors"), [(4, 0), (5, 1), (64, 1), (128, 3), (192, 4)])
def test_hiprune_has_the_published_share(n_keep, n_anchors):
    """round(0.1 · n_keep / 5) anchors; here none is beside another, and the last block wants other tokens."""
    places = torch.arange(n_anchors) * 2 * 40 + 45
    attention = attention_with(40 * 40, places.tolist(), list(range(800, 1100)))
    context = make_context(40 * 40, vision_attention=attention, coordinates=grid_coordinates((40, 40)))
    kept = set(run("hiprune", context, n_keep).keep_idx.tolist())
    assert kept & set(range(800)) == {int(p) + step for p in places for step in (0, -1, 1, -40, 40)}


def test_tome_by_hand():
    """Even tokens 0 and 2 propose to 3 (cosine 1) and 1 (0.1)."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [2.0, 0.0]])
    context = make_context(4, features=features)
    three, two, one = (run("tome", context, k) for k in (3, 2, 1))
    assert (three.keep_idx.tolist(), three.merge_target.tolist()) == ([1, 2, 3], [3, 1, 2, 3])
    assert three.weight.tolist() == [0.5, 1.0, 1.0, 0.5]
    assert three.recycled_idx.tolist() == [3]
    assert (two.keep_idx.tolist(), two.merge_target.tolist()) == ([1, 3], [3, 1, 1, 3])
    assert (one.keep_idx.tolist(), one.merge_target.tolist()) == ([3], [3, 3, 3, 3])
    assert one.weight.tolist() == [0.25] * 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_keep", [1, 2, 5, 9, 15])
def test_tome_follows_the_formula(seed, n_keep):
    """Rounds with means and sizes written out, token by token."""
    context = make_context(16, seed=seed)
    tokens = [(i, context.features[i].double(), 1, {i}) for i in range(16)]
    while len(tokens) > n_keep:
        even, odd = tokens[0::2], list(tokens[1::2])
        offers = []
        for a, (_, x, _, _) in enumerate(even):
            cosine = [float(torch.cosine_similarity(x, y, dim=0)) for _, y, _, _ in odd]
            offers.append((-max(cosine), a, cosine.index(max(cosine))))
        accepted = sorted(offers)[: min(len(tokens) // 2, len(tokens) - n_keep)]
        for _, a, b in accepted:
            (_, x, size, members), (i, y, other_size, others) = even[a], odd[b]
            mean = (size * x + other_size * y) / (size + other_size)
            odd[b] = (i, mean, size + other_size, members | others)
        gone = {a for _, a, _ in accepted}
        tokens = sorted([token for a, token in enumerate(even) if a not in gone] + odd, key=lambda token: token[0])
    selection = run("tome", context, n_keep)
    assert selection.keep_idx.tolist() == [i for i, _, _, _ in tokens]
    for i, mean, size, members in tokens:
        assert set((selection.merge_target == i).nonzero().squeeze(-1).tolist()) == members
        assert selection.weight[sorted(members)].tolist() == pytest.approx([1 / size] * size)
        torch.testing.assert_close(context.features[sorted(members)].double().mean(0), mean)


@pytest.mark.parametrize("n", [23, 95, 131])
@pytest.mark.parametrize("dim", [64, 200])
def test_tome_takes_the_first_of_equal_tokens(n, dim):
    """Wherever in the matrix of cosines they are."""
    for seed in range(8):
        context = make_context(n, seed, dim, kind="identical")
        selection = run("tome", context, (n + 1) // 2)
        assert selection.keep_idx.tolist() == [*range(1, n, 2), n - 1]
        assert selection.merge_target[0 : n - 1 : 2].unique().tolist() == [1]


def test_tome_leaves_its_inputs_alone():
    context = make_context(9)
    before = context.features.clone()
    run("tome", context, 3)
    assert torch.equal(context.features, before)


def test_random_draws_by_seed_row_and_layer():
    seeds = [0, 1, 4294, 4295, 2**32, 2**32 + 1, 2**44, 2**50, 2**51, 2**62, 2**63 - 1, np.int64(2**62 + 1)]
    drawn = set()
    for seed, sample, layer in itertools.product(seeds, (0, 1), (-1, 2)):
        config = SparseVLMConfig(min_keep=1, seed=seed)
        context = make_context(200, config=config, sample=sample, layer=layer)
        first = run("random", context, 100).keep_idx
        assert torch.equal(run("random", context, 100).keep_idx, first)
        drawn.add(tuple(first.tolist()))
    assert len(drawn) == len(seeds) * 4


def test_grid_by_hand():
    assert run("grid", make_context(10), 4).keep_idx.tolist() == [1, 3, 6, 8]  # ⌊1.25⌋, ⌊3.75⌋, ⌊6.25⌋, ⌊8.75⌋


def test_variants_of_sparsevlm_differ_in_options_only():
    traits = {name: SelectorTraits.of(SELECTORS[name]()) for name in ("sparsevlm", "sparsevlm-paper", "sparsevlm-v2")}
    assert {t.name for t in traits.values()} == set(traits)
    assert len({(t.placement, t.needs, t.default_schedule, t.recycles) for t in traits.values()}) == 1
    context = make_context(20)
    assert torch.equal(run("sparsevlm-paper", context, 8).keep_idx, run("sparsevlm", context, 8).keep_idx)


def test_every_selector_has_a_true_row_in_the_docs():
    rows = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| `([\w-]+)` \|", line):
            rows[match[1]] = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]
    for name, make in SELECTORS.items():
        traits = SelectorTraits.of(make())
        assert traits.name == name
        _, where, needs, _, _ = rows[name]
        assert (where == "before the decoder") == (traits.placement == BEFORE_DECODER), name
        assert {need for need in NEEDS if need.replace("_", " ") in re.split(", ", needs)} == traits.needs, name
