"""Products of all pairs: the split against float64."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.gram_matrix import gram_matrix, gram_matrix_split


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
