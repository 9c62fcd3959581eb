"""Tiny models and inputs that every test shares."""

import gc
import os

# Before numpy and torch are imported: matrices are small, and threads of tests that run side by side would wait for
# each other. Processes that a test starts take it over.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before transformers imports Triton

from interpreter import quicken
from places import CPU, GPU
from toys import tiny_model

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()


def pytest_addoption(parser):
    parser.addoption("--support-matrix", metavar="FILE", help="CSV file that the rows of the support matrix go to")
    parser.addoption("--screenshot", metavar="FILE", help="PNG file that the screenshot of the page goes to")
    parser.addoption("--allow-untested", action="store_true", help="take a transformers newer than the supported ones")


def pytest_configure(config):
    if config.getoption("--allow-untested"):
        import transformers

        from sparsevlm import compat

        compat.NEWEST = transformers.__version__


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


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage():
    """Collections that Python begins by itself pass over the million objects that imports have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """Adapters that a test registers are gone after it."""
    from sparsevlm.models import registry

    monkeypatch.setattr(registry, "_REGISTERED", {})


@pytest.fixture
def model():
    return tiny_model()
