"""Cores that others leave free, and what is said of threads that have none."""

from __future__ import annotations

import pytest

from sparsevlm import cores
from sparsevlm.cores import OtherProcesses, allowed_cores, busy_advice


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Eight cores, no container."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cores, "_CGROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("threads", "others", "fitting"),
    [(8, 0.3, None), (8, None, None), (4, 4.2, None), (8, 3.0, 5), (8, 9.0, 1), (1, 7.4, None)],
)
def test_threads_without_a_core_are_told(machine, threads, others, fitting):
    advice = busy_advice(threads, others)
    assert bool(advice) == (fitting is not None)
    if fitting is not None:
        assert f"torch computes with {threads} threads" in advice
        assert f"OMP_NUM_THREADS={fitting} before" in advice
        assert f"torch.set_num_threads({fitting})" in advice


def test_one_thread_without_a_core_is_told(machine):
    """There is nothing to set then."""
    advice = busy_advice(1, 7.8)
    assert advice.startswith(
        "torch computes with 1 thread, and about 0.2 of 8 cores are free: do not trust milliseconds"
    )
    assert "OMP_NUM_THREADS" not in advice


def test_threads_that_no_option_of_torch_sets(machine):
    advice = busy_advice(8, 3.0, "Choose fewer --workers.")
    assert advice.endswith("that are measured now. Choose fewer --workers.")


def test_a_container_has_fewer_cores_and_its_machine_other_work(machine):
    (machine / "cpu.max").write_text("200000 100000\n")
    assert allowed_cores() == 2.0
    assert "about 2.0 of 2 cores are free" in busy_advice(8, 5.0)
    assert busy_advice(2, 5.0) == "", "three cores of the machine are idle"
    (machine / "cpu.max").write_text("max 100000\n")
    assert allowed_cores() == 8.0


def test_other_processes_are_measured_apart_from_this_one(monkeypatch, tmp_path):
    stat, clock, own = tmp_path / "stat", [0.0], [0.0]
    monkeypatch.setattr(cores, "_STAT", stat)
    monkeypatch.setattr(cores.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cores.os, "times", lambda: (own[0], 0.0, 0.0, 0.0, clock[0]))
    monkeypatch.setattr(cores.os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(cores.os, "getloadavg", lambda: (1.25, 0.0, 0.0), raising=False)
    stat.write_text("cpu  1000 10 20 5000 30 0 0 0 400 0\ncpu0 0\n")
    others = OtherProcesses()
    assert others.cores() == 1.25, "too early: the load average"
    clock[0], own[0] = 10.0, 12.0
    stat.write_text("cpu  4200 10 20 9000 90 0 0 0 900 0\ncpu0 0\n")  # 32 s of computing, 12 of them ours
    assert others.cores() == pytest.approx(2.0)
    stat.unlink()
    assert others.cores() == 1.25
