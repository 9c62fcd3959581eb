"""Figures of README and documents are those of the stored rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables():
    from benchmark import tables

    return tables


def test_documents_show_the_stored_rows(tables):
    assert len(tables.DOCUMENTS) > 1
    for document in tables.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert re.search("<!-- (accuracy|e2e|families|memory|mixed|pictures|server|turns|validity|vllm-load):", text)
        assert tables.with_tables(text) == text, f"python -m benchmark.tables would change {document.name}"


def test_stored_rows_say_where_they_come_from(tables):
    rows = tables.stored_rows()
    assert len(rows) > 100
    for row in rows:
        assert row["commit"] not in ("", "unknown")
        assert "dirty" not in row["commit"]
        assert row["command"].startswith("sparsevlm eval")
        assert not re.search(r"(^|[ =])/", row["command"])  # no path of the machine that it ran on


def row(task, selector="random", keep="0.5", **changes):
    made = {"task": task, "selector": selector, "keep": keep, "target_layers": "0 4", "seed": "0", "options": ""}
    made |= {"retained": "91.26", "ci_low": "90.0", "ci_high": "92.5", "dense_score": "0.995", "n": "100"}
    made |= {"avg_tokens": "128.0", "n_visual": "256.0", "dtype": "float32", "device": "CPU", "commit": "abc"}
    made |= {"torch": "2.13", "transformers": "5.23", "data": "d", "weights": "w", "run": "r"}
    return made | changes


def test_a_table_has_a_line_per_setting(tables):
    rows = [row(task, selector) for selector in ("dense", "random") for task in ("number", "average")]
    lines = tables.accuracy_table(rows).splitlines()
    assert lines[0].split("|")[1:-1] == [
        " selector ", " target layers ", " keep ", " visual tokens ", " average ", " number "
    ]  # fmt: skip
    assert lines[2] == "| dense | – | – | 128 of 256 | 99.5 % | 99.5 % |"
    assert lines[3] == "| random | 0, 4 | 0.5 | 128 of 256 | **91.3** [90.0, 92.5] | 91.3 |"
    assert "n = 100" in lines[-1]
    assert "| divprune | before | 0.5 |" in tables.accuracy_table([row("number", "divprune")])
    with pytest.raises(ValueError, match="no stored row"):
        tables.accuracy_table([])


def test_runs_that_measured_something_else_are_not_mixed(tables):
    lines = tables.accuracy_table([row("number", "dense"), row("number", "dense", run="other")]).splitlines()
    assert len(lines) == 5
    with pytest.raises(ValueError, match="runs r and other both have dense on number, and differ in n"):
        tables.accuracy_table([row("number", "dense"), row("number", "dense", n="200", run="other")])


def test_a_run_of_one_task_is_its_own_average(tables):
    lines = tables.accuracy_table([row("number", "dense"), row("number")]).splitlines()
    assert lines[2] == "| dense | – | – | 128 of 256 | 99.5 % | 99.5 % |"
    assert lines[3] == "| random | 0, 4 | 0.5 | 128 of 256 | **91.3** [90.0, 92.5] | 91.3 |"


def test_what_a_row_does_not_have_is_a_dash(tables):
    none = dict.fromkeys(("retained", "ci_low", "ci_high", "dense_score", "avg_tokens", "n_visual"), "")
    rows = [row("a", "dense"), row("b", "dense"), row("average", "dense", **none)]
    rows += [row("a"), row("b", **none), row("average", ci_low="", ci_high=""), row("a", "grid")]
    lines = tables.accuracy_table(rows).splitlines()
    assert lines[2] == "| dense | – | – | – of – | – | 99.5 % | 99.5 % |"
    assert lines[3] == "| random | 0, 4 | 0.5 | 128 of 256 | **91.3** | 91.3 | – |"
    assert lines[4] == "| grid | 0, 4 | 0.5 | – of – | **–** | 91.3 | – |"


def test_filters_choose_rows(tables):
    rows = [row("number"), row("number", keep="0.25"), row("number", target_layers="default")]
    assert tables.chosen(rows, "keep=0.5,0.25 target_layers=0+4") == rows[:2]
    assert tables.chosen(rows, "target_layers=d* or keep=0.25 or keep=0.2*") == [rows[2], rows[1]]
    assert tables.chosen(rows, "") == rows


def test_the_readme_shows_eight_rows_of_speed_at_most(tables):
    """Also once all that its filter names is stored."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (filter_text,) = re.findall("<!-- e2e:(.*?) -->", text)
    providers = ("hf-dense", "hf-static", "vllm-dense", "ours-dense", "ours-default", "ours", "ours-vision")
    keeps = {"ours": ("0.5", "0.25"), "ours-vision": ("0.25",), "ours-default": ("adaptive",)}
    selectors = {f"ours-{name}": ("0.5", "0.25") for name in tables.SELECTORS}
    rows = [
        whole_call(provider, phase, keep, case=case, metric=metric)
        for case in ("v256-b1-n1", "v1024-b1-n1", "v1024-b32-n64", "mixed24", "mixed200", "picture896-b1-n1")
        for provider in (*providers, *selectors)
        for keep in {**keeps, **selectors}.get(provider, ("1.0",))
        for phase in ("first_token", "total")
        for metric in ("ms", "mean_ms")
    ]
    lines = [
        line
        for line in tables.e2e_table(tables.chosen(rows, filter_text), rows).splitlines()
        if "v1024" in line or "mixed" in line
    ]
    shown = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines if line.startswith("|")]
    assert len(shown) == len(set(shown)) == 8
    assert {"ours-default", "ours", "ours-sparsevlm"} <= {provider for _, provider, _ in shown}
    assert {case for case, _, _ in shown} == {"v1024-b1-n1", "v1024-b32-n64", "mixed200"}


