"""Tiny models and inputs that every test shares."""

import os
from dataclasses import dataclass

# Before numpy and torch are imported: matrices are small, and threads of tests that run side by side would wait for
# each other. Processes that a test starts take it over.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before transformers imports Triton

from toys import tiny_model


@dataclass(frozen=True)
class Place:
    """Where and in which precision a parity test runs, and how near it has to come (relative error of logits)."""

    device: str
    dtype: torch.dtype
    tolerance: float

    def __str__(self):
        return f"{self.device}-{str(self.dtype).removeprefix('torch.')}"


CPU = Place("cpu", torch.float32, 5e-6)
# Half precision rounds differently where rows are gathered first: measured against the same dtype's masked run.
GPU = [
    Place("cuda", torch.float32, 2e-5),
    Place("cuda", torch.float16, 1e-2),
    Place("cuda", torch.bfloat16, 6e-2),
]


def pytest_addoption(parser):
    parser.addoption("--support-matrix", metavar="FILE", help="CSV file that the rows of the support matrix go to")


def pytest_ignore_collect(collection_path, config):
    """Hundreds of cells are tried by themselves only where their rows are asked for; the oracle combines them."""
    is_matrix = collection_path.name == "test_support_matrix.py"
    return True if is_matrix and config.getoption("--support-matrix") is None else None


def pytest_generate_tests(metafunc):
    """The GPU's places join where there is a GPU; elsewhere they would only be a long list of skips."""
    if "place" in metafunc.fixturenames:
        places = [CPU]
        if torch.cuda.is_available():
            places += [pytest.param(place, marks=pytest.mark.gpu) for place in GPU]
        metafunc.parametrize("place", places, ids=str)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are slower on several, and the tests run in parallel anyway."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """Adapters that a test registers are gone after it."""
    from sparsevlm.models import registry

    monkeypatch.setattr(registry, "_REGISTERED", {})


@pytest.fixture
def model():
    return tiny_model()
