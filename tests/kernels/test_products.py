"""Products of all pairs: the split against float64."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.gram_matrix import gram_matrix, gram_matrix_split, split_reference
from sparsevlm.kernels.triton import gram_matrix as triton_module


@pytest.mark.parametrize(("batch", "n", "size"), [(1, 1, 1), (2, 15, 63), (1, 577, 3584)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_close_to_exact(batch, n, size, scale, device):
    rows = scale * torch.randn(batch, n, size, generator=torch.Generator().manual_seed(n)).to(device)
    exact = rows.double() @ rows.double().mT
    lengths = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    for found in (gram_matrix(rows), gram_matrix_split(rows, rows)):
        assert found.dtype == torch.float32
        assert ((found - exact).abs() <= 2e-5 * lengths[..., None] * lengths[..., None, :]).all()


@pytest.mark.parametrize(("n", "n_others"), [(1, 9), (40, 17)])
def test_products_with_other_rows(n, n_others, device):
    generator = torch.Generator().manual_seed(n)
    rows, others = (torch.randn(2, count, 63, generator=generator).to(device) for count in (n, n_others))
    exact = rows.double() @ others.double().mT
    lengths = rows.double().norm(dim=-1)[..., None] * others.double().norm(dim=-1)[..., None, :]
    for found in (gram_matrix(rows, others), gram_matrix_split(rows, others)):
        assert found.dtype == torch.float32
        assert ((found - exact).abs() <= 2e-5 * lengths).all()


def test_equal_rows_have_equal_products(device):
    rows = torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(0)).expand(1, 40, 100).contiguous().to(device)
    found = gram_matrix_split(rows, rows)
    assert (found == found[0, 0, 0]).all()


@pytest.mark.parametrize(
    ("batch", "n", "n_others", "size"),
    [(1, 1, 3, 1), (3, 15, 4, 40), pytest.param(2, 4096, 577, 3584, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_parts_are_those_of_the_plain_function(batch, n, n_others, size, scale, device, monkeypatch):
    """To the last bit on a GPU, halfway cases among them; Triton's interpreter cuts off where a GPU rounds."""
    if device == "cpu":
        monkeypatch.setattr(triton_module, "_MOST_COLUMNS", 16)
    generator = torch.Generator().manual_seed(n)
    rows, others = (scale * torch.randn(batch, count, size, generator=generator) for count in (n, n_others))
    rows[0, 0, 0], others[0, 0, 0] = 1 + 2.0**-8, 1 + 3 * 2.0**-8
    rows, others = rows.to(device), others.to(device)
    for one, other in ((rows, rows), (rows, others)):
        found = triton_module.split(one, other)
        if device == "cuda":
            assert all(map(torch.equal, found, split_reference(one, other)))
        left, right = (part.float().unflatten(-1, (3, size)).unbind(-2) for part in found)
        assert torch.equal(left[0], left[1])
        assert torch.equal(right[0], right[2])
        torch.testing.assert_close(left[0] + left[2], one, rtol=2.0**-14, atol=0)
        torch.testing.assert_close(right[0] + right[1], other, rtol=2.0**-14, atol=0)
        assert torch.equal(left[0], left[0].bfloat16().float())
        assert (left[2].abs() <= 2.0**-7 * left[0].abs()).all()