def whole_call(provider, phase="first_token", keep="1.0", **changes):
    made = {"case": "v256-b1-n64", "provider": provider, "keep": keep, "phase": phase, "metric": "ms", "note": ""}
    made |= {"p50": "20", "p20": "19", "p80": "22", "floor": "10", "timestamp": "2", "gpu": "G", "dtype": "bfloat16"}
    made |= {"torch": "2.13", "triton": "3.7", "transformers": "5.23", "commit": "abc", "model": "7b shape"}
    return made | changes


def test_a_table_of_whole_calls(tables):
    rows = [whole_call("hf-dense"), whole_call("hf-dense", "total", p50="80"), whole_call("hf-dense", "vision")]
    rows += [whole_call("ours", keep="0.25", p50="12.5"), whole_call("ours", "total", "0.25", p50="40", floor="")]
    rows += [whole_call("ours", "total", "0.25", metric="bytes", p50="1e9")]
    rows += [whole_call("random", "total", "0.25", note="out of memory", p50="", floor="")]
    lines = tables.e2e_table(rows).splitlines()
    assert lines[0].split("|")[4:7] == [" first token, ms ", " bound ", " x "]
    assert lines[2] == "| v256-b1-n64 | hf-dense | 1.0 | 20.0 | 10.0 | 1.00 | – | – | – | 80.0 | 10.0 | 1.00 |"
    assert lines[3] == "| v256-b1-n64 | ours | 0.25 | 12.5 | 10.0 | 1.60 | – | – | – | 40.0 | – | 2.00 |"
    assert lines[4] == "| v256-b1-n64 | random | 0.25 | – | – | – | – | – | – | out of memory | – | – |"
    assert len(lines) == 7
    assert "G, torch 2.13, triton 3.7, transformers 5.23, commit abc" in lines[-1]


def test_what_is_compared_was_measured_in_one_run(tables):
    rows = [whole_call("hf-dense"), whole_call("ours", keep="0.25"), whole_call("hf-dense", timestamp="1", p50="90")]
    rows += [whole_call("ours-dense", timestamp="1"), whole_call("ours", case="v576-b1-n64", timestamp="1")]
    lines = tables.e2e_table(rows).splitlines()[2:-2]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| v256-b1-n64", "hf-dense"], ["| v256-b1-n64", "ours"], ["| v576-b1-n64", "ours"]
    ]  # fmt: skip
    assert " 20.0 | 10.0 | 1.00 |" in lines[0]
    assert " 20.0 | 10.0 | – |" in lines[2]


