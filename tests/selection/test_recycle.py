"""Recycling: counts, density peaks, and what a merge conserves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.kernels.places import indices_of
from sparsevlm.kernels.rank_counts import count_clusters_of
from sparsevlm.selection import recycle as recycle_module
from sparsevlm.selection.padded import PaddedSelection, merged_states
from sparsevlm.selection.recycle import (
    assign_to_centres,
    clusters_within,
    count_clusters,
    is_density_peak,
    merge_hidden_states,
    recycle,
)


def density_peaks(states, n_clusters, n_more=0):
    """Centres of one sample, which is filled up with ``n_more`` rows."""
    n = states.shape[0]
    rows = torch.cat([states, torch.full((n_more, states.shape[1]), 7.0)])[None]
    valid = torch.arange(n + n_more)[None] < n
    return is_density_peak(rows, valid, torch.tensor([n_clusters]), n_clusters + n_more)[0].nonzero().squeeze(-1)


def clusters_of(states, centres):
    is_centre = torch.zeros((1, states.shape[0]), dtype=torch.bool)
    is_centre[0, centres] = True
    return assign_to_centres(states[None], is_centre, len(centres) + 2)[0]


def blobs(sizes, spread=0.01, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.eye(dim)[i] * 10 + spread * torch.randn(n, dim, generator=generator) for i, n in enumerate(sizes)]
    return torch.cat(parts)


def test_counts_of_the_paper():
    assert count_clusters(100, 0.5, 0.5) == (50, 25)
    assert count_clusters(276, 0.3, 0.1) == (82, 8)
    assert count_clusters(10, 0.0, 0.5) == (0, 0)
    assert count_clusters(100, 0.29, 0.5) == (29, 14)  # 0.29 · 100 = 28.999…
    assert count_clusters(100, 1.0, 0.29) == (100, 29)


@given(st.lists(st.integers(0, 5000), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_counts_of_many_are_those_of_each(numbers, tau, theta):
    found = torch.stack(count_clusters_of(torch.tensor(numbers), tau, theta), dim=1)
    assert [tuple(one) for one in found.tolist()] == [count_clusters(n, tau, theta) for n in numbers]


@given(st.integers(1, 600), st.integers(1, 600), st.floats(0, 1), st.floats(0, 1))
def test_clusters_within_is_the_largest_that_fits(n_visual, n_out, tau, theta):
    if n_out >= n_visual:
        return
    found = int(clusters_within(torch.tensor([n_visual]), torch.tensor([n_out]), n_out + 9, tau, theta))

    def fits(n):
        return n <= n_out // 4 and count_clusters(n_visual - n_out + n, tau, theta)[1] >= n

    assert fits(found)
    assert not any(fits(n) for n in range(found + 1, n_out // 4 + 1))


def test_one_centre_in_each_blob():
    states = blobs([5, 9, 4])
    centres = density_peaks(states, 3)
    assert sorted((centres >= 5).long() + (centres >= 14).long()) == [0, 1, 2]
    cluster_idx = clusters_of(states, centres)
    assert torch.equal(cluster_idx[:5], cluster_idx[:1].expand(5))
    assert torch.equal(cluster_idx[centres], centres)


def test_density_peaks_in_chunks_is_the_same(monkeypatch):
    states = torch.randn(70, 16, generator=torch.Generator().manual_seed(3))
    whole = density_peaks(states, 9)
    monkeypatch.setattr(recycle_module, "_CHUNK_ROWS", 8)
    assert torch.equal(density_peaks(states, 9), whole)


@pytest.mark.parametrize(("n", "n_clusters"), [(1, 1), (2, 1), (5, 5), (20, 4), (20, 19), (3, 7)])
def test_what_fills_up_is_no_token(n, n_clusters):
    states = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    found = density_peaks(states, n_clusters)
    assert len(found) == min(n, n_clusters)
    assert torch.equal(density_peaks(states, n_clusters, n_more=11), found)


def centres_in_log_space(states, n_clusters):
    """The paper's ρδ in float64 logarithms, written out pair by pair."""
    points = states.double() / states.shape[1] ** 0.5
    distances = torch.stack([torch.stack([(a - b).norm() for b in points]) for a in points])
    log_density = [-float(row.sort().values[1 : n_clusters + 1].square().mean()) for row in distances]
    gamma = []
    for i, row in enumerate(distances):
        denser = [float(row[j]) for j in range(len(row)) if (-log_density[j], j) < (-log_density[i], i)]
        gamma.append(log_density[i] + torch.tensor(min(denser) if denser else float(row.max())).log().item())
    return sorted(sorted(range(len(gamma)), key=lambda i: -gamma[i])[:n_clusters])


