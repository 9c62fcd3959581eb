"""Triton that is not there, or does not work, is no reason to fail."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sparsevlm.kernels import dispatch


@pytest.fixture(autouse=True)
def forgotten():
    dispatch.triton_problem.cache_clear()
    dispatch.flash_runs.cache_clear()
    yield
    dispatch.triton_problem.cache_clear()
    dispatch.flash_runs.cache_clear()


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    assert "older than Ampere" in dispatch.triton_problem()


def test_a_gpu_of_another_make(monkeypatch, ampere):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "no NVIDIA one" in dispatch.triton_problem()


def test_triton_that_is_not_installed(monkeypatch, ampere):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.triton_problem() == "Triton is not installed"


def test_triton_that_does_not_work(monkeypatch, caplog, ampere):
    def no_compiler(*args):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("sparsevlm.kernels.triton.elementwise.rms_norm", no_compiler)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(shape))
    assert dispatch.triton_problem() == "Triton does not work here (RuntimeError)"
    assert "C compiler" in caplog.text


def test_a_cpu_has_no_use_for_it():
    assert not dispatch.use_triton(torch.zeros(1))


@pytest.mark.gpu
def test_it_works_here():
    assert dispatch.triton_problem() is None
    assert dispatch.use_triton(torch.zeros(1, device="cuda"))