def test_no_table_mixes_commits(tables):
    """The commit that was measured last is shown alone, whatever the order of its rows and cases."""
    of = {"v1024-b1-n1": "5", "v256-b1-n1": "9"}
    new = [whole_call("ours", keep="0.25", case=case, p50=p50, timestamp="3") for case, p50 in of.items()]
    new += [whole_call("hf-dense", "total", metric="bytes", case=case, p50="2e9", timestamp="3") for case in of]
    old = [
        whole_call(provider, case=case, commit="old", metric=metric, timestamp="2", p50="7e9")
        for provider in ("hf-dense", "ours-grid")
        for case in ("v1024-b1-n1", "v4096-b1-n1", "mixed24")
        for metric in ("ms", "mean_ms", "bytes")
    ]
    rows = [new[0], *old, *new[1:]]
    names = ("e2e_table", "selectors_table", "mixed_table", "memory_table")
    shown = {name: getattr(tables, name)(rows) for name in names}
    assert "| v256-b1-n1 | ours | 0.25 | 9.0 |" in shown["e2e_table"].splitlines()[2]
    assert "| v1024-b1-n1 | ours | 0.25 | 5.0 |" in shown["e2e_table"].splitlines()[4]
    assert shown["memory_table"].splitlines()[2:4] == ["| v256-b1-n1 | 2.0 |", "| v1024-b1-n1 | 2.0 |"]
    for name in ("e2e_table", "selectors_table", "memory_table"):
        assert "commit abc;" in shown[name], name
        assert "v4096" not in shown[name], name
        assert "old" not in shown[name], name
    assert "commit old;" in tables.e2e_table(tables.chosen(rows, "commit=old"), rows)


def test_a_table_of_selectors(tables):
    rows = [whole_call("hf-dense"), whole_call("ours", keep="0.25", p50="8"), whole_call("hf-dense", case="v576-b1-n1")]
    rows += [whole_call("ours-grid", keep="0.25", case="v576-b1-n1", p50="5")]
    lines = tables.selectors_table(tables.chosen(rows, "keep=0.25"), rows).splitlines()
    assert lines[0] == "| provider | v256-b1-n64, ms | x | v576-b1-n1, ms | x |"
    assert lines[2:4] == ["| ours 0.25 | 8.0 | 2.50 | – | – |", "| ours-grid 0.25 | – | – | 5.0 | 4.00 |"]
    assert tables.selectors_table([]).startswith("No rows yet")


def test_a_table_of_the_warmup(tables):
    shared = {"dtype": "bfloat16", "gpu": "G", "torch": "2", "triton": "3", "transformers": "5", "provider": "ours"}
    shared |= {"commit": "new", "timestamp": "2", "shape": "up to 4096", "operation": "warm-up", "metric": "ms"}
    rows = [
        {**shared, "timing": "Triton's cache empty", "p50": "31400", "note": "58 of 58 requests of the ladder"},
        {**shared, "timing": "Triton's cache filled", "p50": "9100", "note": "58 of 58 requests of the ladder"},
        {**shared, "timing": "Triton's cache filled", "p50": "2.5e9", "metric": "bytes", "note": ""},
        {**shared, "timing": "Triton's cache filled", "p50": "48.3", "operation": "first request", "note": ""},
        {**shared, "timing": "Triton's cache filled", "p50": "9", "commit": "old", "timestamp": "1", "note": ""},
    ]
    lines = tables.ready_table(rows).splitlines()
    assert lines[2:5] == [
        "| ours | warm-up, up to 4096 | 9.1 s | 31.4 s |",
        "| ours | warm-up, up to 4096 | 2.5 GB | – |",
        "| ours | first request, up to 4096 | 48 ms | – |",
    ]
    assert lines[-1].startswith("One call each. 58 of 58 requests of the ladder; bfloat16, G")
    assert "commit new;" in lines[-1]
    assert "bench_ready" in tables.ready_table([])


