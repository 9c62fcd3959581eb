"""Tiny models and inputs that every test shares."""

import pytest
import torch

from toys import tiny_model


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


@pytest.fixture
def model():
    return tiny_model()
