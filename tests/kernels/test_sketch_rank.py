"""Ranks of several matrices: both twins against the algorithm's own rank."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels import energy_rank as module
from sparsevlm.kernels.energy_rank import sketch_rank_plain
from sparsevlm.kernels.triton.energy_rank import sketch_rank
from sparsevlm.selection import rank

TOLERANCES = [0.3, 0.1, 0.01, 1e-4]
OF_TWINS = [0.1, 1e-4, *(pytest.param(tolerance, marks=pytest.mark.gpu) for tolerance in (0.3, 0.01))]
# A share of the energy as near to the threshold may fall on either side.
OPEN = 1e-5


def random(n_rows, n_columns, seed=0):
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))


def attention_like(n_rows, n_columns, sharpness):
    return (random(n_rows, n_columns) * sharpness).softmax(dim=-1)


def decaying(n_rows, n_columns, base):
    left, right = torch.linalg.qr(random(n_rows, n_rows))[0], torch.linalg.qr(random(n_columns, n_rows, seed=1))[0]
    return (left * base ** torch.arange(n_rows)) @ right.T


# Triton's interpreter takes seconds for a large matrix: what a kernel does with small ones is tested everywhere.
CASES = {
    "random": random(6, 60),
    "soft": attention_like(7, 50, 0.5),
    "sharp": attention_like(16, 70, 6.0),  # as long as the kernel's block
    "decaying fast": decaying(8, 30, 0.3),
    "decaying slowly": decaying(18, 40, 0.97),
    "low rank": random(8, 3) @ random(3, 40, seed=1),
    "rank 1": torch.ones(5, 1) @ attention_like(1, 30, 2.0),
    "duplicate rows": attention_like(3, 40, 5.0).repeat(2, 1),
    "equal values": torch.eye(6, 20),
    "rows apart": torch.diag(torch.linspace(1.0, 0.01, 7)),
    "tall": attention_like(60, 5, 2.0),
    "tiny": attention_like(6, 40, 2.0) * 1e-30,
    "one row": attention_like(1, 30, 1.0),
    "two rows": attention_like(2, 30, 1.0),
    "one value": torch.full((1, 1), 0.3),
    "zero": torch.zeros(5, 12),
}
LARGE = {
    "random, large": random(40, 200),
    "soft, large": attention_like(33, 150, 0.5),
    "sharp, large": attention_like(64, 300, 6.0),
    "decaying fast, large": decaying(30, 90, 0.3),
    "decaying slowly, large": decaying(64, 100, 0.97),
    "low rank, large": random(50, 4) @ random(4, 120, seed=1),
    "rank 1, large": torch.ones(20, 1) @ attention_like(1, 80, 2.0),
    "duplicate rows, large": attention_like(8, 100, 5.0).repeat(5, 1),
    "equal values, large": torch.eye(40, 60),
    "rows apart, large": torch.diag(torch.linspace(1.0, 0.01, 24)),
    "tall, large": attention_like(200, 17, 2.0),
}
ALL = CASES | LARGE


def allowed(matrix, tolerance):
    """The truth, and the ranks between which it would move if the threshold did."""
    truth = rank.sketch_rank(matrix, tolerance)
    low, high = (rank.sketch_rank(matrix, tolerance + shift) for shift in (OPEN, -OPEN))
    return truth, range(low, high + 1)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("case", ALL)
def test_the_plain_function_is_the_algorithms_own(case, tolerance, device):
    matrix = ALL[case]
    assert sketch_rank_plain(matrix[None].to(device), tolerance).tolist() == [rank.sketch_rank(matrix, tolerance)]


@pytest.mark.parametrize("tolerance", OF_TWINS)
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in LARGE)])
def test_twin(case, tolerance, device):
    check_twin(ALL[case], tolerance, device)


def test_twin_in_the_widest_block_of_few_warps(device):
    check_twin(LARGE["soft, large"], 0.1, device)


def check_twin(matrix, tolerance, device):
    truth, near = allowed(matrix, tolerance)
    (found,) = sketch_rank(matrix[None].to(device), tolerance).tolist()
    assert found == truth if len(near) == 1 else found in near


def together(matrices):
    height, width = (max(matrix.shape[side] for matrix in matrices) for side in (0, 1))
    padded = torch.zeros(len(matrices), height, width)
    for place, matrix in zip(padded, matrices, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def test_samples_of_a_batch_do_not_see_each_other(device):
    broken, endless = attention_like(6, 40, 1.0), attention_like(6, 40, 1.0)
    broken[3, 5], endless[3, 5] = torch.nan, torch.inf
    matrices = [CASES["soft"], broken, CASES["one row"], endless, CASES["zero"], CASES["rows apart"]]
    wanted = [rank.sketch_rank(matrix, 0.1) if matrix.isfinite().all() else -1 for matrix in matrices]
    for ranks in (sketch_rank_plain, sketch_rank):
        found = ranks(together(matrices).to(device), 0.1)
        assert found.dtype == torch.int64
        assert found.tolist() == wanted


@pytest.mark.parametrize(
    "case",
    [
        "soft", "rows apart",
        *(pytest.param(f"{case}, large", marks=pytest.mark.gpu) for case in ("soft", "decaying slowly", "rows apart")),
    ],
)  # fmt: skip
def test_what_is_just_beyond_the_threshold_counts(case, device):
    matrix = ALL[case]
    energy = torch.linalg.svdvals(matrix.double()).square()
    shares = (energy.cumsum(0) / energy.sum()).tolist()
    for r in (1, 3, len(shares) // 2):
        for shift, wanted in ((2 * OPEN, r), (-2 * OPEN, r + 1)):
            tolerance = 1 - shares[r - 1] + shift
            assert rank.sketch_rank(matrix, tolerance) == wanted
            assert sketch_rank(matrix[None].to(device), tolerance).tolist() == [wanted]


def test_the_cases_are_far_from_their_thresholds():
    """So that the twins are compared strictly nearly everywhere."""
    strict = [len(allowed(matrix, tolerance)[1]) == 1 for matrix in ALL.values() for tolerance in TOLERANCES]
    assert sum(strict) >= 0.8 * len(strict)


@pytest.mark.parametrize("case", ["soft", "low rank", "duplicate rows", "zero"])
def test_the_numerical_rank(case):
    matrix = CASES[case]
    assert module.sketch_rank(matrix[None], "machine").tolist() == [rank.sketch_rank(matrix, "machine")]


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_has_no_rank(shape):
    assert module.sketch_rank(torch.zeros(shape), 0.1).tolist() == [0] * shape[0]


def test_which_are_quick(monkeypatch):
    matrix = torch.zeros(1)
    assert not module.is_quick(matrix, (40, 1000), 0.1)
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    assert module.is_quick(matrix, (128, 1000), 0.1)
    assert module.is_quick(matrix, (1000, 128), 0.1)
    for shape, tolerance in (((129, 1000), 0.1), ((0, 1000), 0.1), ((40, 1000), 1e-5), ((40, 1000), "machine")):
        assert not module.is_quick(matrix, shape, tolerance)


def test_ranks_that_decide_come_from_one_call(monkeypatch):
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    monkeypatch.setattr(rank, "sketch_rank", lambda *_: pytest.fail("one by one"))
    matrices = [CASES["random"], CASES["rank 1"], CASES["rows apart"]]
    wanted = [sketch_rank_plain(matrix[None], 0.1).item() for matrix in matrices]
    assert rank.sketch_ranks(matrices, 0.1) == wanted
    assert len(set(wanted)) == 3
    matrices[1] = matrices[1] * torch.nan
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        rank.sketch_ranks(matrices, 0.1)
    assert rank.sketch_ranks([], 0.1) == []


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32])
def test_nothing_is_waited_for(batch, device):
    matrices = torch.stack([attention_like(64, 4096, 1.0 + b % 5) for b in range(batch)]).to(device)
    wanted = sketch_rank_plain(matrices, 0.1)
    module.sketch_rank(matrices, 0.1)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = module.sketch_rank(matrices, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, wanted)
