"""Received attention: the Triton twin against the plain function, and that against softmax written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsevlm.kernels import received_attention as module
from sparsevlm.kernels.received_attention import received_attention, received_attention_reference
from sparsevlm.kernels.triton.received_attention import received_attention as twin

# Products of half precision are exact in float32, in which all are added up.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(lengths, heads, kv_heads, head_dim, dtype=torch.float32, device="cpu", fillers=0, seed=0):
    """Queries, keys and lengths of packed sequences; parts of one tensor, as a tower makes them."""
    generator = torch.Generator().manual_seed(sum(lengths) + seed)
    both = torch.randn(sum(lengths) + fillers, heads + kv_heads, head_dim, generator=generator).to(device, dtype)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return *both.split((heads, kv_heads), dim=1), cu_seqlens


def exact(query, key, cu_seqlens, scaling):
    out = query.new_zeros(query.shape[0], dtype=torch.float64)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end].double(), key[start:end].double()) * scaling
        out[start:end] = scores.softmax(dim=-1).sum(dim=1).mean(dim=0)
    return out


def check(query, key, cu_seqlens, resolution=1e-5):
    scaling = query.shape[2] ** -0.5
    found, wanted = (f(query, key, cu_seqlens, scaling) for f in (twin, received_attention_reference))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=resolution, atol=resolution)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if start < end:
            assert float(found[start:end].mean()) == pytest.approx(1.0, abs=1e-4)
    assert not found[cu_seqlens[-1] :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize(("lengths", "fillers"), [((5,), 0), ((70, 1, 0, 64), 20), ((129,), 1)])
def test_twin(lengths, fillers, head_dim, dtype, device):
    """Sequences that share blocks, that fill some, and an empty one."""
    check(*make(lengths, 2, 2, head_dim, dtype, device, fillers))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (6, 1, 20), (1, 1, 8)])
def test_shapes(heads, kv_heads, head_dim, device):
    check(*make((33, 40), heads, kv_heads, head_dim, device=device))


def test_rows_may_lie_anywhere(device):
    """Heads before rows, as hooks have them; and columns before rows."""
    query, key, cu_seqlens = make((50, 9), 2, 2, 80, device=device)
    wanted = twin(query, key, cu_seqlens, 0.3)
    for order in ((1, 0, 2), (2, 0, 1)):
        back = torch.tensor(order).argsort().tolist()
        moved = (tensor.permute(order).contiguous().permute(back) for tensor in (query, key))
        assert torch.equal(twin(*moved, cu_seqlens, 0.3), wanted)


def test_lengths_may_be_filled_up(device):
    query, key, cu_seqlens = make((30, 41), 2, 2, 16, device=device)
    longer = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(5)])
    for f in (twin, received_attention_reference):
        assert torch.equal(f(query, key, longer, 0.25), f(query, key, cu_seqlens, 0.25))


def test_no_rows(device):
    query, key, cu_seqlens = make((0,), 2, 2, 16, device=device)
    for f in (twin, received_attention_reference):
        assert f(query, key, cu_seqlens, 0.25).shape == (0,)


def test_large_logits(device):
    """Attention that all falls on one key each: nothing overflows.

    Of whole numbers, whose products and sums are exact in whatever order a CPU or GPU takes them; with logits of 10⁵
    their rounding would decide between keys that are nearly tied, of which there are none.
    """
    query, key, cu_seqlens = make((64, 20), 2, 2, 16, device=device, seed=1)
    query, key = (query * 100).round(), (key * 100).round()
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        first, second = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]).topk(2).values.unbind(-1)
        assert float((first - second).min()) * 16**-0.5 > 14
    check(query, key, cu_seqlens)


@pytest.mark.parametrize("block", [1 << 26, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plain_function_is_exact(dtype, block, monkeypatch):
    monkeypatch.setattr(module, "_MAX_BLOCK_ELEMENTS", block)
    query, key, cu_seqlens = make((17, 0, 40), 4, 2, 20, dtype, fillers=3)
    found = received_attention_reference(query, key, cu_seqlens, 0.4)
    torch.testing.assert_close(found.double(), exact(query, key, cu_seqlens, 0.4), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("lengths", [(577,), (4097, 63, 256), (16384,), (256,) * 16])
def test_long(lengths, head_dim, dtype, device):
    given = make(lengths, 16, 16, head_dim, dtype, device, fillers=7)
    check(*given, resolution=1e-4)
    found = [twin(*given, head_dim**-0.5) for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.gpu
def test_it_can_be_captured(captured, device):
    query, key, cu_seqlens = make((300, 212), 4, 4, 80, torch.bfloat16, device)
    graph, found = captured(lambda *given: received_attention(*given, 0.1), query, key, cu_seqlens)
    other = make((55, 400), 4, 4, 80, torch.bfloat16, device, fillers=57, seed=1)
    for tensor, new in zip((query, key, cu_seqlens), other, strict=True):
        tensor.copy_(new)
    graph.replay()
    wanted = received_attention_reference(*other, 0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
