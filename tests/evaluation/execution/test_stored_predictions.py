"""Predictions survive kills, and a folder holds one run only."""

import json
import subprocess
import sys

import pytest

from sparsevlm.evaluation.execution.predictions import PredictionStore
from sparsevlm.evaluation.execution.run_folder import RunFolder
from sparsevlm.evaluation.settings import EvalConfig


def row(number, **more):
    return {"id": str(number), "task": "t", "setting": "s", **({"score": 1.0} | more if "error" not in more else more)}


def ids(store):
    return [one["id"] for one in store.read()["s"].values()]


def test_rows_come_back(tmp_path):
    store = PredictionStore(tmp_path)
    assert store.read() == {}
    store.append("s", [row(1), row(2, prediction='é\n"')])
    store.append("s", [])
    store.append("s", [row(3)])
    assert PredictionStore(tmp_path).read()["s"]["t", "2"]["prediction"] == 'é\n"'
    assert ids(store) == ["1", "2", "3"]


@pytest.mark.parametrize("n_bytes", [1, 5, 30])
def test_a_torn_line_is_cut_off_before_the_next(tmp_path, n_bytes):
    PredictionStore(tmp_path).append("s", [row(1), row(2)])
    file = tmp_path / "s.jsonl"
    file.write_bytes(file.read_bytes()[:-n_bytes])
    store = PredictionStore(tmp_path)
    assert ids(store) == ["1"]
    store.append("s", [row(2)])
    store.append("s", [row(3)])
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["1", "2", "3"]


def test_a_file_of_nothing_but_a_torn_line(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"id": "1", "ta')
    store = PredictionStore(tmp_path)
    assert store.read() == {}
    store.append("s", [row(1)])
    assert ids(store) == ["1"]


def test_damage_elsewhere_is_named(tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps(row(1)) + "\nrubbish\n" + json.dumps(row(3)) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*s\.jsonl is damaged; delete the line"):
        PredictionStore(tmp_path).read()


def test_workers_write_to_files_of_their_own(tmp_path):
    PredictionStore(tmp_path, 0).append("s", [row(1)])
    PredictionStore(tmp_path, 1).append("s", [row(2)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.jsonl", "s.worker1.jsonl"]
    assert sorted(ids(PredictionStore(tmp_path))) == ["1", "2"]


def test_a_later_success_takes_the_place_of_a_failure(tmp_path):
    store = PredictionStore(tmp_path)
    store.append("s", [row(1, error="no image")])
    store.append("s", [row(1)])
    assert store.read()["s"]["t", "1"]["score"] == 1
    store.append("s", [row(1, error="no image")])
    assert "error" not in store.read()["s"]["t", "1"]


CONFIG = EvalConfig("demo", "bundled")
VERSIONS = {"torch": "2.13.0", "weights": "abc"}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, CONFIG, "demo-bundled")


def test_a_folder_is_named_by_its_configuration(tmp_path, folder):
    assert folder.path.name == f"demo-bundled-{CONFIG.digest()}"
    other = EvalConfig("demo", "bundled", options={"tau": 0.3})
    assert RunFolder(tmp_path, other, "demo-bundled").path != folder.path
    assert RunFolder(tmp_path, CONFIG, "a/b c").path.name.startswith("a-b-c-")


def test_the_same_run_goes_on(folder):
    with folder.locked():
        folder.open(CONFIG, VERSIONS, resume=True)
        folder.open(CONFIG, VERSIONS, resume=True)


def test_a_run_of_another_kind_is_refused_by_what_differs(folder):
    with folder.locked():
        folder.open(CONFIG, VERSIONS, resume=True)
    PredictionStore(folder.predictions).append("s", [row(1)])
    with pytest.raises(ValueError, match=r"weights is 'abc' there and 'xyz' now.*--no-resume.*--out") as caught:
        folder.open(CONFIG, {**VERSIONS, "weights": "xyz"}, resume=True)
    assert "torch" not in str(caught.value)
    with pytest.raises(ValueError, match="limit is None there and 5 now"):
        folder.open(EvalConfig("demo", "bundled", limit=5), VERSIONS, resume=True)
    folder.open(CONFIG, {**VERSIONS, "weights": "xyz"}, resume=False)
    assert PredictionStore(folder.predictions).read() == {}
    folder.open(CONFIG, {**VERSIONS, "weights": "xyz"}, resume=True)


def test_predictions_of_unknown_origin_are_refused(folder):
    PredictionStore(folder.predictions).append("s", [row(1)])
    with pytest.raises(ValueError, match=r"holds predictions but no config.json.*--no-resume"):
        folder.open(CONFIG, VERSIONS, resume=True)


def test_a_damaged_configuration_is_named(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged; start anew with --no-resume"):
        folder.open(CONFIG, VERSIONS, resume=True)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file is in its place"), RunFolder(tmp_path / "file", CONFIG, "x").locked():
        pass


def test_two_runs_do_not_share_a_folder(folder):
    code = (
        "import sys; from filelock import FileLock, Timeout\n"
        "try: FileLock(sys.argv[1]).acquire(timeout=0)\n"
        "except Timeout: sys.exit(7)\n"
    )
    with folder.locked():
        command = [sys.executable, "-c", code, str(folder.path / ".lock")]
        assert subprocess.run(command, check=False).returncode == 7
    with folder.locked():
        pass
