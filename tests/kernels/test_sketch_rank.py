"""Ranks of several matrices: both twins against the algorithm's own rank."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels import energy_rank as module
from sparsevlm.kernels.energy_rank import sketch_rank_plain
from sparsevlm.kernels.triton import energy_rank as triton_version
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


def noisy(n_rows, seed=0):
    """A matrix of low rank and noise, a quarter of the energy."""
    columns, low = 3 * n_rows // 2, max(1, n_rows // 6)
    of_low = random(n_rows, low, seed) @ random(low, columns, seed + 1) / low**0.5
    return of_low + 0.577 * random(n_rows, columns, seed + 2)


# Rows that no program holds in registers: between and at the ends of tiles and of sizes.
SIZES_IN_MEMORY = [129, 200, 256, 257, 300, 511, 512, 513, 640, 1000, 1024]
IN_MEMORY = {
    **{f"noise, {n_rows} rows": noisy(n_rows) for n_rows in SIZES_IN_MEMORY},
    "soft, 400 rows": attention_like(400, 500, 0.5),
    "sharp, 700 rows": attention_like(700, 900, 6.0),
    "decaying, 1024 rows": decaying(1024, 1100, 0.995),
    "rank 1, 600 rows": torch.ones(600, 1) @ attention_like(1, 700, 2.0),
    "duplicate rows, 160 rows": attention_like(8, 200, 5.0).repeat(20, 1),
    "rows apart, 130 rows": torch.diag(torch.linspace(1.0, 0.01, 130)),
    "tall, 300 columns": attention_like(700, 300, 2.0),
    "tiny, 150 rows": attention_like(150, 200, 2.0) * 1e-30,
}


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


def test_twin_in_memory(device):
    check_twin(noisy(129), 0.1, device)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("case", IN_MEMORY)
def test_large_twin_in_memory(case, tolerance, device):
    check_twin(IN_MEMORY[case], tolerance, device)


@pytest.fixture
def small_tiles(monkeypatch):
    """Few rows are many: matrices of more than 16 lie in memory, in tiles of one value per thread."""
    small = {"_IN_REGISTERS": 16, "_SIZES": ((16, 4),), "_LARGE_SIZES": ((32, 4, 13), (64, 2, 19))}
    for name, value in {**small, "_TILE_ROWS": 16, "_TILE_COLUMNS": 32}.items():
        monkeypatch.setattr(triton_version, name, value)


OF_FEW_ROWS = {f"noise, {n_rows} rows": noisy(n_rows) for n_rows in (17, 32, 33, 50)}
OF_FEW_ROWS |= {
    f"{case}, large": LARGE[f"{case}, large"] for case in ("rank 1", "duplicate rows", "rows apart", "tall")
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", OF_FEW_ROWS)
def test_twin_in_memory_of_small_tiles(case, device):
    check_twin(OF_FEW_ROWS[case], 0.1, device)


@pytest.mark.usefixtures("small_tiles")
def test_sums_of_equal_values_of_small_tiles(device):
    test_sums_of_equal_values_meet_their_threshold(36, device)


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", [150, 256, 512, 1024])
def test_sums_of_equal_values_meet_their_threshold(n_rows, device):
    assert sketch_rank(torch.eye(n_rows)[None].to(device), 0.5).tolist() == [n_rows // 2]


def check_sizes(capacity, sizes, device, monkeypatch):
    """Of a batch with rows of zeros in between and values that are not finite; what is not written is not read."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(_garbage(options)))
    matrices = torch.zeros(len(sizes) + 2, capacity, capacity + 60)
    for sample, n_rows in enumerate((*sizes, capacity - 1, capacity // 2)):
        generator = torch.Generator().manual_seed(sample)
        rows = torch.randperm(capacity, generator=generator)[:n_rows]
        matrices[sample, rows] = torch.randn(n_rows, capacity + 60, generator=generator)
    for sample, value in ((-2, torch.nan), (-1, torch.inf)):
        broken = matrices[sample].abs().sum(dim=1).argmax()
        matrices[sample, broken, 3] = value
    wanted = [rank.sketch_rank(matrix, 0.1) for matrix in matrices[:-2]]
    assert sketch_rank(matrices.to(device), 0.1).tolist() == [*wanted, -1, -1]


@pytest.mark.usefixtures("small_tiles")
def test_each_matrix_is_taken_by_the_size_of_its_rows(device, monkeypatch):
    check_sizes(36, (34, 5, 0, 16, 17), device, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [140, 300, 600, 1024])
def test_each_large_matrix_is_taken_by_the_size_of_its_rows(capacity, device, monkeypatch):
    check_sizes(capacity, (capacity - 3, 5, 0, 128, 129, capacity), device, monkeypatch)


def _garbage(options):
    return torch.nan if options["dtype"].is_floating_point else 77


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
    assert module.is_quick(matrix, (1024, 4000), 0.1)
    assert module.is_quick(matrix, (4000, 1024), 0.1)
    for shape, tolerance in (((1025, 4000), 0.1), ((0, 1000), 0.1), ((40, 1000), 1e-5), ((40, 1000), "machine")):
        assert not module.is_quick(matrix, shape, tolerance)


def test_ranks_that_decide_come_from_one_call(monkeypatch):
    monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    monkeypatch.setattr(rank, "sketch_rank", lambda *_: pytest.fail("one by one"))
    matrices = [CASES["random"], CASES["rank 1"], CASES["rows apart"]]
    wanted = [sketch_rank_plain(matrix[None], 0.1).item() for matrix in matrices]
    assert rank.sketch_ranks(matrices, 0.1) == wanted
    assert len(set(wanted)) == 3
    matrices[1] = matrices[1] * torch.nan
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        rank.sketch_ranks(matrices, 0.1)
    assert rank.sketch_ranks([], 0.1) == []


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "n_rows"), [(1, 64), (32, 64), (1, 1024), (5, 300)])
def test_nothing_is_waited_for(batch, n_rows, device):
    matrices = torch.stack([attention_like(n_rows, 4096, 1.0 + b % 5) for b in range(batch)]).to(device)
    wanted = sketch_rank_plain(matrices, 0.1)
    module.sketch_rank(matrices, 0.1)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = module.sketch_rank(matrices, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_it_can_be_captured(captured, device):
    matrices = torch.zeros(2, 512, 700, device=device)
    graph, found = captured(sketch_rank, matrices, 0.1)
    for sizes in ((512, 40), (130, 300), (0, 129)):
        matrices.zero_()
        for place, n_rows in zip(matrices, sizes, strict=True):
            place[:n_rows] = random(n_rows, 700).to(device)
        graph.replay()
        assert found.tolist() == sketch_rank_plain(matrices, 0.1).tolist()
