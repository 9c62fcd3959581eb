"""Linear layers of a few rows: the Triton twin against the plain function, which is torch's own linear layer."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.elementwise import rms_norm_reference, swiglu_reference
from sparsevlm.kernels.skinny_linear import (
    FLOAT8,
    LinearWeights,
    Norm,
    check_float8,
    round_to_float8,
    skinny_linear_reference,
)

pytest.importorskip("triton")
from sparsevlm.kernels.triton import dependent_launch
from sparsevlm.kernels.triton.skinny_linear import Tiles, skinny_linear, tiles_for

RESOLUTION = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Products of bfloat16 are wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# The matrix units of Triton's interpreter take 16 inputs at least.
SMALL = [Tiles(8, 32, 1, 1), Tiles(16, 16, 3, 1, 2)]


@pytest.fixture(autouse=True)
def _what_is_not_written_shows(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))


def draw(*shape, dtype, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def to_float8(weight):
    rounded = torch.zeros(weight.shape, dtype=FLOAT8, device=weight.device)
    scale = torch.full(weight.shape[:1], torch.nan, device=weight.device)
    round_to_float8(weight, rounded, scale)
    return rounded, scale


def make(n, n_out, n_in, dtype, device, float8=False, bias=True):
    weight = draw(n_out, n_in, dtype=dtype, device=device) / n_in**0.5
    scale = None
    if float8:
        weight, scale = to_float8(weight)
    shift = draw(n_out, dtype=dtype, device=device, seed=1) if bias else None
    return draw(n, n_in, dtype=dtype, device=device, seed=2), LinearWeights(weight, shift, scale)


def assert_close(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    resolution = RESOLUTION[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=resolution, atol=4 * resolution)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 16])
@pytest.mark.parametrize("tiles", SMALL, ids=["whole", "parts"])
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), [(40, 72), (14, 200)])
def test_twin(n_out, n_in, float8, tiles, n, dtype, device):
    x, weights = make(n, n_out, n_in, dtype, device, float8)
    norm = Norm(draw(n_in, dtype=dtype, device=device, seed=3), 1e-6)
    for gated in (False, True):
        residual = draw(n, n_out // 2 if gated else n_out, dtype=dtype, device=device, seed=4)
        found = skinny_linear(x, weights, norm, residual, gated, tiles)
        assert_close(found, skinny_linear_reference(x, weights, norm, residual, gated))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tiles", SMALL, ids=["whole", "parts"])
def test_nothing_but_the_product(tiles, n, device):
    x, weights = make(n, 24, 48, torch.float32, device, bias=False)
    wanted = torch.nn.functional.linear(x, weights.weight)
    assert_close(skinny_linear(x, weights, None, None, False, tiles), wanted)


@pytest.mark.parametrize("n", [1, 3])
def test_rows_that_lie_apart(n, device):
    """As those of a weight that is a view of a wider tensor; inputs may, too."""
    x, weights = make(n, 24, 64, torch.float32, device)
    x, weight = x[:, 16:64], weights.weight[:, :48]
    assert not weight.is_contiguous()
    found = skinny_linear(x, LinearWeights(weight), None, None, False, SMALL[0])
    assert_close(found, torch.nn.functional.linear(x, weight))


def test_parts_are_added_in_the_same_order(device):
    x, weights = make(4, 40, 300, torch.float32, device)
    first = skinny_linear(x, weights, None, None, False, Tiles(16, 16, 8, 1, 2))
    for _ in range(3):
        assert torch.equal(skinny_linear(x, weights, None, None, False, Tiles(16, 16, 8, 1, 2)), first)


def test_more_rows_are_not_for_this_kernel(device):
    x, weights = make(17, 8, 16, torch.float32, device)
    with pytest.raises(ValueError, match="at most 16 rows, got 17"):
        skinny_linear(x, weights, None, None, False)


@pytest.mark.parametrize("n_rows", [1, 2, 16])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_default_tiles_fit_every_shape(n_rows, itemsize):
    for n_products in (1, 64, 3584, 152064):
        for n_in in (1, 64, 3584, 18944):
            tiles = tiles_for(n_rows, n_products, n_in, itemsize)
            assert 1 <= tiles.n_parts <= 8
            assert tiles.block_k % (16 // itemsize) == 0
            assert tiles.n_parts == 1 or tiles.n_parts * tiles.block_k < n_in


# Of a decoder of seven billion weights.
SHAPES = [(4608, 3584, False), (3584, 3584, False), (37888, 3584, True), (3584, 18944, False), (152064, 3584, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(("n_out", "n_in", "gated"), SHAPES)
def test_shapes_of_a_model(n_out, n_in, gated, float8, n, dtype, device):
    x, weights = make(n, n_out, n_in, dtype, device, float8)
    norm = Norm(draw(n_in, dtype=dtype, device=device, seed=3), 1e-6)
    residual = draw(n, n_out // 2 if gated else n_out, dtype=dtype, device=device, seed=4)
    wanted = skinny_linear_reference(x, weights, norm, residual, gated)
    assert_close(skinny_linear(x, weights, norm, residual, gated), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("n_parts", [1, 4])
def test_kernels_that_begin_early_wait_for_their_inputs(n_parts, n, device, monkeypatch):
    """A chain in which each reads what the one before has written, recorded, gives the same bits as one by one."""
    x, weights = make(n, 2048, 2048, torch.bfloat16, device)
    norm = Norm(draw(2048, dtype=x.dtype, device=device, seed=3), 1e-6)
    tiles = Tiles(8, 1024, n_parts, 4) if n == 1 else Tiles(64, 128, n_parts, 4, 4)

    def chain():
        rows = x
        for _ in range(40):
            rows = skinny_linear(rows, weights, norm, rows, False, tiles)
        return rows

    monkeypatch.setattr(dependent_launch, "ENABLED", False)
    wanted = chain()
    monkeypatch.setattr(dependent_launch, "ENABLED", True)
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(20):
        found.fill_(torch.nan)
        graph.replay()
        assert torch.equal(found, wanted)


def test_the_plain_function_is_a_linear_layer():
    x, weights = make(3, 8, 16, torch.float32, "cpu")
    norm, residual = (
        Norm(draw(16, dtype=torch.float32, device="cpu", seed=3), 1e-5),
        draw(3, 4, dtype=x.dtype, device="cpu"),
    )
    normed = rms_norm_reference(x, norm.weight, norm.eps, None)[0]
    gate, up = torch.nn.functional.linear(normed, weights.weight, weights.bias).split(4, dim=-1)
    wanted = swiglu_reference(gate, up) + residual
    assert torch.equal(skinny_linear_reference(x, weights, norm, residual, True), wanted)


def test_float8_is_the_product_with_what_its_numbers_stand_for():
    x, weights = make(3, 8, 16, torch.float32, "cpu", float8=True)
    wanted = torch.nn.functional.linear(x, weights.weight.float() * weights.scale[:, None], weights.bias)
    torch.testing.assert_close(skinny_linear_reference(x, weights, None, None, False), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_float8(dtype):
    """Within a 16th of each number; those below 2⁻⁶ of float8's range to its smallest step."""
    weight = draw(5000, 33, dtype=dtype, device="cpu") * torch.logspace(-3, 1, 5000)[:, None].to(dtype)
    weight[7] = 0.0
    rounded, scale = to_float8(weight)
    back = rounded.float() * scale[:, None]
    assert torch.equal(back[7], torch.zeros(33))
    highest = weight.float().abs().amax(dim=1)
    torch.testing.assert_close(back.abs().amax(dim=1), highest, rtol=1e-6, atol=0)
    bound = torch.maximum(weight.float().abs() / 16, scale[:, None] * 2.0**-10)
    assert ((back - weight.float()).abs() <= bound * 1.0001).all()


@pytest.mark.parametrize(("capability", "reads"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_that_read_float8(capability, reads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_float8(torch.device("cpu"))
    if reads:
        check_float8(torch.device("cuda", 0))
        return
    with pytest.raises(NotImplementedError, match=rf"8\.9 \(Ada\) or newer; this one has 8\.{capability[1]}"):
        check_float8(torch.device("cuda", 0))
