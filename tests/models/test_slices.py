"""Slices of MiniCPM-V are of the image that stands before them, where the prompt tells."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.models import Tiles, adapter_for
from toys import IMAGE, tiny_model

BEGIN, END, SLICE, SLICE_END, ROW = 71, 72, 73, 74, 75
WHOLE = Tiles(((1, 2, 3), (6, 2, 2)), (False, False), columns=(1, 3))
SIZES = [(2, 3), *[(2, 2)] * 6]


def slice_of(h, w):
    return [SLICE, *[IMAGE] * h * w, SLICE_END]


def image(h, w, rows=(), size=(2, 2)):
    """An image, and its slices by row."""
    parts = [[token for _ in range(n) for token in slice_of(*size)] for n in rows]
    joined = [token for i, part in enumerate(parts) for token in ([ROW] * bool(i) + part)]
    return [BEGIN, *[IMAGE] * h * w, END, *joined]


def layouts_of(rows, sizes):
    adapter = adapter_for(tiny_model("minicpmv4_6"))
    width = max(map(len, rows))
    ids = torch.tensor([[5] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "target_sizes": 4 * torch.tensor(sizes)}
    return adapter.family.layouts(adapter, "image", inputs)


CASES = {
    "rows": ([[1, *image(2, 3, (3, 3)), 2]], SIZES, [WHOLE]),
    "one row": (
        [[1, *image(2, 3, (2,))]],
        SIZES[:3],
        [Tiles(((1, 2, 3), (2, 2, 2)), (False, False), columns=(1, 2))],
    ),
    "one column": (
        [[1, *image(2, 3, (1, 1))]],
        SIZES[:3],
        [Tiles(((1, 2, 3), (2, 2, 2)), (False, False), columns=(1, 1))],
    ),
    "without slices": ([[1, *image(2, 3), *image(1, 1), 2]], [(2, 3), (1, 1)], [(1, 2, 3), (1, 1, 1)]),
    "images of two prompts": (
        [[1, *image(2, 3, (3, 3)), *image(1, 4)], [*image(2, 3, (3, 3)), 2]],
        [*SIZES, (1, 4), *SIZES],
        [WHOLE, (1, 1, 4), WHOLE],
    ),
    "copies": ([[1, *image(2, 3, (3, 3))]] * 3, SIZES, [WHOLE]),
    "a prompt that begins with placeholders": ([image(2, 3, (2,))[1:]], SIZES[:3], [(1, 2, 3), (1, 2, 2), (1, 2, 2)]),
    "slices of several sizes": (
        [[1, *image(2, 3), *slice_of(2, 2), *slice_of(1, 2)]],
        [(2, 3), (2, 2), (1, 2)],
        [(1, 2, 3), (1, 2, 2), (1, 1, 2)],
    ),
    "fewer placeholders than slices": ([[1, *image(2, 3)]], SIZES[:2], [(1, 2, 3), (1, 2, 2)]),
    "no placeholders": ([[1, 2, 3]], SIZES[:1], [(1, 2, 3)]),
}


@pytest.mark.parametrize("case", CASES)
def test_layouts(case):
    rows, sizes, wanted = CASES[case]
    assert layouts_of(rows, sizes) == wanted


def test_an_image_is_one_image():
    """Of two, with slices and without, each keeps its least."""
    model = tiny_model("minicpmv4_6")
    rows = [1, 2, *image(2, 2, (2, 2)), 3, *image(2, 2), 4, 5]
    sizes = torch.full((6, 2), 8)
    inputs = {"input_ids": torch.tensor([rows]), "target_sizes": sizes, "pixel_values": torch.randn(1, 3, 4, 6 * 256)}
    state = apply_sparsevlm(model, keep=0.4, min_keep=1, min_keep_per_image=2, target_layers=[1])
    model.generate(**inputs, max_new_tokens=1, num_beams=2)
    (sample, _) = state.report.samples
    assert sample.images == (20, 4)
    assert sample.views == (((1, 1, 2, 2), (2, 2, 2, 2)), ())
    assert len(sample.stages[0].per_image) == 2