def test_ratios_are_of_rows_that_a_filter_leaves_out(tables):
    rows = [whole_call("hf-dense"), whole_call("ours", keep="0.25", p50="5"), whole_call("hf-dense", timestamp="1")]
    assert " 5.0 | 10.0 | 4.00 |" in tables.e2e_table(rows[1:2], rows)
    assert " 5.0 | 10.0 | – |" in tables.e2e_table(rows[1:2], rows[1:])


def test_a_remark_beside_a_time(tables):
    rows = [whole_call("ours-visionzip", keep="0.25", note="hooks on the model's own modules")]
    assert "| 20.0 | 10.0 |" in tables.e2e_table(rows)
    assert "hooks" not in tables.e2e_table(rows)


def mixed_call(provider, metric="mean_ms", phase="total", **changes):
    return whole_call(provider, phase, changes.pop("keep", "1.0"), case="mixed24", metric=metric, **changes)


def test_a_table_of_mixed_shapes(tables):
    rows = [
        mixed_call("hf-dense", p50="600", note="9 of 24 requests, drawn by the seed"),
        mixed_call("hf-dense", "x", p50="1"),
    ]
    rows += [mixed_call("ours", "ms", p50="88"), mixed_call("ours", p50="90"), mixed_call("ours", "x", p50="6.5")]
    rows += [mixed_call("ours", phase="first_token", p50="30"), mixed_call("ours", "worst_by_median", p50="1.234")]
    rows += [mixed_call("ours", "seconds", "warmup", p50="11.5"), whole_call("ours")]
    rows += [mixed_call("vllm-dense", "ms", p50="", note="failed: it did")]
    lines = tables.mixed_table(rows).splitlines()
    assert lines[2] == "| mixed24 | hf-dense | 1.0 | 600.0 | 1.00 | – | – | – | – |"
    assert lines[3] == "| mixed24 | ours | 1.0 | 90.0 | 6.50 | 30.0 | – | 1.23 | 11.5 |"
    assert lines[4] == "| mixed24 | vllm-dense | 1.0 | – | – | – | – | – | – |"
    assert "hf-dense: 9 of 24 requests, drawn by the seed. vllm-dense: failed: it did. 7b shape" in lines[-1]
    assert len(lines) == 7
    among_others = tables.e2e_table(rows).splitlines()
    assert "| mixed24 | ours | 1.0 | 30.0 | 10.0 | – | – | – | – | 90.0 | 10.0 | 6.50 |" in among_others
    assert "Of mixed cases: the mean" in among_others[-1]
    assert tables.mixed_table([whole_call("ours")]).startswith("No rows yet")


def test_a_table_of_pictures(tables):
    of = {"case": "picture896-b1-n1"}
    rows = [
        whole_call("hf-dense", **of, p50="190", note="A with B"),
        whole_call("hf-dense", "preprocess", **of, p50="40"),
    ]
    rows += [whole_call("ours", keep="0.25", **of, p50="38", note="C with D"), whole_call("ours")]
    lines = tables.pictures_table(rows).splitlines()
    assert lines[2] == "| picture896-b1-n1 | hf-dense | 1.0 | 40.0 | 190.0 | 1.00 | A with B |"
    assert lines[3] == "| picture896-b1-n1 | ours | 0.25 | – | 38.0 | 5.00 | C with D |"
    assert len(lines) == 6
    assert tables.pictures_table([]).startswith("No rows yet")


def test_documents_without_rows_of_whole_calls_say_so(tables, monkeypatch):
    monkeypatch.setattr(tables, "read_e2e", lambda: [])
    text = "before\n<!-- e2e: batch=1 -->\nold\n<!-- end of e2e -->\nafter\n"
    found = tables.with_tables(text)
    assert "old" not in found
    assert "No rows yet" in found
    assert found.startswith("before\n<!-- e2e: batch=1 -->\n")
    assert found.endswith("<!-- end of e2e -->\nafter\n")
    monkeypatch.setattr(tables, "read_e2e", lambda: [whole_call("ours", batch="1"), whole_call("hf-dense", batch="8")])
    assert "| ours |" in tables.with_tables(text)
    assert "hf-dense |" not in tables.with_tables(text)


def test_whole_calls_say_where_they_come_from(tables):
    for row in tables.read_e2e():
        assert row["commit"] not in ("", "unknown")
        assert "dirty" not in row["commit"]
        assert row["command"].startswith("sparsevlm bench")


