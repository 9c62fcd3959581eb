"""What is said where the processor of a checkpoint does not load."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from sparsevlm.cli import app
from sparsevlm.inputs import load_processor, processor

NO_TORCHVISION = ImportError("Qwen3VLVideoProcessor requires the Torchvision library but it was not found.")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    return tmp_path


@pytest.mark.parametrize(
    ("error", "works", "kind", "said"),
    [
        (
            NO_TORCHVISION,
            False,
            ImportError,
            r"\(qwen3_vl\) needs torchvision.*pip install torchvision.*sparsevlm\[cli\]",
        ),
        (ImportError("Package `num2words` is required"), True, ImportError, r"a package that is missing.*num2words"),
        (OSError("no file tokenizer.json"), True, ValueError, r"no processor that loads: no file tokenizer\.json"),
    ],
)
def test_the_remedy_is_said(folder, monkeypatch, error, works, kind, said):
    def fails(_):
        raise error

    monkeypatch.setattr(processor, "_auto_processor", fails)
    monkeypatch.setattr(processor, "torchvision_works", lambda: works)
    with pytest.raises(kind, match=said):
        load_processor(folder)


def test_commands_say_it_in_a_line(folder, monkeypatch, tmp_path):
    def fails(_):
        raise NO_TORCHVISION

    monkeypatch.setattr(processor, "_auto_processor", fails)
    monkeypatch.setattr(processor, "torchvision_works", lambda: False)
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    (tmp_path / "report.json").write_text("{}")
    files = [str(tmp_path / name) for name in ("report.json", "picture.png", "drawn.png")]
    result = CliRunner().invoke(
        app, ["visualize", files[0], "--image", files[1], "--out", files[2], "--model", str(folder)]
    )
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the processor of")
    assert "needs torchvision" in result.stderr
