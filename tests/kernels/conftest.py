"""On a GPU the kernels run there; elsewhere in Triton's interpreter, which proves the maths and no more."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
