"""From predictions to tables."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from sparsevlm.evaluation import DENSE, Setting
from sparsevlm.evaluation.reporting.csv_rows import (
    COLUMNS,
    append_rows,
    check_target,
    csv_rows,
    read_rows,
    write_rows,
)
from sparsevlm.evaluation.reporting.plot import plot
from sparsevlm.evaluation.reporting.results import failures, left_out, make_results, not_averaged
from sparsevlm.evaluation.reporting.table import markdown
from sparsevlm.evaluation.settings import AVERAGE


def prediction(score, *, tokens=100, ms=10.0, **more):
    figures = {"n_visual": 256, "avg_tokens": tokens, "tflops": 0.5, "ms": ms, "path": "plain"}
    return {"score": score, **figures, **more}


def rows(**tasks):
    """Predictions of one setting by task and row; ``None`` is a failure."""
    return {
        (task, str(i)): {"error": f"row {i} is bad"} if score is None else prediction(score)
        for task, scores in tasks.items()
        for i, score in enumerate(scores)
    }


OURS = Setting("ours", 0.5)
RANDOM = [Setting("random", 0.5, seed) for seed in (0, 1)]


def test_scores_are_compared_row_by_row():
    found = {DENSE: rows(a=[1, 1, 0, 1]), OURS.name: rows(a=[1, 0, 0, 1])}
    dense, ours = make_results([Setting(DENSE), OURS], ["a"], found)
    assert (dense.score, dense.dense_score, dense.retained, dense.n) == (0.75, 0.75, 100, 4)
    assert math.isnan(dense.ci_low)
    assert (ours.task, ours.selector, ours.keep, ours.seed) == ("a", "ours", "0.5", "")
    assert (ours.score, ours.dense_score, ours.n, ours.n_failed) == (0.5, 0.75, 4, 0)
    assert ours.retained == pytest.approx(100 * 2 / 3)
    assert ours.ci_low < ours.retained < ours.ci_high
    assert (ours.n_visual, ours.avg_tokens, ours.tflops, ours.latency_ms) == (256, 100, 0.5, 10)
    assert math.isnan(ours.mean_iou)


def test_what_failed_in_either_is_left_out_of_both():
    found = {DENSE: rows(a=[1, 0, None, 1]), OURS.name: rows(a=[0, None, 1, 1])}
    _, ours = make_results([Setting(DENSE), OURS], ["a"], found)
    assert (ours.n, ours.n_failed, ours.score, ours.dense_score, ours.retained) == (2, 2, 0.5, 1, 50)
    assert failures(found) == {("a", "2"): "row 2 is bad", ("a", "1"): "row 1 is bad"}


def test_every_task_counts_the_same_in_the_average():
    found = {DENSE: rows(a=[1] * 10, b=[1, 1]), OURS.name: rows(a=[1] * 9 + [0], b=[1, 0])}
    found[OURS.name]["a", "0"].update(avg_tokens=200, ms=99)
    results = make_results([Setting(DENSE), OURS], ["a", "b"], found)
    assert [one.task for one in results] == ["a", "b", AVERAGE] * 2
    one, other, average = results[3:]
    assert (one.retained, other.retained, average.retained) == (90, 50, 70)
    assert average.score == pytest.approx(0.7)
    assert average.n == 12
    assert one.avg_tokens == pytest.approx(110)
    assert one.latency_ms == 10, "the median"
    assert average.avg_tokens == pytest.approx(105)
    assert average.ci_low < 70 < average.ci_high


def test_a_setting_without_one_task_has_no_average():
    """It would be the mean of other tasks than that of the settings beside it."""
    other = Setting("other", 0.5)
    found = {DENSE: rows(a=[1, 1], b=[1, 0], c=[None]), OURS.name: rows(a=[1, 0], b=[None, None], c=[None])}
    found[other.name] = rows(a=[1, 0], b=[1, 0], c=[None])
    results = make_results([Setting(DENSE), OURS, other], ["a", "b", "c"], found)
    dense, ours, whole = (one for one in results if one.task == AVERAGE)
    assert (ours.n, ours.n_failed) == (2, 3)
    figures = (ours.score, ours.dense_score, ours.retained, ours.ci_low, ours.avg_tokens, ours.latency_ms)
    assert all(map(math.isnan, figures))
    assert (dense.score, whole.retained) == (0.75, 75), "c is in no average, as dense has no answer either"
    assert not_averaged(results) == ["no average: ours at keep 0.5 has no score on a single row of b"]
    assert not_averaged([one for one in results if one.selector != "ours"]) == []
    assert "| ours | 0.5 |  | – of – | – |" in markdown("x", results, {}, [])


def test_the_order_in_which_rows_were_stored_does_not_matter():
    found = {DENSE: rows(a=[1, 1, 0, 1] * 5), OURS.name: rows(a=[1, 0, 0, 1, 1] * 4)}
    turned = {name: dict(reversed(some.items())) for name, some in found.items()}
    settings = [Setting(DENSE), OURS]
    assert make_results(settings, ["a"], found)[1] == make_results(settings, ["a"], turned)[1]


def test_seeds_are_averaged_row_by_row():
    zero, one = (setting.name for setting in RANDOM)
    found = {DENSE: rows(a=[1, 1, 1, 1]), zero: rows(a=[1, 0, 0, 1]), one: rows(a=[1, 1, 0, None])}
    _, zero, one, both = make_results([Setting(DENSE), *RANDOM], ["a"], found)
    assert [zero.seed, one.seed, both.seed] == ["0", "1", "0+1"]
    assert (zero.score, zero.n) == (0.5, 4)
    assert one.score == pytest.approx(2 / 3)
    assert (both.score, both.n, both.n_failed) == (0.5, 3, 1)


def test_boxes_have_a_mean_overlap():
    found = {DENSE: rows(a=[1, 0])}
    found[DENSE]["a", "0"]["iou"], found[DENSE]["a", "1"]["iou"] = 0.9, 0.3
    (dense,) = make_results([Setting(DENSE)], ["a"], found)
    assert dense.mean_iou == pytest.approx(0.6)


def test_reasons_are_said_once():
    found = left_out({"a": "too deep", "b": "too wide", "c": "too deep"})
    assert found == ["left out: a, c: too deep", "left out: b: too wide"]


ORIGIN = dict.fromkeys(COLUMNS[COLUMNS.index("target_layers") :], "x") | {"model": "m", "suite": "s", "commit": "c"}


@pytest.fixture
def results():
    found = {DENSE: rows(a=[1, 1, 0], b=[0, 0, 0]), OURS.name: rows(a=[1, 0, None], b=[0, 0, 1])}
    return make_results([Setting(DENSE), OURS], ["a", "b"], found), found


def test_rows_begin_with_the_columns_of_the_stored_tables(results):
    wanted = "model suite task selector keep avg_tokens score dense_score retained ci_low ci_high n seed commit"
    written = csv_rows(results[0], ORIGIN)
    assert list(written[0])[: len(wanted.split())] == wanted.split()
    ours = written[3]
    assert (ours["task"], ours["score"], ours["dense_score"], ours["retained"]) == ("a", "0.5", "1.0", "50.0")
    assert written[1]["retained"] == "", "no dense score, nothing to retain"


def test_rows_of_the_same_run_are_replaced(tmp_path, results):
    file = tmp_path / "new" / "accuracy.csv"
    written = csv_rows(results[0], {**ORIGIN, "run": "one"})
    append_rows(file, written)
    append_rows(file, csv_rows(results[0], {**ORIGIN, "run": "two"}))
    append_rows(file, written[:2])
    assert [row["run"] for row in read_rows(file)] == ["two"] * len(written) + ["one"] * 2
    assert {path.name for path in file.parent.iterdir()} <= {"accuracy.csv", ".accuracy.csv.lock"}


def _append(file, run):
    append_rows(file, [dict.fromkeys(COLUMNS, "") | {"run": run}])


def test_runs_that_append_at_once_lose_no_rows(tmp_path):
    file, names = tmp_path / "accuracy.csv", [f"run {number}" for number in range(24)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: _append(file, name), names))
    assert sorted(row["run"] for row in read_rows(file)) == sorted(names)


def test_an_empty_csv_file_holds_no_rows(tmp_path, results):
    file = tmp_path / "accuracy.csv"
    file.touch()
    check_target(file)
    append_rows(file, csv_rows(results[0], ORIGIN))
    assert len(read_rows(file)) == len(results[0])


def test_a_csv_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for place in (tmp_path / "file" / "accuracy.csv", tmp_path / "folder"):
        with pytest.raises(ValueError, match=r"rows cannot be added to .*; name another file"):
            check_target(place)
    with pytest.raises(ValueError, match="is no CSV file"):
        check_target(tmp_path / "binary.csv")


def test_a_csv_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "other.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        append_rows(file, [])
    assert file.read_text() == "a,b\n1,2\n"
    write_rows(file, [])
    assert read_rows(file) == []


def test_a_command_that_is_no_utf_8_can_be_stored(tmp_path, results):
    file = tmp_path / "accuracy.csv"
    write_rows(file, csv_rows(results[0], {**ORIGIN, "command": "sparsevlm eval --suite \udce9.jsonl"}))
    assert read_rows(file)[0]["command"] == r"sparsevlm eval --suite \udce9.jsonl"


def test_the_table_says_it_all(results):
    text = markdown("demo on m", results[0], failures(results[1]), ["A note."])
    assert "| dense | 1.0 |  | 100.0 of 256 | 0.3333 |" in text
    assert "| ours | 0.5 |  | 50.0 [" in text
    assert "- A note." in text
    assert "1 rows are without a score in some setting" in text
    assert "- a, 2: row 2 is bad" in text
    assert "nan" not in text


def test_a_table_of_many_failures_stays_short(results):
    failed = {("a", str(i)): "bad" for i in range(50)}
    text = markdown("x", results[0], failed, [])
    assert "- a, 19: bad" in text
    assert "- a, 20: bad" not in text
    assert "and 30 more" in text


def test_names_of_tasks_are_taken_as_they_are(tmp_path):
    """Neither a formula of matplotlib's nor more columns of a table."""
    names = ["price in $", r"$\frac$", "this|that\nand more"]
    found = {name: rows(**{task: [1, 0] for task in names}) for name in (DENSE, OURS.name)}
    results = make_results([Setting(DENSE), OURS], names, found)
    plot(results, "$x_ on $y^", [tmp_path / "plot.png"])
    text = markdown("demo on\nm", results, {(names[2], "1"): "bad"}, [])
    assert text.startswith("# demo on m\n")
    assert r"| price in $ | $\frac$ | this\|that and more |" in text
    assert "\n- this|that and more, 1: bad\n" in text


def test_the_plot_shows_every_task(tmp_path, results):
    files = [tmp_path / "plot.png", tmp_path / "plot.svg"]
    plot(results[0], "demo on m", files)
    assert Image.open(files[0]).size[0] > 800
    text = files[1].read_text()
    assert text.startswith("<?xml")
    plot(results[0], "demo on m", files)
    assert files[1].read_text() == text