@pytest.mark.parametrize(("scale", "seeds"), [(1e-3, range(1)), (1.0, range(12)), (1e3, range(1))])
def test_density_peaks_follow_the_formula_at_any_scale(scale, seeds):
    """At large norms exp(−d²) is 0 for every token: only logarithms tell them apart."""
    for seed in seeds:
        states = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) * scale
        assert density_peaks(states, 3).tolist() == centres_in_log_space(states, 3)


def test_equally_dense_tokens_are_ranked_by_their_place():
    """The first is then the densest, whose separation is the largest distance; it is 9 for the third."""
    assert density_peaks(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 1).tolist() == [0]


def test_distances_are_exact_far_from_the_origin():
    """Products of long rows would lose differences of one."""
    states = blobs([5, 9, 4], spread=0.3)
    assert density_peaks(states + 4096, 3).tolist() == density_peaks(states + 4096 - 4096, 3).tolist()


def test_centres_are_chosen_by_direction_not_by_length():
    states = torch.tensor([[1.0, 0.0], [5.0, 5.0], [3.0, 1.0], [0.1, 0.2]])
    assert clusters_of(states, torch.tensor([0, 1])).tolist() == [0, 1, 0, 1]
    # Centres belong to themselves, whichever is nearer.
    assert clusters_of(torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.1]]), torch.tensor([0, 1])).tolist() == [
        0, 1, 0
    ]  # fmt: skip


def test_identical_tokens_are_no_trouble():
    assert density_peaks(torch.ones(6, 4), 2).tolist() == [0, 1]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(4, 60), seed=st.integers(0, 99), merge=st.sampled_from(["mean", "sum"]))
def test_a_merge_conserves_what_it_says(n, seed, merge):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, 6, generator=generator)
    is_member = torch.zeros((1, n), dtype=torch.bool)
    members = torch.randperm(n, generator=generator)[: max(1, n // 3)].sort().values
    is_member[0, members] = True
    n_clusters = torch.tensor([max(1, len(members) // 2)])
    found = recycle(states[None], is_member, n_clusters, n, int(n_clusters) + 3, merge)
    target, weight, centres = found.target[0], found.weight[0], found.is_centre[0].nonzero().squeeze(-1)
    assert len(centres) == int(n_clusters)
    assert set(centres.tolist()) == set(target[members].tolist()) <= set(members.tolist())
    assert torch.equal(target[centres], centres)
    assert target[~is_member[0]].eq(-1).all()
    merged = merge_hidden_states(states, centres, target, weight)
    sizes = torch.stack([(target == centre).sum() for centre in centres]).float()
    factor = sizes if merge == "mean" else torch.ones_like(sizes)
    torch.testing.assert_close((merged * factor[:, None]).sum(0), states[members].sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_merge_is_that_of_each_sample(dtype):
    """One sample merges three rows into one, keeps one whole and halves one; the other merges nothing."""
    states = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    is_kept = torch.tensor([[True, True, False, False, True, False], [False, True, False, True, False, False]])
    target = torch.tensor([[0, 1, 1, 1, 4, -1], [-1] * 6])
    weight = torch.tensor([[1.0, 0.5, 0.25, 0.25, 0.5, 0.0], [0.0] * 6])
    kept = indices_of(is_kept, 4)
    found = merged_states(states, kept, PaddedSelection(is_kept, target, weight))
    for b, n in enumerate((3, 2)):
        wanted = merge_hidden_states(states[b], kept[b, :n], target[b], weight[b])
        torch.testing.assert_close(found[b, :n], wanted)
    assert torch.equal(found[0, 0], states[0, 0])
    assert torch.equal(found[1, :2], states[1, [1, 3]])


def test_a_row_that_nothing_is_merged_into_has_a_weight_too():
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    merged = merge_hidden_states(states, torch.tensor([0, 2]), torch.tensor([0, -1, 2]), torch.tensor([0.5, 9.0, 1.0]))
    assert merged.tolist() == [[0.5, 1.0], [5.0, 6.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_only_keep_themselves_pass_bit_for_bit(dtype):
    states = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    merge_target = torch.tensor([0, 1, 1, -1, 4, -1])
    weight = torch.tensor([1.0, 0.5, 0.5, 0.0, 1.0, 0.0])
    merged = merge_hidden_states(states, torch.tensor([0, 1, 4]), merge_target, weight)
    assert torch.equal(merged[[0, 2]], states[[0, 4]])
    torch.testing.assert_close(merged[1].float(), (states[1].float() + states[2].float()) / 2, rtol=1e-2, atol=1e-3)
