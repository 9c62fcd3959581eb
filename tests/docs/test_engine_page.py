"""Numbers that the documents take from the engine's code, and the lines that install torch."""

from __future__ import annotations

import re

import pytest
from documents import DOCUMENTS, ROOT, blocks, name_of, read

from sparsevlm.engine.capacities import capacities, row_capacity
from sparsevlm.engine.text.decode_graph import _MOST_PLAIN_ROWS
from sparsevlm.kernels.skinny_linear import MOST_ROWS

PAGE = " ".join(read(ROOT / "docs" / "engine.md").split())


def test_the_ladder_is_that_of_the_code():
    """A prompt leaves one row empty, a tower none."""
    (rows, n_capacities) = map(
        int, re.findall(r"One sample of up to (\d+) rows needs one of (\d+) capacities", PAGE)[0]
    )
    assert len({row_capacity(n + 1) for n in range(1, rows + 1)}) == n_capacities == len(list(capacities(rows + 1)))
    assert row_capacity(rows + 2) > row_capacity(rows + 1) == rows + 1
    assert f"{rows} rows need the {n_capacities}nd capacity, {rows + 1}, and {rows + 1} rows the 33rd" in PAGE
    assert all(row_capacity(n + 1) - n <= 64 for n in range(1, 1024))
    assert all(row_capacity(n + 1) - n <= n / 8 for n in range(1024, 20000))


def test_the_batches_that_the_fused_kernels_take_are_those_of_the_code():
    assert f'Up to {_MOST_PLAIN_ROWS} samples ({MOST_ROWS} under [`weights="fp8"`]' in PAGE


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_torch_is_not_replaced_by_what_is_installed_next(document):
    """The extras bring torchvision, and that its own torch: it comes with torch, or torch is named again."""
    for block in blocks(document):
        torch, torchvision = False, False
        for line in (line.partition("  #")[0] for line in block.code.splitlines() if "pip install" in line):
            names_torch = '"torch==' in line
            if re.search(r"\[(cli|eval)\]", line):
                assert names_torch or torchvision or not torch, line
            torch, torchvision = torch or names_torch, torchvision or "torchvision" in line
