"""What is measured: cases by their names, and requests of mixed shapes."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.bench.cases import CORE, FULL, Case, MixedCase, PictureCase, like_sized, named_cases, size_class
from sparsevlm.bench.workload import fresh_inputs
from toys import tiny_model


def test_cases():
    assert len({case.name for case in FULL}) == len(FULL)
    assert set(CORE) < set(FULL)
    assert all(case.grid == (case.n_visual**0.5,) * 2 for case in FULL if isinstance(case, Case))
    names = ("v256-b1-n64", "picture896-b1-n1", "mixed200", "mixed24")
    assert named_cases(names, full=False) == (Case(256, 1, 64), PictureCase(896), MixedCase(200), MixedCase(24))
    assert named_cases(None, full=False) == CORE
    assert PictureCase(896).n_visual == 1024
    with pytest.raises(ValueError, match="there is no case v7"):
        named_cases(("v7",), full=True)
    assert named_cases(("v2048-b2-n3",), full=False) == (Case(2048, 2, 3),)
    with pytest.raises(
        ValueError, match=r"there is no case v0-b1-n1, v16-b1-n0; there are v256-b1-n1, .*and any other v<"
    ):
        named_cases(("v0-b1-n1", "v64-b1-n1", "v16-b1-n0"), full=True)


def test_images_are_as_near_to_squares_as_their_tokens_allow():
    grids = {n: Case(n, 1, 1).grid for n in (1, 15, 100, 1152, 2048, 2047)}
    assert Case(2047, 2, 3).of_one_image.name == "v2025-b2-n3"
    assert grids == {1: (1, 1), 15: (3, 5), 100: (10, 10), 1152: (32, 36), 2048: (32, 64), 2047: (45, 45)}


def test_no_mixed_request_is_repeated_and_the_warmup_has_seen_none():
    case = MixedCase(200)
    requests, warmup = case.requests(3), case.warmup_requests(3)
    assert len({request.grid for request in requests}) == 200
    assert not {request.grid for request in requests} & {request.grid for request in warmup}
    for request in (*requests, *warmup):
        (height, width), n_text = request.grid, request.n_text
        assert height * width == request.n_visual
        assert 200 <= request.n_visual <= 4000
        assert 20 <= n_text <= 200
        assert max(height, width) <= 2 * min(height, width)
    warm = [size_class(request) for request in warmup]
    assert len(set(warm)) == len(warm) > 25  # one of each class
    assert case.requests(3) == requests
    assert case.requests(4) != requests
    below = sum(request.n_visual < 900 for request in requests)  # the middle, on a logarithmic scale
    assert 70 < below < 130


def test_requests_of_like_size():
    """Classes begin at 98.7, 107.6, 117.4, 128 tokens and so on; those of fewer than three join the next larger."""
    sizes = [100, 400, 108, 100, 110, 120, 105, 121, 3000]
    requests = [Case(size - 50, 1, 1, n_text=50) for size in sizes]
    assert [size_class(requests[i]) for i in (0, 6, 2, 5)] == [53, 53, 54, 55]
    groups = [sorted(sizes[i] for i in group) for group in like_sized(requests, 3)]
    assert groups == [[100, 100, 105], [108, 110, 120, 121, 400, 3000]]
    assert sorted(i for group in like_sized(requests, 3) for i in group) == list(range(9))
    assert like_sized(requests[:1], 3) == [[0]]


def test_inputs_of_an_image_that_is_no_square():
    model = tiny_model()
    inputs = fresh_inputs(model, Case(15, 1, 1, n_text=30, height=3), torch.Generator().manual_seed(0))
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 10]]
    assert inputs["input_ids"].shape == (1, 45)
    assert model(**inputs).logits.shape[1] == 45
