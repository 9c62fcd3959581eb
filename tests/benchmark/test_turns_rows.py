"""Second questions of the benchmark, and the table of their stored rows."""

from __future__ import annotations

import pytest


@pytest.fixture
def turns():
    from benchmark import bench_turns, turns_rows

    return bench_turns, turns_rows


def test_first_questions_are_about_something_else(turns):
    bench, _ = turns
    asked = list(bench.conversations(9))
    assert [second.task for _, _, second in asked] == [*bench.SINGLE_TASKS]
    assert all(first.task != second.task for _, first, second in asked)
    assert sum(not set(first.box) & set(second.box) for _, first, second in asked) > 4


def test_stored_rows_say_where_they_come_from(turns):
    rows = turns[1].read_turns()
    assert {row["selector"] for row in rows} >= {"dense", "span", "sparsevlm"}
    for row in rows:
        assert row["commit"] not in ("", "unknown")
        assert "dirty" not in row["commit"]
        assert row["command"].startswith("python -m benchmark.bench_turns")
        assert "--append-to" not in row["command"]
        assert row["task"] != "average" or row["note"] or int(row["n"]) >= 200


def test_a_command_is_that_of_its_rows():
    from benchmark.commands import command_of

    for own in ([], ["--n", "45", "--selectors", "span", "sparsevlm"]):
        wanted = " ".join(["python -m benchmark.bench_turns", *own])
        for place in ([], ["--append-to", "elsewhere.csv"], ["--append-to=elsewhere.csv"]):
            given = [command_of("bench_turns", words) for words in ([*place, *own], [*own, *place])]
            assert given == [wanted, wanted]


def test_the_table_is_of_the_last_runs(turns):
    bench, rows_module = turns
    shared = {**dict.fromkeys(bench.COLUMNS, ""), "commit": "c", "timestamp": "2"}
    asked = [bench.Asked("number", 1.0, float(i % 2), 280.0, 262144.0, 64.0) for i in range(4)]
    rows = [{**shared, **row} for row in bench.rows_of(asked, selector="span", keep="0.25", turns="refresh")]
    refused = {**shared, "selector": "sparsevlm", "keep": "0.25", "turns": "agnostic", "task": "average"}
    refused |= {"n": "0", "note": "no"}
    old = [{**row, "timestamp": "1", "accuracy": "0.1"} for row in rows]
    lines = rows_module.turns_table(
        [*old, *rows, refused, {**old[0], "commit": "older", "timestamp": "0"}]
    ).splitlines()
    assert lines[2].startswith("| span | 0.25 | refresh | **50.0** [0.0, 100.0] | 100.0 | 280 tokens | 262 kB | 50.0 |")
    assert lines[3] == "| sparsevlm | 0.25 | agnostic | no | – | – | – | – |"
    assert "n = 4 second questions" in lines[-1]
    assert rows_module.turns_table([]).startswith("No rows yet")


def test_a_figure_is_of_the_last_run(turns):
    row = {"selector": "span", "keep": "0.25", "turns": "refresh", "task": "average", "commit": "c", "timestamp": "2"}
    rows = [{**row, "accuracy": "0.123", "timestamp": "1"}, {**row, "accuracy": "0.9956"}]
    assert turns[1].turns_figure(rows) == "99.6"
    with pytest.raises(ValueError, match="a figure needs one stored row, its filter finds 2"):
        turns[1].turns_figure([*rows, {**rows[1], "task": "box"}])
