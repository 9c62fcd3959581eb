"""The small vision-language model that ships with the package, in Hugging Face layout."""

from importlib.resources import files
from pathlib import Path

BUNDLED = "bundled"  # its name where a checkpoint is named


def bundled_path() -> Path:
    """Folder to pass to ``from_pretrained``.

    Raises
    ------
    FileNotFoundError
        If the package was installed without its data or from a zip archive.
    """
    path = Path(str(files(__name__)))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no bundled model in {path}; reinstall sparsevlm from a wheel or a full checkout")
    return path


__all__ = ["BUNDLED", "bundled_path"]
