"""``sparsevlm demo``: on a stand-in of random weights always, on the bundled model where it is installed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sparsevlm.bundled
from sparsevlm import Report
from sparsevlm.cli import app
from sparsevlm.cli.demo import ABOUT_TIME, TASK_ORDER
from sparsevlm.cli.run import NOT_MEANINGFUL
from sparsevlm.scenes import SINGLE_TASKS, draw_scene
from tiny_checkpoint import save_tiny_checkpoint

needs_weights = pytest.mark.skipif(
    not (Path(sparsevlm.bundled.__file__).parent / "config.json").is_file(), reason="the bundled model is not here"
)


def call(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    folder = save_tiny_checkpoint(tmp_path / "stand-in", n_layers=21)
    monkeypatch.setattr(sparsevlm.bundled, "bundled_path", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_task_can_be_asked():
    assert sorted(TASK_ORDER) == sorted(SINGLE_TASKS)


def test_table_and_files(stand_in):
    result = call("demo", "--seed", 3, "--keep", 0.7)
    assert result.exit_code == 0, result.stderr
    scene = draw_scene(3)
    words = " ".join(result.stdout.split())
    assert scene.question("number").answer in words
    assert ABOUT_TIME in words
    out = stand_in / "sparsevlm-demo"
    assert sorted(file.name for file in out.iterdir()) == [
        "count.report.json",
        "list.report.json",
        "number.report.json",
        "overlay.png",
        "scene.png",
    ]
    assert Image.open(out / "scene.png").tobytes() == scene.image.tobytes()
    drawn = CliRunner().invoke(
        app, ["visualize", str(out / "number.report.json"), "--image", str(out / "scene.png"), "--out", "again.png"]
    )
    assert drawn.exit_code == 0, drawn.stderr
    scene.image.rotate(180).save("other.png")
    refused = CliRunner().invoke(
        app, ["visualize", str(out / "number.report.json"), "--image", "other.png", "--out", "v.png"]
    )
    assert refused.exit_code == 2
    assert "is not the one that the report was made with" in refused.stderr


def test_json(stand_in, monkeypatch):
    monkeypatch.setattr("sparsevlm.cli.busy.busy_advice", lambda threads, *_: f"{threads} thread waits")
    result = call("demo", "--json", "--questions", 1, "--keep", 0.7, "--selector", "random", "--out", "folder")
    assert result.exit_code == 0, result.stderr
    assert "warning: 1 thread waits" in result.stderr
    data = json.loads(result.stdout)
    (asked,) = data["questions"]
    assert (data["selector"], data["dtype"], asked["task"], asked["right"]) == (
        "random",
        "float32",
        "number",
        draw_scene(data["seed"]).question("number").answer,
    )
    assert asked["average_in"] < asked["visual_tokens"]
    assert asked["kv_bytes"]["sparse"] < asked["kv_bytes"]["dense"]
    assert all(asked[name]["first_token_ms"] <= asked[name]["total_ms"] for name in ("dense", "pruned"))
    assert all(Path(file).is_file() for file in data["files"])
    assert Report.from_json("folder/number.report.json").selector == "random"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed must lie in"),
        (["--keep", "0.03", "--selector", "span"], "Feasible"),
        (["--selector", "best"], "there is no selector 'best'"),
        (["--out", "stand-in/config.json"], "a file is in its place"),
    ],
)
def test_mistakes(stand_in, arguments, message):
    result = call("demo", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_without_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sparsevlm.bundled, "files", lambda _: tmp_path)
    result = call("demo")
    assert result.exit_code == 2
    assert "no bundled model" in result.stderr


@pytest.fixture(scope="module")
def four_questions(tmp_path_factory):
    """What the demo prints as JSON, and its folder."""
    out = tmp_path_factory.mktemp("demo")
    result = call("demo", "--json", "--questions", 4, "--out", out)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["questions"], out


@needs_weights
def test_the_bundled_model_answers(four_questions):
    """One scene shows that everything fits together; accuracy is measured on many, elsewhere."""
    asked, _ = four_questions
    assert [one["task"] for one in asked] == list(TASK_ORDER[:4])
    assert sum(one["dense"]["text"] == one["right"] for one in asked) >= 3
    assert all(one["average_in"] == pytest.approx(64, abs=1) for one in asked)
    assert sum(one["pruned"]["text"] == one["right"] for one in asked) >= 3


def panels(picture):
    """The square panels of an overlay, row by row, as pixels: where nearly nothing is white."""
    pixels = np.asarray(picture.convert("RGB"))
    ink = (pixels < 250).any(axis=2)
    rows = runs(ink[:, ink.shape[1] // 4 : ink.shape[1] // 3].mean(axis=1) > 0.9)
    columns = [runs(ink[top:bottom].mean(axis=0) > 0.9) for top, bottom in rows]
    return [
        [pixels[top:bottom, left:right] for left, right in of_row]
        for (top, bottom), of_row in zip(rows, columns, strict=True)
    ]


def runs(is_in, least=100):
    """First places and ends of the long runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_in.astype(int), [0]])))
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > least]


def n_bright(panel, n_cells):
    """Cells of a panel that are not darkened, by the inner pixels of each."""
    side = len(panel) / n_cells
    insides = [slice(int(n * side) + 6, int((n + 1) * side) - 5) for n in range(n_cells)]
    cells = [panel[rows, columns] for rows in insides for columns in insides]
    return sum(bool(np.median(cell.max(axis=2)) > 90) for cell in cells)


@needs_weights
def test_the_picture_of_the_readme_is_what_the_demo_draws(four_questions):
    """By its counts: CONTRIBUTING.md has the command that draws it anew."""
    _, out = four_questions
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    ((alt, path),) = re.findall(r"!\[(.*)\]\((docs/images/demo.*)\)", readme)
    drawn = panels(Image.open(Path(__file__).parents[2] / path))
    assert len(drawn) == 3
    for task, (original, *changes) in zip(TASK_ORDER, drawn, strict=False):
        (sample,) = Report.from_json(out / f"{task}.report.json").samples
        counts = [stage.n_kept for stage in sample.stages]
        assert n_bright(original, 16) == sample.n_visual == 256
        assert [n_bright(panel, 16) for panel in changes] == list(dict.fromkeys(counts))
        assert ("recycled" in alt) == any(stage.n_recycled for stage in sample.stages)


@needs_weights
def test_the_bundled_model_on_a_photograph_is_labelled(tmp_path):
    Image.effect_noise((600, 400), 80).convert("RGB").save(tmp_path / "photo.jpg")
    options = ["--image", tmp_path / "photo.jpg", "--prompt", "What number is on the red card?", "--keep", 0.5]
    result = call(
        "run", "--model", "bundled", *options, "--picture", tmp_path / "p.png", "--report", tmp_path / "r.json"
    )
    assert result.exit_code == 0, result.stderr
    assert NOT_MEANINGFUL in result.output
    assert "model bundled, device cpu, dtype float32" in result.stdout, "as in the demo"
    assert Report.from_json(tmp_path / "r.json").average_in < Report.from_json(tmp_path / "r.json").n_visual
