"""States of samples: the Triton twin against the plain function."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.take_states import take_states_reference
from sparsevlm.kernels.triton import take_states as triton_module

SHAPES = [
    (1, 9, 20, [9]),
    (4, 6, 33, [6, 0, 3, 1]),
    pytest.param(1, 4096, 3584, [4000], marks=pytest.mark.gpu),
    pytest.param(5, 1024, 4096, [1024, 0, 7, 512, 1], marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "most", "size", "numbers"), SHAPES)
def test_twin(batch, most, size, numbers, dtype, device, monkeypatch):
    """Faults count where a row does, and are not forgotten."""
    if device == "cpu":
        monkeypatch.setattr(triton_module, "_MOST_COLUMNS", 16)
    generator = torch.Generator().manual_seed(most)
    hidden = torch.randn(most + 7, size, generator=generator).to(device, dtype)
    rows = torch.randint(1, most + 7, (batch, most + 4), generator=generator).to(device)[:, :most]
    numbers = torch.tensor(numbers, device=device)
    for place, value, wanted in (
        (None, 0.0, False), (int(numbers[0]) - 1, torch.nan, True), (int(numbers[0]) - 1, -torch.inf, True),
        (int(numbers[0]), torch.nan, False),
    ):  # fmt: skip
        hidden[0] = value
        given = rows.clone()
        if place is not None and place < most:
            given[0, place] = 0
        for before in (False, True):
            flags = [torch.full((1,), before, device=device) for _ in range(2)]
            found = triton_module.take_states(hidden, given, numbers, flags[0])
            expected = take_states_reference(hidden, given, numbers, flags[1])
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found[1], expected[1])
            assert bool(flags[0]) == bool(flags[1]) == (wanted or before)
