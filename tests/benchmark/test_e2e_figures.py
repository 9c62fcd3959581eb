"""Figures of whole calls in one document are of one commit and one device, or the document is refused."""

from __future__ import annotations

import pytest

TIMES = {"hf-dense": "100", "ours-dense": "25", "ours": "10"}
TEXT = (
    "On one <!-- e2e device: case=a -->X<!-- end --> it takes "
    "<!-- e2e figure: case=a provider=ours phase=total -->0<!-- end --> ms, "
    "<!-- e2e ratio: case=b provider=hf-dense,ours-dense phase=total -->0<!-- end --> times faster"
)


@pytest.fixture
def tables():
    from benchmark import tables

    return tables


def run(case, commit="new", timestamp="5", times=TIMES, gpu="G", **changes):
    shared = {"case": case, "phase": "total", "metric": "ms", "keep": "1.0", "model": "7b shape", "gpu": gpu}
    shared |= {"commit": commit, "timestamp": timestamp, **changes}
    return [{**shared, "provider": provider, "p50": p50} for provider, p50 in times.items()]


def written(tables, monkeypatch, rows, text=TEXT):
    monkeypatch.setattr(tables, "read_e2e", lambda: rows)
    return tables.with_tables(text)


def test_figures_of_one_document_are_of_one_commit(tables, monkeypatch):
    """Case a was measured again at a newer commit, case b was not: both are shown as they were at the older one."""
    old = [*run("a", "old", "1"), *run("b", "old", "2")]
    newer = run("a", times={**TIMES, "ours": "7"}, gpu="H")
    shown = written(tables, monkeypatch, [*old, *newer])
    assert "device: case=a -->G<!--" in shown
    assert "phase=total -->10<!-- end --> ms" in shown
    assert "phase=total -->4.0<!-- end --> times" in shown
    shown = written(tables, monkeypatch, [*old, *newer, *run("b", gpu="H", timestamp="4")])
    assert "device: case=a -->H<!--" in shown
    assert "phase=total -->7<!-- end --> ms" in shown


def test_a_commit_that_one_figure_names_is_that_of_all(tables, monkeypatch):
    rows = [*run("a", "old", "1"), *run("b", "old", "2"), *run("a", times={**TIMES, "ours": "7"}), *run("b")]
    assert "phase=total -->7<!-- end --> ms" in written(tables, monkeypatch, rows)
    shown = written(tables, monkeypatch, rows, TEXT.replace("case=b", "commit=old case=b"))
    assert "phase=total -->10<!-- end --> ms" in shown


def test_a_run_without_what_is_compared_is_passed_over(tables, monkeypatch):
    """Also at the same commit, where a later run measured some selectors alone."""
    rows = [*run("a"), *run("b"), *run("a", timestamp="9", times={"hf-dense": "3", "ours": "2"})]
    assert "phase=total -->10<!-- end --> ms" in written(tables, monkeypatch, rows)


def test_what_is_missing_is_named(tables, monkeypatch):
    rows = [*run("a", "old", "1"), *run("a"), *run("b", times={"hf-dense": "3", "ours": "2"})]
    with pytest.raises(ValueError, match=r"new: the last run of b has no ours-dense \| old: b has no rows") as caught:
        written(tables, monkeypatch, rows)
    assert "hf-dense, ours-dense, ours in one run of each of a, b" in str(caught.value)
    with pytest.raises(ValueError, match="What is missing: all rows"):
        written(tables, monkeypatch, [])
    with pytest.raises(ValueError, match="names its case, as case=v1024-b1-n1; got the filter 'provider=ours'"):
        written(tables, monkeypatch, rows, "<!-- e2e figure: provider=ours -->0<!-- end -->")


def test_figures_of_several_devices_are_refused(tables, monkeypatch):
    with pytest.raises(ValueError, match=r"at new on several devices \(a: G; b: H\)"):
        written(tables, monkeypatch, [*run("a"), *run("b", gpu="H")])
    both = run("a", times={"hf-dense": "1", "ours-dense": "1"}) + run("a", times={"ours": "1"}, gpu="H")
    with pytest.raises(ValueError, match=r"several devices \(a: G, H; b: G\)"):
        written(tables, monkeypatch, [*both, *run("b")])


def test_a_ratio_is_of_two_providers(tables, monkeypatch):
    rows = [*run("a"), *run("b")]
    with pytest.raises(ValueError, match="its filter finds 1 of 'ours'"):
        written(tables, monkeypatch, rows, TEXT.replace("hf-dense,ours-dense", "ours"))
    with pytest.raises(ValueError, match="its filter finds 1 of 'hf-dense', 0 of 'vllm-dense'"):
        written(tables, monkeypatch, rows, TEXT.replace("ours-dense", "vllm-dense"))
    mixed = run("mixed24", metric="mean_ms")
    text = "<!-- e2e figure: case=mixed24 provider=ours -->0<!-- end -->"
    assert "-->10<!--" in written(tables, monkeypatch, mixed, text)
    text = "<!-- e2e ratio: case=mixed24 provider=hf-dense,ours -->0<!-- end -->"
    with pytest.raises(ValueError, match="of equal requests"):
        written(tables, monkeypatch, mixed, text)


def test_other_models_do_not_stand_in(tables, monkeypatch):
    with pytest.raises(ValueError, match="What is missing: all rows"):
        written(tables, monkeypatch, [*run("a", model="qwen3-vl-8b shape"), *run("b", model="qwen3-vl-8b shape")])
