"""Norm, activation and rotation: Triton twins against the plain functions."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.elementwise import (
    Norm,
    rms_norm_reference,
    rotate_into_reference,
    rotate_reference,
    swiglu_reference,
)
from sparsevlm.kernels.triton.elementwise import rms_norm, rotate, rotate_into, swiglu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of one part in so many of their size may round the other way.
RESOLUTION = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Rows are programs of their own, which Triton's interpreter runs one after the other.
LENGTHS = (1, 7, pytest.param(63, marks=pytest.mark.gpu))


def draw(*shape, dtype, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(found, wanted):
    resolution = RESOLUTION[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=resolution, atol=resolution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", [80, 256, 3584])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype, n, size, with_residual, device):
    x, residual = draw(n, size, dtype=dtype, device=device), draw(n, size, dtype=dtype, device=device, seed=1)
    weight = draw(size, dtype=dtype, device=device, seed=2)
    other = residual if with_residual else None
    for found, wanted in zip(rms_norm(x, weight, 1e-6, other), rms_norm_reference(x, weight, 1e-6, other), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", [80, 3420])
def test_swiglu(dtype, n, size, device):
    both = 3 * draw(n, 2 * size, dtype=dtype, device=device)
    gate, up = both[:, :size], both[:, size:]
    assert_close(swiglu(gate, up), swiglu_reference(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (2, 2, 80), (3, 1, 6)])
def test_rotate(dtype, n, heads, kv_heads, head_dim, device):
    both = draw(n, (heads + kv_heads) * head_dim, dtype=dtype, device=device)
    query, key = both.split([heads * head_dim, kv_heads * head_dim], dim=-1)
    query, key = query.view(n, heads, head_dim), key.view(n, kv_heads, head_dim)
    angle = draw(n, head_dim // 2, dtype=torch.float32, device=device, seed=1).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for found, wanted in zip(rotate(query, key, cos, sin), rotate_reference(query, key, cos, sin), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", [None, 0, 4])
@pytest.mark.parametrize(("n", "heads", "kv_heads", "head_dim"), [(1, 28, 4, 128), (7, 3, 1, 6)])
def test_rotate_into(n, heads, kv_heads, head_dim, slot, dtype, device):
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    joined = draw(n, sum(sizes), dtype=dtype, device=device)
    query, key, value = (part.unflatten(-1, (-1, head_dim)) for part in joined.split(sizes, dim=-1))
    angle = draw(n, head_dim // 2, dtype=torch.float32, device=device, seed=1).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    shape = (n, kv_heads, head_dim) if slot is None else (n, 5, kv_heads, head_dim)
    at = None if slot is None else torch.tensor([slot], dtype=torch.int32, device=device)
    kept = [[torch.full(shape, 9.0, dtype=dtype, device=device) for _ in range(2)] for _ in range(2)]
    found = rotate_into(query, key, value, cos, sin, *kept[0], at)
    assert_close(found, rotate_into_reference(query, key, value, cos, sin, *kept[1], at))
    assert_close(found, rotate_reference(query, key, cos, sin)[0])
    for mine, wanted in zip(*kept, strict=True):
        assert_close(mine, wanted)
        assert (mine == 9.0).sum() == mine.numel() - value.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "heads", "kv_heads", "head_dim"), [(1, 32, 8, 128), (7, 3, 1, 6)])
def test_rotate_into_behind_a_norm_of_every_head(n, heads, kv_heads, head_dim, dtype, device):
    shapes = [(n, heads, head_dim), (n, kv_heads, head_dim), (n, kv_heads, head_dim)]
    query, key, value = (draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes))
    weights = (draw(head_dim, dtype=dtype, device=device, seed=seed) for seed in (3, 4))
    norms = tuple(Norm(weight, 1e-6) for weight in weights)
    angle = draw(n, head_dim // 2, dtype=torch.float32, device=device, seed=5).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    kept = [[torch.empty_like(key), torch.empty_like(value)] for _ in range(2)]
    found = rotate_into(query, key, value, cos, sin, *kept[0], None, norms)
    assert_close(found, rotate_into_reference(query, key, value, cos, sin, *kept[1], None, norms))
    for mine, wanted in zip(*kept, strict=True):
        assert_close(mine, wanted)
    exact = torch.nn.functional.rms_norm(key.double(), (head_dim,), norms[1].weight.double(), 1e-6)
    resolution = 4 * RESOLUTION[dtype]
    wanted = rotate_reference(exact, exact, cos.double(), sin.double())[1]
    torch.testing.assert_close(kept[0][0].double(), wanted, rtol=resolution, atol=resolution)


def test_no_rows(device):
    empty = torch.empty(0, 64, device=device)
    assert rms_norm(empty, torch.ones(64, device=device), 1e-6, None)[0].shape == (0, 64)
    assert swiglu(empty, empty).shape == (0, 64)
    assert rotate(empty.view(0, 4, 16), empty.view(0, 4, 16), empty[:, :16], empty[:, :16])[0].shape == (0, 4, 16)
