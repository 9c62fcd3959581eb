"""Datasets of one's own: every shape of a row, and every way in which one can be wrong."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from sparsevlm.evaluation.suites.local import LocalSuite

ANSWER = {"question": "What?", "answer": "red"}


def picture(colour="red", size=(60, 40)):
    return Image.new("RGB", size, colour)


def encoded(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def desk(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture().save(tmp_path / "pictures" / "a.png")
    picture("blue").save(tmp_path / "pictures" / "b.jpg")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes(encoded(noise)[:400])
    (tmp_path / "text.png").write_text("no picture")
    picture(size=(603, 3)).save(tmp_path / "strip.png")
    return tmp_path


def write_jsonl(desk, rows, name="data.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (desk / name).write_text("\n".join(lines) + "\n")
    return desk / name


def write_parquet(desk, rows, name="data.parquet", row_group_size=2):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), desk / name, row_group_size=row_group_size)
    return desk / name


def all_rows(suite):
    return [row for task in suite.tasks for row in suite.rows(task, None)]


def test_jsonl(desk):
    file = write_jsonl(
        desk,
        [
            {"image": "pictures/a.png", **ANSWER},
            "",
            {"images": ["pictures/a.png", str(desk / "pictures/b.jpg")], "question": "Both?", "answers": ["yes", 2]},
            {"image": "pictures/b.jpg", **ANSWER, "id": "last", "task": "colours", "metric": "anls", "other": 1},
        ],
    )
    pytest.importorskip("anls_star")
    suite = LocalSuite(file)
    assert suite.name == "data"
    assert suite.tasks == ("data", "colours")
    assert [row.id for row in all_rows(suite)] == ["1", "3", "last"]
    first, both, last = (row.load() for row in all_rows(suite))
    assert first.images[0].tobytes() == picture().tobytes()
    assert (first.question, first.answers, first.metric) == ("What?", ("red",), "exact")
    assert [image.size for image in both.images] == [(60, 40), (60, 40)]
    assert both.answers == ("yes", "2")
    assert last.metric == "anls"
    assert (suite.n_rows("data", None), suite.n_rows("data", 1)) == (2, 1)
    assert [row.id for row in suite.rows("data", 1)] == ["1"]


def test_parquet(desk):
    rows = [
        {"image": {"bytes": encoded(picture()), "path": None}, **ANSWER, "task": "one"},
        {"image": {"bytes": None, "path": "pictures/b.jpg"}, **ANSWER, "task": "two"},
        {"image": {"bytes": encoded(picture("green"), "JPEG"), "path": "x.jpg"}, **ANSWER, "task": "one"},
    ]
    suite = LocalSuite(write_parquet(desk, rows))
    assert suite.tasks == ("one", "two")
    assert [row.id for row in all_rows(suite)] == ["0", "2", "1"]
    colours = [row.load().images[0].getpixel((5, 5)) for row in all_rows(suite)]
    assert colours[0] == (255, 0, 0)
    assert colours[1][1] > 100
    assert colours[2][2] > 200


def test_parquet_with_bytes_and_lists(desk):
    rows = [{"images": [encoded(picture()), encoded(picture("blue"))], "question": "Both?", "answers": ["yes"] * 4}]
    (row,) = all_rows(LocalSuite(write_parquet(desk, rows), "vqa"))
    sample = row.load()
    assert len(sample.images) == 2
    assert (sample.answers, sample.metric) == (("yes",) * 4, "vqa")


def test_a_datasets_image_column(desk):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [picture()], "question": ["What?"], "answers": [["red"]]})
    data.cast_column("image", datasets.Image()).to_parquet(desk / "hub.parquet")
    (row,) = all_rows(LocalSuite(desk / "hub.parquet"))
    assert row.load().images[0].getpixel((0, 0)) == (255, 0, 0)


BAD = [
    ({**ANSWER}, "has no image; give a path or bytes in the column 'image', or a list of them in 'images'"),
    ({"images": [], **ANSWER}, "has no image"),
    ({"image": None, **ANSWER}, "has no image"),
    ({"image": "missing.png", **ANSWER}, "missing.png does not exist"),
    ({"image": "pictures", **ANSWER}, "is a folder, not a picture"),
    ({"image": "text.png", **ANSWER}, "is not an image that Pillow can read"),
    ({"image": "broken.png", **ANSWER}, "is a damaged image"),
    ({"image": "https://example.org/a.png", **ANSWER}, "is on the network; download it"),
    (
        {"image": "strip.png", **ANSWER},
        "has an image of 603x3 pixels, and the model takes sides of up to 200 to 1",
    ),
    ({"image": "pictures/a.png", "question": "<|image_pad|>?", "answer": "red"}, "has <|image_pad|> in its question"),
    ({"image": 5, **ANSWER}, "has an image of type int; give a path or the bytes"),
    ({"image": "pictures/a.png", "answer": "red"}, "has no question; give a text in the column 'question'"),
    ({"image": "pictures/a.png", "question": " ", "answer": "red"}, "has no question"),
    ({"image": "pictures/a.png", "question": "What?"}, "has no answer; give a text in the column 'answer'"),
    ({"image": "pictures/a.png", "question": "What?", "answers": []}, "has no answer"),
    ({"image": "pictures/a.png", "question": "What?", "answers": ["a", None]}, "has no answer"),
    ({"image": "pictures/a.png", "question": "What?", "answer": ""}, "has no answer"),
    ({"image": "pictures/a.png", "question": "What?", "answer": True}, "is true or false, not a text; write what"),
    ({"image": "pictures/a.png", "question": "What?", "answers": ["yes", False]}, "is true or false, not a text"),
    ({"image": "pictures/a.png", **ANSWER, "metric": "bleu"}, "there is no metric 'bleu'"),
    ({"image": "pictures/a.png", **ANSWER, "metric": "vqa"}, "at least 4 annotators"),
    ({"image": "pictures/a.png", **ANSWER, "id": "7\ud800"}, r"in the column 'id', 7\ud800; write the whole character"),
    ({"image": "pictures/a.png", "question": "What\ud83d?", "answer": "red"}, "in the column 'question'"),
    ({"image": "pictures/a.png", "question": "What?", "answers": ["red", "\ude00"]}, "in the column 'answers'"),
    ('{"image": "pictures/a.png",', "is not JSON"),
    ("[1, 2]", "is no JSON object"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_row_is_named_and_the_others_stand(desk, bad, message):
    good = {"image": "pictures/a.png", **ANSWER}
    suite = LocalSuite(write_jsonl(desk, [good, bad, good]))
    first, second, third = all_rows(suite)
    with pytest.raises(ValueError, match=r"line 2 of data\.jsonl") as caught:
        second.load()
    assert message in str(caught.value)
    assert first.load().answers == third.load().answers == ("red",)


def test_half_of_a_character_in_a_task_is_named(desk):
    good = {"image": "pictures/a.png", **ANSWER}
    suite = LocalSuite(write_jsonl(desk, [good, {**good, "task": "colours\udfff"}]))
    assert suite.tasks == ("data", r"colours\udfff")
    with pytest.raises(ValueError, match=r"line 2 of data\.jsonl has half of a character .* in the column 'task'"):
        all_rows(suite)[1].load()


def test_bad_bytes_in_parquet_are_named(desk):
    rows = [{"image": b"no picture", **ANSWER}, {"image": encoded(picture()), **ANSWER}]
    first, second = all_rows(LocalSuite(write_parquet(desk, rows)))
    with pytest.raises(
        ValueError, match=r"row 0 of data.parquet has an unusable image: what its bytes hold is not an image"
    ):
        first.load()
    assert second.load().images[0].size == (60, 40)


def test_deep_greys_are_scaled_and_floats_refused(desk):
    deep, floats = Image.new("I;16", (60, 40), 128 * 257), Image.new("F", (60, 40), 0.5)
    rows = [{"image": encoded(deep), **ANSWER}, {"image": encoded(floats, "TIFF"), **ANSWER}]
    first, second = all_rows(LocalSuite(write_parquet(desk, rows)))
    assert first.load().images[0].getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ValueError, match=r"row 1 of data\.parquet .* mode F, .*save the picture with 8"):
        second.load()


def test_black_ink_on_a_transparent_ground(desk):
    layer = Image.new("RGBA", (224, 224), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (80, 80, 160, 160))
    layer.save(desk / "ink.png")
    path = {"image": "ink.png", **ANSWER}
    (row,) = all_rows(LocalSuite(write_jsonl(desk, [path])))
    assert np.unique(np.asarray(row.load().images[0])).tolist() == [0, 255]
    (row,) = all_rows(LocalSuite(write_parquet(desk, [{"image": encoded(layer), **ANSWER}])))
    assert np.unique(np.asarray(row.load().images[0])).tolist() == [0, 255]


def test_addresses_of_images(desk):
    data = base64.b64encode(encoded(picture())).decode()
    rows = [
        {"image": (desk / "pictures" / "a.png").as_uri(), **ANSWER},
        {"image": f"data:image/png;base64,{data}", **ANSWER},
        {"image": data, **ANSWER},
    ]
    for row in all_rows(LocalSuite(write_jsonl(desk, rows))):
        assert row.load().images[0].tobytes() == picture().tobytes()


def test_the_first_of_several_frames_is_said(desk):
    picture().save(desk / "several.gif", save_all=True, append_images=[picture("blue")])
    (row,) = all_rows(LocalSuite(write_jsonl(desk, [{"image": "several.gif", **ANSWER}])))
    with pytest.warns(UserWarning, match=r"^sparsevlm: .*several\.gif has 2 frames or pages, and the first is read"):
        assert row.load().images[0].getpixel((0, 0)) == (255, 0, 0)


def test_a_strip_that_the_model_takes(desk):
    picture(size=(600, 3)).save(desk / "longest.png")
    (row,) = all_rows(LocalSuite(write_jsonl(desk, [{"image": "longest.png", **ANSWER}])))
    assert row.load().images[0].size == (600, 3)


def test_an_empty_list_of_answers_gives_way_to_the_answer(desk):
    (row,) = all_rows(LocalSuite(write_jsonl(desk, [{"image": "pictures/a.png", **ANSWER, "answers": []}])))
    assert row.load().answers == ("red",)


def test_an_id_twice_is_named(desk):
    good = {"image": "pictures/a.png", **ANSWER}
    rows = [{**good, "id": 7}, {**good, "id": "8"}, {**good, "id": "7"}, {**good, "id": 7, "task": "other"}]
    found = all_rows(LocalSuite(write_jsonl(desk, rows)))
    assert len({(row.task, row.id) for row in found}) == 4
    with pytest.raises(ValueError, match=r"line 3 of data.jsonl has the id '7' of line 1 of data.jsonl; make ids"):
        found[2].load()
    assert found[3].load().answers == ("red",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl does not exist"),
        (".", None, "is a folder, not a dataset; give a .jsonl or .parquet file"),
        ("empty.jsonl", "\n", "holds no rows"),
        ("data.csv", "image,question", "must end in .jsonl or .parquet"),
        ("text.parquet", "no parquet", "is not a parquet file"),
        (
            "average.jsonl",
            "{}",
            "line 1 of average.jsonl is of the task 'average', as the mean over all tasks is called",
        ),
        ("data.jsonl", '{}\n{"task": "average"}', "line 2 of data.jsonl is of the task 'average'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LocalSuite(tmp_path / name)


def test_a_missing_package_is_named_with_its_pip_line(desk, monkeypatch):
    (desk / "data.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'pyarrow"):
        LocalSuite(desk / "data.parquet")


def test_another_file_has_another_fingerprint(desk):
    one = LocalSuite(write_jsonl(desk, [{"image": "pictures/a.png", **ANSWER}])).fingerprint()
    other = LocalSuite(write_jsonl(desk, [{"image": "pictures/b.jpg", **ANSWER}])).fingerprint()
    assert one != other
