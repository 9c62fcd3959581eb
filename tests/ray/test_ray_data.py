"""Whole jobs of Ray Data on one machine: two actors, one that dies, and a job that is begun again."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

ray_data = pytest.importorskip("ray.data")  # tests/ray by itself would do for "ray"

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402

from sparsevlm.ray import SparseVLMPredictor  # noqa: E402
from sparsevlm.scenes import draw_scene  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # seconds; actors start slowly where cores are few
QUESTION = "Read the number on the blue card."
OPTIONS = {"model": "bundled", "pruning": {"keep": 0.25}, "generation": {"max_new_tokens": 4}}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not find this file
    ray.init(num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def questions(folder, n_files, n_rows):
    """Parquet files with ``n_rows`` rows each, one scene for all of them."""
    file = folder / "scene.png"
    draw_scene(8).image.save(file)
    picture = {"bytes": file.read_bytes(), "path": "scene.png"}
    (folder / "questions").mkdir()
    for number in range(n_files):
        ids = list(range(number * n_rows, (number + 1) * n_rows))
        columns = {"id": ids, "image": [picture] * n_rows, "question": [QUESTION] * n_rows}
        pq.write_table(pa.table(columns), folder / "questions" / f"{number:02}.parquet")
    return str(folder / "questions")


class Watched(SparseVLMPredictor):
    """Notes which process answered which rows; dies once at a row, where a file with its number lies ready."""

    def __init__(self, folder, **options):
        super().__init__(**options)
        self.folder = Path(folder)

    def __call__(self, batch):
        for row in batch["id"].to_pylist():
            if (bomb := self.folder / f"die-{row}").exists():
                bomb.unlink()
                os._exit(1)
        found = super().__call__(batch)
        for row in batch["id"].to_pylist():
            (self.folder / f"answered-{row}-{os.getpid()}-{time.monotonic_ns()}").touch()
        return found


def answered(folder):
    """Rows that were answered, as often as they were, and the processes that did it."""
    parts = [file.name.split("-") for file in folder.glob("answered-*")]
    return sorted(int(part[1]) for part in parts), {part[2] for part in parts}


def predict(dataset, folder, n_actors, **options):
    return dataset.map_batches(
        Watched,
        fn_constructor_kwargs={"folder": str(folder), **OPTIONS, **options},
        batch_format="pyarrow",
        batch_size=2,
        compute=ray_data.ActorPoolStrategy(size=n_actors),
        num_cpus=1,
    )


def test_two_actors_of_which_one_dies_answer_every_row_once(tmp_path):
    source = questions(tmp_path, 8, 2)
    (tmp_path / "die-7").touch()
    dataset = ray_data.read_parquet(source).repartition(target_num_rows_per_block=2)
    predict(dataset, tmp_path, 2).write_parquet(str(tmp_path / "answers"))
    assert not (tmp_path / "die-7").exists(), "no actor died"
    found = pq.read_table(tmp_path / "answers").to_pylist()
    assert sorted(row["id"] for row in found) == list(range(16))
    assert {row["answer"] for row in found} == {"354"}
    assert {row["error"] for row in found} == {None}
    assert {row["image"]["path"] for row in found} == {"scene.png"}
    rows, processes = answered(tmp_path)
    assert set(rows) == set(range(16))
    assert len(processes) >= 2


def test_a_job_that_ended_in_the_middle_goes_on_behind_what_it_has_written(tmp_path, monkeypatch):
    source, answers = questions(tmp_path, 6, 2), str(tmp_path / "answers")
    broken = tmp_path / "questions" / "05.parquet"
    whole = pq.read_table(broken)
    pictures = pa.array([{"bytes": b"broken", "path": None}] * 2, whole.schema.field("image").type)
    pq.write_table(whole.set_column(1, whole.schema.field("image"), pictures), broken)
    context = ray_data.DataContext.get_current()
    monkeypatch.setattr(context.execution_options, "preserve_order", True)
    checkpoint = ray_data.checkpoint.CheckpointConfig(id_column="id", checkpoint_path=str(tmp_path / "checkpoint"))
    monkeypatch.setattr(context, "checkpoint_config", checkpoint)

    def run():
        dataset = ray_data.read_parquet(source).repartition(target_num_rows_per_block=2)
        predict(dataset, tmp_path, 1, on_error="raise").write_parquet(answers)

    with pytest.raises(Exception, match="a row cannot be answered: ValueError: the row has an unusable image"):
        run()
    written = {row["id"] for row in pq.read_table(answers).to_pylist()}
    assert 0 < len(written) < 12
    pq.write_table(whole, broken)
    for file in tmp_path.glob("answered-*"):
        file.unlink()
    run()
    found = pq.read_table(answers).to_pylist()
    assert sorted(row["id"] for row in found) == list(range(12))
    assert answered(tmp_path)[0] == sorted(set(range(12)) - written)
