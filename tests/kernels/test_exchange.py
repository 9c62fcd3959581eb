"""Programs that wait for each other's messages, some of which run ahead of others.

In Triton's interpreter, where they would run one after the other, they take turns. A GPU has its own order.
"""

from __future__ import annotations

import pytest
import torch
from taking_turns import TakingTurns, Turns

from sparsevlm.kernels.coverage import coverage_reference
from sparsevlm.kernels.pivoted_cholesky import pivoted_cholesky_reference
from sparsevlm.kernels.triton import coverage, pivoted_cholesky
from sparsevlm.kernels.triton.exchange import share_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
# Programs that may wait for each other, samples and rows: programs of 16 rows or more, some with fewer.
CASES = [(3, 1, 45), (7, 2, 50), (8, 1, 100), (2, 3, 40)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("at_once", "batch", "n"), CASES)
def test_pivots(at_once, batch, n, seed, monkeypatch):
    monkeypatch.setattr(pivoted_cholesky, "_MOST_ALONE", 0)
    turns = TakingTurns(monkeypatch, pivoted_cholesky, at_once, seed)
    generator = torch.Generator().manual_seed(seed)
    rows, quality = torch.randn(batch, n, 60, generator=generator), torch.rand(batch, n, generator=generator)
    given = (rows @ rows.mT, quality, 14, True, 1e-6)
    assert torch.equal(pivoted_cholesky.pivoted_cholesky(*given), pivoted_cholesky_reference(*given))
    assert turns.most_programs > 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("at_once", "batch", "n"), CASES)
def test_coverage(at_once, batch, n, seed, monkeypatch):
    turns = TakingTurns(monkeypatch, coverage, at_once, seed)
    generator = torch.Generator().manual_seed(seed)
    values, factor = torch.randn(batch, n + 3, n, generator=generator), torch.rand(batch, n, generator=generator)
    valid = torch.arange(n) < torch.tensor([n - 9 * b for b in range(batch)])[:, None]
    given = (values, factor, valid, 14, 1e-12)
    assert torch.equal(coverage.coverage(*given), coverage_reference(*given))
    assert turns.most_programs > 1


@pytest.mark.parametrize(
    ("n", "n_samples", "at_once", "wanted"),
    [
        (1, 1, 128, (1, 16)),
        (1024, 1, 128, (64, 16)),
        (4096, 1, 128, (128, 32)),
        (4097, 1, 128, (65, 64)),
        (256, 32, 128, (4, 64)),
        (300, 128, 128, (1, 512)),
    ],
)
def test_programs_share_rows(n, n_samples, at_once, wanted):
    assert share_rows(n, n_samples, at_once) == wanted


def test_turns_end_where_all_wait_for_each_other():
    turns = Turns(2, 0)
    with pytest.raises(AssertionError, match="wait for each other"):
        turns.run([lambda: turns.wait(lambda: False)] * 2)
