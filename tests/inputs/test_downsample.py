"""Smaller pictures: counts and shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from sparsevlm.inputs.downsample import downsampled, fitting_grid, visual_tokens

PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})


def grids(images):
    return [(image.height // 28, image.width // 28) for image in images]


@pytest.mark.parametrize(
    ("size", "keep", "expected"),
    [
        ((448, 448), 0.5, (11, 11)),
        ((448, 448), 0.37, (9, 10)),
        ((448, 448), 0.25, (8, 8)),
        ((448, 448), 64, (8, 8)),
        ((560, 336), 0.5, (8, 15)),
        ((336, 560), 0.5, (15, 8)),
        ((450, 440), 0.25, (8, 8)),
        ((448, 448), 1.0, (16, 16)),
        ((448, 448), 300, (16, 16)),
    ],
)
def test_one_picture(size, keep, expected):
    (small,) = downsampled(PROCESSOR, [Image.new("RGB", size)], keep)
    assert grids([small]) == [expected]
    assert visual_tokens(PROCESSOR, small) == expected[0] * expected[1]


def test_several_pictures_share_the_budget():
    images = [Image.new("RGB", (448, 448)), Image.new("RGB", (224, 224))]
    assert grids(downsampled(PROCESSOR, images, 80)) == [(8, 8), (4, 4)]


def test_the_lower_bound_of_the_processor_shows():
    (small,) = downsampled(PROCESSOR, [Image.new("RGB", (84, 84))], 0.2)
    assert small.size == (28, 28)
    assert visual_tokens(PROCESSOR, small) == 4


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(1, 2000))
def test_a_grid_fits_its_budget_and_its_aspect(height, width, budget):
    rows, columns = fitting_grid(height, width, budget)
    assert 1 <= rows * columns <= budget + 1e-9
    ideal = (budget * height / width) ** 0.5, (budget * width / height) ** 0.5
    if min(ideal) >= 1:
        assert abs(rows - ideal[0]) <= 1
        assert abs(columns - ideal[1]) <= 1
