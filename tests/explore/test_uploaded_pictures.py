"""What the page takes as a picture and a question, and what it says of anything else."""

import pytest
from PIL import Image

from sparsevlm.explore import question as limits
from sparsevlm.explore.question import Question, read_picture

PICTURE = Image.linear_gradient("L").convert("RGB")


def test_a_picture_is_read_upright_and_as_rgb(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned
    Image.new("L", (40, 20), 99).save(tmp_path / "grey.jpg", exif=exif)
    picture = read_picture(str(tmp_path / "grey.jpg"))
    assert (picture.mode, picture.size) == ("RGB", (20, 40))


def test_what_is_no_picture_is_said_without_the_path_on_the_server(tmp_path):
    (tmp_path / "notes.txt").write_text("words " * 40)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (603, 3)).save(tmp_path / "strip.png")
    for name, message in (
        ("notes.txt", "is not an image that Pillow can read: it is a text file; give an image file."),
        ("broken.png", "is a damaged image: "),
        ("empty.png", "it is empty; download or save it again"),
        ("strip.png", "has 603x3 pixels, and the model takes sides of up to 200 to 1; crop it."),
    ):
        with pytest.raises(ValueError, match=f"^{name} ") as raised:
            read_picture(str(tmp_path / name))
        assert message in str(raised.value)
        assert str(tmp_path) not in str(raised.value)


def test_too_many_pixels_are_refused_by_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_PIXELS", 2_000_000)
    monkeypatch.setattr(limits, "decode", lambda *_: pytest.fail("it was decoded"))
    Image.new("RGB", (2000, 1001)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"large.png has 2000x1001 pixels; the page takes up to 2 million: save it"):
        read_picture(str(tmp_path / "large.png"))


def test_nothing_is_said_to_be_missing():
    with pytest.raises(ValueError, match="there is no picture"):
        read_picture(None)
    with pytest.raises(ValueError, match="there is no question"):
        Question(PICTURE, "  \n", 8)
    with pytest.raises(ValueError, match="the question has 4001 characters; the page takes up to 4000"):
        Question(PICTURE, "x" * 4001, 8)


def test_questions_are_equal_where_picture_words_and_length_are():
    question = Question(PICTURE, "What?", 8)
    assert question == Question(PICTURE.copy(), "What?", 8)
    assert question != Question(Image.new("RGB", PICTURE.size), "What?", 8)
    assert question != Question(PICTURE, "What?", 9)
