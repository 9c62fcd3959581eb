"""The callable class by itself: which pictures it reads, what becomes of rows that fail, what it adds. Needs no Ray."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from sparsevlm import SparseVLMConfig
from sparsevlm.ray import SparseVLMPredictor
from sparsevlm.ray.columns import TYPES, RowReader
from sparsevlm.scenes import draw_scene
from tiny_checkpoint import save_tiny_checkpoint

pa = pytest.importorskip("pyarrow")

QUESTION = "How many red circles are there?"
NEW = list(TYPES)
LARGE, SMALL = 8, 6  # sides of pictures, in visual tokens


def scene(side):
    return draw_scene(side).image.resize((28 * side, 28 * side))


def png(side):
    file = io.BytesIO()
    scene(side).save(file, "PNG")
    return file.getvalue()


def table(*images, questions=QUESTION, **columns):
    questions = [questions] * len(images) if isinstance(questions, str) else questions
    return pa.table({"id": list(range(len(images))), "image": pa.array(images), "question": questions, **columns})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return SparseVLMPredictor(
        checkpoint, pruning={"keep": 0.6, "min_keep": 4}, generation={"max_new_tokens": 3, "min_new_tokens": 3}
    )


@pytest.fixture(scope="module")
def answers(predictor):
    """Answer by side of the picture, each asked by itself."""
    return {side: predictor(table(png(side)))["answer"][0].as_py() for side in (LARGE, SMALL)}


@pytest.fixture
def generating(predictor, monkeypatch):
    """Puts a function in front of ``generate`` that is told the number of rows, and returns the numbers it was told."""

    def put(before):
        generate, sizes = predictor.model.generate, []

        def counted(**inputs):
            sizes.append(len(inputs["input_ids"]))
            before(sizes[-1])
            return generate(**inputs)

        monkeypatch.setattr(predictor.model, "generate", counted)
        return sizes

    return put


def read(value, folder=None):
    """Images of a row whose column holds a value."""
    row = {"image": np.array(None)}  # stands for an Arrow column of any type
    row["image"] = [type("Scalar", (), {"as_py": lambda self: value})()]
    return RowReader("image", None, QUESTION, folder, ()).read(row, 0).images


def test_pictures_of_every_kind_are_the_same(tmp_path):
    picture = scene(LARGE)
    (tmp_path / "scene.png").write_bytes(png(LARGE))
    pixels = np.asarray(picture)
    kinds = [
        png(LARGE),
        str(tmp_path / "scene.png"),
        "scene.png",
        {"bytes": png(LARGE), "path": "gone.png"},
        {"bytes": None, "path": str(tmp_path / "scene.png")},
        pixels,
        pixels.transpose(2, 0, 1),
        pixels.astype(np.int64),
        picture,
    ]
    for kind in kinds:
        (image,) = read(kind, tmp_path)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels), type(kind)
    grey = np.asarray(picture.convert("L"))
    assert np.array_equal(np.asarray(read(grey)[0]), np.repeat(grey[..., None], 3, axis=2))
    assert len(read(kinds, tmp_path)) == len(kinds)
    assert len(read(np.stack([pixels, pixels]))) == 2
    assert read([]) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the row has no image in the column 'image'; leave the row out, or give an empty list"),
        ([None], "the row has no image"),
        ({"bytes": None, "path": None}, "the row has no image"),
        (5, "the row has an image of type int"),
        (b"text", "the row has an unusable image: what its bytes hold is not an image"),
        ("gone.png", "the row has an unusable image: .*gone.png does not exist"),
        ("s3://bucket/a.png", "the row has an unusable image: .* is on the network"),
        (np.zeros((8, 8, 3), np.float32), "the row has an unusable image: it is an array of float32; scale it to 0"),
        (np.full((8, 8), 300, np.uint16), "unusable image: it is an array of uint16 from 300 to 300; scale it"),
        (np.zeros((8, 8, 2), np.uint8), "the row has an unusable image: it must be an array of"),
        (np.zeros((2, 900, 3), np.uint8), "the row has an image of 900x2 pixels"),
    ],
)
def test_what_is_no_picture_says_so(value, message):
    with pytest.raises(ValueError, match=message):
        read(value)


def test_rows_order_and_columns_are_kept(predictor, answers):
    batch = table(
        [png(LARGE)], [png(SMALL), png(LARGE)], [png(SMALL)], [png(LARGE)], extra=[{"a": [1]}, None, {"a": []}, None]
    )
    found = predictor(batch)
    assert found.select(batch.column_names).equals(batch)
    assert found.column_names == [*batch.column_names, *NEW]
    assert [found.schema.field(name).type for name in NEW] == [pa.type_for_alias(kind) for kind in TYPES.values()]
    said = found["answer"].to_pylist()
    assert [said[0], *said[2:]] == [answers[LARGE], answers[SMALL], answers[LARGE]]
    assert found["visual_tokens"].to_pylist() == [LARGE**2, SMALL**2 + LARGE**2, SMALL**2, LARGE**2]
    assert found["error"].null_count == 4


def test_a_row_by_itself_has_the_figures_of_its_report(predictor):
    (row,) = predictor(table(png(LARGE))).to_pylist()
    report = predictor.state.report
    assert (row["visual_tokens"], row["kept_tokens"]) == (LARGE**2, report.average_in)
    assert row["pruning_path"] == report.path == "plain"
    assert (row["kv_bytes_sparse"], row["kv_bytes_dense"]) == (report.kv_bytes.sparse, report.kv_bytes.dense)
    assert row["kv_bytes_sparse"] < row["kv_bytes_dense"]
    assert 0 < row["seconds"] < 60


def test_the_shares_of_a_batch_sum_up_to_it(predictor):
    found = predictor(table(png(LARGE), png(SMALL)))
    total = predictor.state.report.kv_bytes
    assert sum(found["kv_bytes_sparse"].to_pylist()) == total.sparse
    assert sum(found["kv_bytes_dense"].to_pylist()) == total.dense


def test_a_row_without_images_beside_one_with(predictor, answers):
    found = predictor(table([], [png(LARGE)], []))
    assert found["visual_tokens"].to_pylist() == [0, LARGE**2, 0]
    assert found["kept_tokens"].to_pylist()[0] == 0
    assert found["answer"].to_pylist()[1] == answers[LARGE]
    assert found["error"].null_count == 3


def test_rows_that_fail_leave_the_others_alone(predictor, answers):
    questions = [QUESTION, "  ", None, QUESTION, "<|image_pad|> what?"]
    found = predictor(table(png(LARGE), png(LARGE), png(LARGE), b"broken", png(SMALL), questions=questions))
    assert found["answer"].to_pylist() == [answers[LARGE], None, None, None, None]
    reasons = found["error"].to_pylist()
    assert reasons[0] is None
    assert reasons[1] == reasons[2] == "ValueError: the row has no question; give a text in the column 'question'"
    assert reasons[3].startswith("ValueError: the row has an unusable image")
    assert reasons[4].startswith("ValueError: the row has <|image_pad|> in its question")
    assert found["seconds"].null_count == found["pruning_path"].null_count == 4


def test_files_agree_about_types_whatever_failed(predictor):
    good, bad = predictor(table(png(LARGE))), predictor(table(b"broken"))
    assert good.schema.equals(bad.schema)
    assert good.slice(0, 0).schema.equals(predictor(table(png(LARGE)).slice(0, 0)).schema)


def test_a_batch_that_is_too_large_is_halved(predictor, answers, generating):
    def too_large(n_rows):
        if n_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    sizes = generating(too_large)
    sides = [LARGE, SMALL, LARGE, SMALL, LARGE]
    found = predictor(table(*map(png, sides)))
    assert sizes == [5, 2, 3, 1, 2]
    assert found["answer"].to_pylist() == [answers[side] for side in sides]


def test_a_row_that_fails_in_generate_is_found(predictor, answers, monkeypatch):
    answered = predictor._answered

    def fails(asked):
        if any(one.question == "bad" for one in asked):
            raise RuntimeError("no answer to this")
        return answered(asked)

    monkeypatch.setattr(predictor, "_answered", fails)
    batch = table(*map(png, (LARGE, SMALL, LARGE)), questions=[QUESTION, "bad", QUESTION])
    found = predictor(batch)
    assert found["answer"].to_pylist() == [answers[LARGE], None, answers[LARGE]]
    assert found["error"].to_pylist() == [None, "RuntimeError: no answer to this", None]
    monkeypatch.setattr(predictor, "_on_error", "raise")
    with pytest.raises(RuntimeError, match="a row cannot be answered: RuntimeError: no answer to this"):
        predictor(batch)
    with pytest.raises(RuntimeError, match="a row cannot be answered: ValueError: the row has an unusable image"):
        predictor(table(b"broken"))


def test_a_broken_gpu_is_no_rows_fault(predictor, generating):
    def broken(n_rows):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    sizes = generating(broken)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        predictor(table(png(LARGE), png(SMALL)))
    assert sizes == [2]


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"image": [], "question": []}, TypeError, r"a batch must be a pyarrow.Table, got dict: pass batch_format="),
        (pa.table({"question": ["?"]}), ValueError, "no column 'image', it has question; name another by image_column"),
        (pa.table({"image": [b""]}), ValueError, "no column 'question', it has image; name another by question_column"),
        (table(b"", answer=["7"]), ValueError, "the dataset has 'answer' already.*choose an output_prefix"),
    ],
)
def test_a_batch_of_another_make_is_refused(predictor, batch, error, message):
    with pytest.raises(error, match=message):
        predictor(batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_error": "skip"}, ValueError, "on_error must be one of 'raise', 'column', got 'skip'"),
        ({"pruning": {"processor": 1}}, TypeError, "pruning holds processor, which is loaded with the model"),
        ({"generation": {"max_token": 3}}, TypeError, r"unknown generation option max_token \(did you mean 'max_"),
        ({"generation": {"num_return_sequences": 2}}, ValueError, "num_return_sequences changes what generate returns"),
        ({"generation": {"max_new_tokens": 0}}, ValueError, "max_new_tokens"),
    ],
)
def test_mistaken_options_are_refused_before_a_model_is_loaded(options, error, message):
    with pytest.raises(error, match=message):
        SparseVLMPredictor("no/such/folder", **options)


def test_options_reach_model_processor_and_prompt(checkpoint, monkeypatch):
    made = SparseVLMPredictor(
        checkpoint,
        pruning={"config": SparseVLMConfig(selector="random", keep=0.5, min_keep=4)},
        generation={"num_beams": 2, "stop_strings": ["5"], "max_new_tokens": 2},
        image_column="picture",
        question=QUESTION,
        system_prompt="You read cards.",
        output_prefix="model_",
        max_pixels=5 * 5 * 28**2,
    )
    prompts = []
    render = made.processor.apply_chat_template
    monkeypatch.setattr(
        made.processor, "apply_chat_template", lambda *a, **k: (prompts.append(render(*a, **k)), prompts[-1])[1]
    )
    found = made(pa.table({"picture": [png(LARGE), png(SMALL)], "answer": ["354", "132"]}))
    assert found.column_names == ["picture", "answer", *("model_" + name for name in NEW)]
    assert found["model_error"].null_count == 2
    assert max(found["model_visual_tokens"].to_pylist()) <= 25
    kept = found["model_kept_tokens"].to_pylist()
    assert kept == pytest.approx([count / 2 for count in found["model_visual_tokens"].to_pylist()], abs=1)
    assert made.state.report.selector == "random"
    assert all("You read cards." in prompt and QUESTION in prompt for prompt in prompts)
    assert len(prompts) == 2
