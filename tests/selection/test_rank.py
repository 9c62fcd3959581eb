"""The sketch rank is the SVD's energy rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.selection import rank
from sparsevlm.selection.rank import sketch_rank


def svd_rank(matrix, tolerance):
    """Smallest r with (1 − tolerance) of the energy, by the singular values."""
    energy = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    if energy.sum() == 0:
        return 0
    return int(np.searchsorted(np.cumsum(energy), (1 - tolerance) * energy.sum() * (1 - 1e-12)) + 1)


def attention_like(n_rows, n_columns, sharpness, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n_rows, n_columns, generator=generator) * sharpness).softmax(-1)


def one_hot(n_rows, n_columns):
    matrix = torch.zeros(n_rows, n_columns)
    matrix[torch.arange(n_rows), torch.arange(n_rows) % n_columns] = 1.0
    return matrix


def low_rank(n_rows, n_columns, r):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n_rows, r, generator=generator) @ torch.rand(r, n_columns, generator=generator)


CASES = {
    "soft": attention_like(40, 256, 0.5),
    "sharp": attention_like(40, 256, 8.0),
    "wide": attention_like(300, 700, 4.0),
    "tall": attention_like(700, 300, 4.0),
    "rank 1": torch.ones(300, 5) @ torch.rand(5, 400),
    "low rank, large": low_rank(400, 500, 7),
    "full rank": torch.eye(350),
    "scaled identity": torch.diag(torch.linspace(1.0, 0.01, 320)),
    "repeated rows": attention_like(10, 300, 6.0).repeat(40, 1),
    "one-hot rows": one_hot(300, 400),
    "one-hot rows, few columns": one_hot(400, 3),
    "fp16 underflow": (attention_like(30, 400, 2.0) * 1e-6).half().float(),
    "denormal": attention_like(30, 300, 2.0) * 1e-30,
    "one row": attention_like(1, 50, 1.0),
    "zero": torch.zeros(5, 6),
    "a direction orthogonal to the cosine basis": torch.diag(torch.cat([torch.ones(299) * 1e-3, torch.ones(1)])),
}


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("case", CASES)
def test_equals_svd(case, tolerance):
    assert sketch_rank(CASES[case], tolerance) == svd_rank(CASES[case], tolerance)


def test_large_low_rank_is_answered_by_the_sketch_itself(monkeypatch):
    matrix = low_rank(400, 500, 7)
    wanted = svd_rank(matrix, 0.01)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda *_: pytest.fail("fell back to all eigenvalues"))
    assert sketch_rank(matrix, 0.01) == wanted


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(1, 400), n_columns=st.integers(1, 400), sharpness=st.floats(0.0, 20.0), seed=st.integers(0, 99)
)
def test_equals_svd_on_random_attention(n_rows, n_columns, sharpness, seed):
    matrix = attention_like(n_rows, n_columns, sharpness, seed)
    assert sketch_rank(matrix, 0.02) == svd_rank(matrix, 0.02)


@pytest.mark.parametrize("case", ["soft", "sharp", "rank 1", "full rank", "one-hot rows, few columns", "repeated rows"])
def test_machine_tolerance_is_the_numerical_rank(case):
    matrix = CASES[case]
    cutoff = max(matrix.shape) * torch.finfo(torch.float32).eps
    assert sketch_rank(matrix, "machine") == int(torch.linalg.matrix_rank(matrix.double(), rtol=cutoff))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tolerance", [0.02, "machine"])
def test_nan_is_refused(value, tolerance):
    matrix = torch.rand(5, 9)
    matrix[2, 3] = value
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        sketch_rank(matrix, tolerance)


def test_deterministic():
    assert len({sketch_rank(CASES["wide"], 0.05) for _ in range(5)}) == 1


def test_certificate_never_guesses():
    gram = torch.eye(400, dtype=torch.float64)
    assert rank._certified_rank(gram, 0.9 * 400) is None


def of_spectrum(values, seed):
    """A Gram matrix of these eigenvalues, in a basis drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return basis * values @ basis.T


def test_a_rough_sketch_answers_right_or_not_at_all(monkeypatch):
    """After one step the Ritz values are too small: sums just above a threshold are found below it."""
    monkeypatch.setattr(rank, "_POWER_STEPS", 1)
    gram = of_spectrum(0.9 ** torch.arange(300, dtype=torch.float64), seed=0)
    sums = torch.linalg.eigvalsh(gram).flip(0).cumsum(dim=0)
    n_answers = 0
    for count in range(2, 60, 3):
        for share in (1e-3, 1e-5, 1e-7):
            wanted = float(sums[count - 1]) * (1 - share)
            answer = rank._certified_rank(gram, wanted)
            assert answer in (None, count)
            n_answers += answer is not None
    assert 10 < n_answers < 50


def test_a_sketch_does_not_answer_where_it_may_have_missed_a_direction():
    """Of two equal directions outside of the cosine basis the largest row adds one: their sum."""
    n = 300
    grid, frequencies = torch.arange(n, dtype=torch.float64) + 0.5, torch.arange(n, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cos(torch.pi / n * grid[:, None] * frequencies)).Q
    values = torch.zeros(n, dtype=torch.float64)
    values[:64], values[100], values[200] = 0.02, 1.0, 1.0
    gram = basis * values @ basis.T
    assert rank._certified_rank(gram, 1.51) is None  # 1 + 26 · 0.02 is found, 1 + 1 is there
    assert rank._count_to(torch.linalg.eigvalsh(gram).flip(0), 1.51) == 2


def test_equal_values_meet_a_threshold_exactly():
    assert sketch_rank(torch.eye(10), 0.7) == 3  # (1 - 0.7) · 10 = 3.0000000000000004


def test_the_numerical_rank_goes_by_the_longer_side():
    matrix = torch.zeros(2, 1000)
    matrix[0, 0], matrix[1, 1] = 1.0, 1e-5  # between 2 and 1000 times the resolution of float32
    assert sketch_rank(matrix, "machine") == sketch_rank(matrix.T, "machine") == 1
    matrix[1, 1] = 1e-3
    assert sketch_rank(matrix, "machine") == 2
