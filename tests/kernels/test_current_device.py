"""Kernels that hooks call run on the device of their tensors, whichever is current: a model may lie on several."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.triton import (
    bipartite_merge,
    centre,
    clusters,
    coverage,
    density_peaks,
    farthest_points,
    gram_matrix,
    merge,
    pivoted_cholesky,
    places,
    received_attention,
    recycled_rows,
    score_order,
)


def merged(x):
    hidden, first = x.flatten(0, 1).clone(), x[:, 0].long()
    merge.write_merged(hidden, first, first[:, 0] * 3, x, first, first, x[:, 0])
    return hidden


CALLS = {
    "coverage": lambda x: coverage.coverage(x, x[:, 0], x[:, 0] > -1, 3, 1e-12),
    "farthest points": lambda x: farthest_points.farthest_points(x, x[:, 0], x[:, 0] > -1, 3, 1e-6),
    "pivoted cholesky": lambda x: pivoted_cholesky.pivoted_cholesky(x, x[:, 0], 3, True, 1e-6),
    "centre": lambda x: centre.centre(x, x[:, 0] > -1),
    "parts of products": lambda x: gram_matrix.split(x, x)[0],
    "first picks": lambda x: places.first_picks(x[:, 0].long(), x[:, 0, 0].long() * 3, x[:, 0] > -1),
    "indices": lambda x: places.indices_of(x[:, 0] > 0, 5),
    "places": lambda x: score_order.place_by_score(x[:, 0], x[:, 0] > -1),
    "highest": lambda x: score_order.highest(x[:, 0], x[:, 0] > -1, x[:, 0, 0].long()),
    "recycled rows": lambda x: recycled_rows.recycled_rows(
        x[:, 0].long(), x[:, 0, 0].long() * 9, x[:, 0, 0].long() * 4, None, 4, 0.5, 0.5
    )[1],
    "points": lambda x: density_peaks.centred_points(x, x[:, 0] > -1)[0],
    "log densities": lambda x: density_peaks.log_densities(x, x[:, 0], x[:, 0] > -1, x[:, 0, 0].long(), 0),
    "peak scores": lambda x: density_peaks.peak_scores(x, x[:, 0], x[:, 0] > -1, x[:, 0], 0),
    "unit rows": lambda x: clusters.unit_rows(x, x[:, 0].long())[0],
    "nearest centres": lambda x: clusters.nearest_centres(x, x[:, 0].long(), x[:, 0] > 0),
    "clusters": lambda x: clusters.spread_clusters(
        x[:, 0].long(), x[:, 0] > 0, x[:, 0] > 0, x[:, 0].long(), 20, "mean"
    )[1],
    "merges": merged,
    "partners": lambda x: bipartite_merge.best_partners(x, x[:, 0, 0].long() * 9)[1],
    "best pairs": lambda x: bipartite_merge.merge_best_pairs(
        x[:, 0], x[:, 0].long(), x[:, 0, 0].long() * 9, x[:, 0, 0].long() * 2, x[:, 0].long(), x[:, 0] > 0, 32
    ),
    "merged rows": lambda x: bipartite_merge.merged_rows(x, x[:, 0].long(), 8)[0],
    "received attention": lambda x: received_attention.received_attention(
        x, x, torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device), 0.25
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_device_is_entered(call, device, monkeypatch):
    entered, kept = [], torch.cuda.device_of

    def noted(tensor):
        entered.append(tensor.device)
        return kept(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", noted)
    tensor = torch.eye(16, device=device).repeat(2, 1, 1)
    CALLS[call](tensor)
    assert set(entered) == {tensor.device}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("call", CALLS)
def test_another_device_than_the_current(call):
    tensors = [torch.eye(16, device=f"cuda:{index}").repeat(2, 1, 1) for index in range(2)]
    here, there = (CALLS[call](tensor) for tensor in tensors)
    assert there.device == tensors[1].device
    assert torch.equal(here.cpu(), there.cpu())
