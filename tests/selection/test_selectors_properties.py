"""What holds for every registered selector, whatever the tokens are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_contexts import grid_coordinates, make_context, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevlm.kernels.pivoted_cholesky import pivoted_cholesky
from sparsevlm.selection import greedy, similarity
from sparsevlm.selection.context import SelectorTraits
from sparsevlm.selection.decide import checked_selection
from sparsevlm.selection.selectors import SELECTORS

KINDS = ("random", "pairs", "identical", "zeros")
BY_SCORE = ("fastv", "pyramiddrop", "v2drop")
GREEDY = ("span", "divprune", "cdpruner", "scope", "mmtok")
VISUAL_ROWS = (
    "hidden_states",
    "features",
    "previous_hidden_states",
    "vision_keys",
    "last_attention",
    "prior_attention",
    "indices",
)


def same(a, b):
    """Whether two selections are the same to the bit."""
    return all(
        x is y is None or torch.equal(x, y) for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SELECTORS)), kind=st.sampled_from(KINDS))
def test_exact_count_and_the_same_again(data, name, kind):
    n = data.draw(st.integers(2, 70))
    n_keep = data.draw(st.integers(1, n - 1))
    context = make_context(n, data.draw(st.integers(0, 99)), n_text=data.draw(st.integers(1, 4)), kind=kind)
    selection = run(name, context, n_keep)  # checks number, order, range and merges
    assert same(run(name, context, n_keep), selection)
    if selection.merge_target is not None:
        sums = torch.zeros(n).index_add_(0, selection.merge_target.clamp_min(0), selection.weight)
        torch.testing.assert_close(sums[selection.keep_idx], torch.ones(n_keep))


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("n", [2, 3, 17])
def test_the_ends_of_the_range(name, n):
    for n_keep in {1, 2, n - 1} - {n}:
        run(name, make_context(n), n_keep)


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_choose_as_their_float32_values(name, dtype):
    half = make_context(40, dtype=dtype)
    full = dataclasses.replace(
        half,
        **{
            field: getattr(half, field).float()
            for field in ("hidden_states", "features", "text_features", "previous_hidden_states", "vision_keys")
        },
    )
    assert same(run(name, half, 11), run(name, full, 11))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*BY_SCORE, *GREEDY, "sparsevlm"])
def test_the_order_of_the_tokens_does_not_matter(name, seed):
    context = make_context(30, seed, dim=40)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    moved = {field: getattr(context, field)[order] for field in VISUAL_ROWS}
    for field in ("rater_attention", "vision_attention", "coordinates"):
        moved[field] = getattr(context, field)[:, order]
    shuffled = run(name, dataclasses.replace(context, **moved), 9)
    assert order[shuffled.keep_idx].sort().values.tolist() == run(name, context, 9).keep_idx.tolist()


@pytest.mark.parametrize("name", [name for name, make in SELECTORS.items() if hasattr(make(), "select_batch")])
def test_a_batch_is_answered_like_its_samples(name):
    kinds = ("random", "pairs", "identical", "random")
    contexts = [make_context(30, seed, 40, n_text=seed + 1, kind=kind) for seed, kind in enumerate(kinds)]
    results = SELECTORS[name]().select_batch(contexts, 9)
    for context, result in zip(contexts, results, strict=True):
        assert same(checked_selection(result, context.hidden_states, 9, name), run(name, context, 9))


@pytest.mark.parametrize("name", ["cdpruner", "span-joint"])
def test_determinants_come_from_the_products_where_that_pays(name, monkeypatch):
    contexts = [make_context(30, seed, 40, n_text=3) for seed in range(3)]
    wanted = [run(name, context, 9) for context in contexts]
    asked = []

    def noted(gram, *given):
        asked.append(gram.shape)
        return pivoted_cholesky(gram, *given)

    monkeypatch.setattr(greedy, "gram_pays", lambda rows: True)
    monkeypatch.setattr(greedy, "pivoted_cholesky", noted)
    results = SELECTORS[name]().select_batch(contexts, 9)
    for context, result, one in zip(contexts, results, wanted, strict=True):
        assert same(checked_selection(result, context.hidden_states, 9, name), one)
    assert asked == [(3, 30, 30)]


def test_products_pay_on_a_gpu_up_to_8192_rows_and_up_to_twice_the_memory_of_the_rows():
    with FakeTensorMode(allow_non_fake_inputs=True):
        for n, size, pays in ((8192, 40, True), (8193, 40, False), (10_000, 5000, True), (10_001, 5000, False)):
            assert greedy.gram_pays(torch.empty(2, n, size, device="cuda")) == pays
            assert not greedy.gram_pays(torch.empty(2, n, size))


@pytest.mark.parametrize("name", [*BY_SCORE, *GREEDY])
@pytest.mark.parametrize("kind", ["identical", "zeros"])
def test_ties_go_to_the_lower_index(name, kind):
    assert run(name, make_context(33, kind=kind), 20).keep_idx.tolist() == list(range(20))


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name, make in SELECTORS.items() for field in sorted({"hidden_states", *make().needs})],
)
def test_nan_is_refused(name, field):
    context = make_context(24)
    poisoned = getattr(context, field).clone()
    poisoned[-1, -1 if poisoned.ndim == 2 else ...] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        run(name, dataclasses.replace(context, **{field: poisoned}), 12)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_only_what_is_needed_is_read(name):
    context = make_context(24)
    needs = SelectorTraits.of(SELECTORS[name]()).needs
    optional = {
        "features", "text_features", "rater_attention", "previous_hidden_states", "last_attention", "prior_attention",
        "vision_attention",
        "vision_keys",
    }  # fmt: skip
    bare = dataclasses.replace(context, **dict.fromkeys(optional - needs))
    assert same(run(name, bare, 12), run(name, context, 12))


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_choice_has_no_gradient(name):
    """Outside of generate the embeddings may carry one."""
    context = make_context(30)
    states = ("hidden_states", "features", "text_features", "previous_hidden_states", "vision_keys")
    traced = {field: getattr(context, field).clone().requires_grad_() for field in states}
    selection = run(name, dataclasses.replace(context, **traced), 9)
    assert selection.weight is None or not selection.weight.requires_grad
    assert same(selection, run(name, context, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("rounds", [False, True])
def test_a_batch_on_the_device_is_searched_like_its_samples(rounds):
    rows = torch.randn(5, 300, 200, generator=torch.Generator().manual_seed(0))
    quality = torch.rand(5, 300, generator=torch.Generator().manual_seed(1))
    wanted = greedy.dpp_map(rows, quality, 90, rounds)
    assert torch.equal(greedy.dpp_map(rows.cuda(), quality.cuda(), 90, rounds).cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_everything_stays_on_the_device(name):
    context = make_context(300, dim=64)
    tensors = {f.name: getattr(context, f.name) for f in dataclasses.fields(context)}
    moved = {field: value.cuda() for field, value in tensors.items() if isinstance(value, torch.Tensor)}
    on_device = dataclasses.replace(context, **moved)
    selection = SELECTORS[name]().select(on_device, 90)
    for tensor in dataclasses.astuple(selection) if dataclasses.is_dataclass(selection) else [selection]:
        assert tensor is None or tensor.is_cuda
    assert same(run(name, on_device, 90), run(name, on_device, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*GREEDY, "span-joint", "visionzip", "hiprune"])
def test_the_device_chooses_nearly_as_the_host(name):
    """At least 97 of 100 rows: what is nearly tied may fall on either side."""
    context = make_context(400, dim=256)
    tensors = {f.name: getattr(context, f.name) for f in dataclasses.fields(context)}
    moved = {field: value.cuda() for field, value in tensors.items() if isinstance(value, torch.Tensor)}
    chosen = [run(name, one, 100).keep_idx.tolist() for one in (context, dataclasses.replace(context, **moved))]
    assert len(set(chosen[0]) & set(chosen[1])) >= 97


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_many_tokens_fit_in_bounded_memory(name, monkeypatch):
    """4097 tokens have 16.8 million pairs; no tensor may hold more than the limits allow."""
    monkeypatch.setattr(similarity, "_MAX_BLOCK_ELEMENTS", 1 << 20)
    monkeypatch.setattr(greedy, "_MAX_HELD_ELEMENTS", 1 << 21)
    context = make_context(4097, dim=32, coordinates=grid_coordinates((17, 241)))
    with LargestTensor() as largest:
        run(name, context, 97)
    assert largest.elements <= 1 << 21
