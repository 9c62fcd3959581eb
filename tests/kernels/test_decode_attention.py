"""Decode attention over ragged caches: the Triton twin against the plain function, which is torch's own attention."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.attention import RaggedCache, decode_attention_reference
from sparsevlm.kernels.triton.attention import decode_attention

RESOLUTION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


# Heads, those of keys, and their size: small ones in Triton's interpreter, those of a model on a GPU.
SIZES = [(4, 2, 16), pytest.param((28, 4, 128), marks=pytest.mark.gpu)]


def make(lengths, room, n_new, heads=28, kv_heads=4, head_dim=128, dtype=torch.float32, device="cpu", spare=3):
    generator = torch.Generator().manual_seed(sum(lengths) + n_new)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    rows = sum(lengths) + spare
    cache = RaggedCache(
        draw(rows, kv_heads, head_dim), draw(rows, kv_heads, head_dim), cu_seqlens,
        draw(len(lengths), room, kv_heads, head_dim), draw(len(lengths), room, kv_heads, head_dim),
        torch.tensor([n_new], dtype=torch.int32, device=device),
    )  # fmt: skip
    # What must not be read would show.
    cache.prompt_keys[sum(lengths) :] = cache.prompt_values[sum(lengths) :] = torch.nan
    cache.new_keys[:, n_new:] = cache.new_values[:, n_new:] = torch.nan
    return draw(len(lengths), heads, head_dim), cache


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize(
    ("lengths", "room", "n_new"),
    [((1,), 4, 1), ((15, 63, 0, 130), 70, 66), ((577,), 1, 1), ((300, 5), 200, 129)],
)
def test_twin(lengths, room, n_new, dtype, sizes, device):
    query, cache = make(lengths, room, n_new, *sizes, dtype=dtype, device=device)
    found = decode_attention(query, cache, 0.1)
    wanted = decode_attention_reference(query, cache, 0.1)
    torch.testing.assert_close(found, wanted, rtol=RESOLUTION[dtype], atol=RESOLUTION[dtype])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (4, 4, 64), (6, 2, 20), (16, 1, 80)])
def test_shapes(heads, kv_heads, head_dim, device):
    query, cache = make((33, 140), 9, 5, heads, kv_heads, head_dim, device=device)
    found = decode_attention(query, cache, head_dim**-0.5)
    torch.testing.assert_close(found, decode_attention_reference(query, cache, head_dim**-0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize("length", [4097, 16384])
def test_long(length, dtype, device):
    query, cache = make((length, 63), 64, 7, dtype=dtype, device=device)
    found = decode_attention(query, cache, 0.09)
    wanted = decode_attention_reference(query, cache, 0.09)
    torch.testing.assert_close(found, wanted, rtol=RESOLUTION[dtype], atol=RESOLUTION[dtype])


def test_the_plain_function_is_softmax_attention():
    query, cache = make((9, 4), 6, 3, heads=4, kv_heads=2, head_dim=8)
    for b, rows in enumerate((slice(0, 9), slice(9, 13))):
        key = torch.cat([cache.prompt_keys[rows], cache.new_keys[b, :3]]).transpose(0, 1)
        value = torch.cat([cache.prompt_values[rows], cache.new_values[b, :3]]).transpose(0, 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query[b][None, :, None], key[None], value[None], scale=0.3, enable_gqa=True
        )
        found = decode_attention_reference(query, cache, 0.3)[b]
        torch.testing.assert_close(found, wanted[0, :, 0], rtol=1e-5, atol=1e-6)