def test_a_plot_of_whole_calls(tables, tmp_path):
    from benchmark.plot_e2e import plot

    rows = [whole_call("hf-dense"), whole_call("ours", keep="0.25"), whole_call("ours", "total", "0.25", floor="")]
    rows += [whole_call("ours-vision", "total", "0.25", p50="", note="out of memory")]
    rows += [whole_call("ours-grid", keep="0.25"), whole_call("ours", case="mixed24")]
    plot(rows, tmp_path / "e2e.png")
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows to draw"):
        plot([], tmp_path / "none.png")


def model_call(model, case, n_visual, provider="hf-dense", keep="1.0", **changes):
    of = {"model": f"{model} shape, random weights", "case": case, "n_visual": n_visual, "batch": "1"}
    return whole_call(provider, keep=keep, **of, **changes)


def test_rows_of_other_models_are_shown_where_a_filter_names_them(tables, monkeypatch):
    """Also those of a later commit, which would take the place of all others."""
    rows = [whole_call("hf-dense", batch="1"), model_call("llava-1.5-7b", "v256-b1-n64", "576", timestamp="9")]
    rows[1] |= {"p50": "77", "commit": "new"}
    monkeypatch.setattr(tables, "read_e2e", lambda: rows)
    text = "<!-- e2e: batch=1 -->\n<!-- end of e2e -->\n"
    found = tables.with_tables(text)
    assert "| v256-b1-n64 | hf-dense | 1.0 | 20.0 |" in found
    assert "77.0" not in found
    assert "commit abc;" in found
    assert "| 77.0 |" in tables.with_tables(text.replace("batch=1", "model=llava-1.5-7b+shape*"))
    rows += [whole_call(provider, batch="2") for provider in ("ours-dense", "ours")]
    made = "<!-- e2e figure: case=v256-b1-n64 provider=hf-dense -->20<!-- end -->"
    assert tables.with_tables(made) == made


def test_a_table_of_other_models(tables, monkeypatch):
    rows = [whole_call("hf-dense", batch="1", n_visual="576"), model_call("qwen3-vl-8b", "v576-b1-n1", "576", p50="80")]
    rows += [model_call("qwen3-vl-8b", "v576-b1-n1", "576", "ours", "0.25", p50="20")]
    rows += [model_call("qwen3-vl-8b", "v576-b1-n1", "576", "ours-default", "adaptive", p50="40")]
    rows += [model_call("llava-1.5-7b", "v1152-b1-n1", "1152", p50="90", timestamp="3")]
    rows += [model_call("llava-1.5-7b", "v576-b1-n1", "576", "ours", "0.25", p50="30", timestamp="3")]
    rows += [model_call("llava-1.5-7b", "v576-b1-n1", "576", p50="60", timestamp="3")]
    monkeypatch.setattr(tables, "read_e2e", lambda: rows)
    text = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    (filter_text,) = re.findall("<!-- models:(.*?) -->", text)
    shown = tables.chosen_calls(rows, filter_text.replace("new_tokens=1 ", ""))
    lines = tables.models_table(shown, rows).splitlines()
    assert lines[0] == ("| model | visual tokens | hf-dense, ms | ours, keep=0.25, ms | x | ours-default, ms | x |")
    assert lines[2:5] == [
        "| qwen3-vl-8b | 576 | 80.0 | 20.0 | 4.00 | 40.0 | 2.00 |",
        "| llava-1.5-7b | 576 | 60.0 | 30.0 | 2.00 | – | – |",
        "| llava-1.5-7b | 1152 | 90.0 | – | – | – | – |",
    ]
    assert "qwen3-vl-8b shape, random weights; llava-1.5-7b shape, random weights; bfloat16" in lines[-1]
    assert len(lines) == 7
    assert tables.models_table([]).startswith("No rows yet")


def test_the_plot_is_of_the_7b_shape(tables, tmp_path):
    from benchmark.plot_e2e import plot

    with pytest.raises(ValueError, match="no rows to draw"):
        plot([model_call("llava-1.5-7b", "v576-b1-n1", "576")], tmp_path / "none.png")
