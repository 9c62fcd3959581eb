"""On a GPU the kernels run there; elsewhere in Triton's interpreter, which proves the maths and no more."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def captured():
    """Records a call as a CUDA graph, which one that waits for the device cannot be; returns graph and result."""

    def record(function, *inputs):
        function(*inputs)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*inputs)
        return graph, result

    return record
