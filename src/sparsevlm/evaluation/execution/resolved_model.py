"""Resolved models: checkpoint folder, device and dtype of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...inputs import checkpoint_folder, pick_device
from ...inputs.checkpoint import read_json
from ..settings import EvalConfig


@dataclass(frozen=True)
class ResolvedModel:
    """Model with its folder, device and dtype, none of them ``"auto"``.

    Attributes
    ----------
    name : str
        Short, for folders and tables.
    folder : Path
    device, dtype : str
    """

    name: str
    folder: Path
    device: str
    dtype: str


def resolve_model(config: EvalConfig) -> ResolvedModel:
    """Resolves the model of a configuration; ``"bundled"`` is the model of this package.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such checkpoint or device.
    """
    folder = checkpoint_folder(config.model)
    device = pick_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        # bfloat16, as most checkpoints are stored, is slow on most CPUs.
        stored = read_json(folder / "config.json")
        dtype = "float32" if device == "cpu" else str(stored.get("dtype") or stored.get("torch_dtype") or dtype)
    return ResolvedModel(Path(config.model).name, folder, device, dtype)
