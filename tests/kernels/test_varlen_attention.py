"""Packed attention: every sequence within itself, against softmax written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsevlm.kernels.attention import continued_attention, equal_attention, padded_attention, varlen_attention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def exact(query, key, value, lengths, scaling, causal):
    groups, mixed = query.shape[1] // key.shape[1], []
    shared = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    for q, k, v in zip(*(x.double().split(lengths) for x in (query, *shared)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * scaling
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        mixed.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
    return torch.cat(mixed)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[1], [15, 1, 63], [64, 64, 64], [577]])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 80), (6, 2, 128)])
def test_against_exact(heads, kv_heads, head_dim, lengths, causal, dtype, device):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads)]
    parts = [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    scaling = head_dim**-0.5
    wanted = exact(*parts, lengths, scaling, causal)
    found = [varlen_attention(*parts, cu_seqlens, max(lengths), scaling, causal)]
    if len(set(lengths)) == 1:
        found.append(equal_attention(*parts, lengths[0], scaling, causal))
    for one in found:
        assert (one.double() - wanted).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[(1, 1)], [(3, 20), (17, 17), (1, 65)], [(30, 611)]])
def test_the_last_rows_against_exact(lengths, dtype, device):
    generator = torch.Generator().manual_seed(len(lengths))
    n_queries, n_keys = ([pair[i] for pair in lengths] for i in (0, 1))
    parts = [torch.randn(sum(n_keys), n, 128, generator=generator).to(device, dtype) for n in (6, 2, 2)]
    whole = exact(*parts, n_keys, 0.1, True)
    own = torch.cat([torch.arange(end - n, end) for end, n in zip(np.cumsum(n_keys), n_queries, strict=True)]).to(
        device
    )
    bounds = [torch.tensor([0, *n], device=device).cumsum(0).to(torch.int32) for n in (n_queries, n_keys)]
    found = continued_attention(parts[0][own], *parts[1:], *bounds, (max(n_queries), max(n_keys)), 0.1)
    assert (found.double() - whole[own]).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "n_rows"), [(64, 64), (960, 700), (1280, 1100)])
def test_padding_is_not_seen(n, n_rows, dtype, device):
    generator = torch.Generator().manual_seed(n)
    parts = [torch.randn(n, 4, 80, generator=generator).to(device, dtype) for _ in range(3)]
    found = padded_attention(*parts, torch.tensor([n_rows], device=device), 80**-0.5)[:n_rows]
    wanted = exact(*(x[:n_rows] for x in parts), [n_rows], 80**-0.5, False)
    assert (found.double() - wanted).abs().max() < TOLERANCE[dtype]
