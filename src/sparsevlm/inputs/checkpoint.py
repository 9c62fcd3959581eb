"""A checkpoint on disk or on the hub: where it is, what it is, its model."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from ..bundled import BUNDLED, bundled_path
from ..smol import smol_path
from .device import check_attention, pick_device
from .torchvision_guard import torchvision_works

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "float16", "bfloat16")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
SMOL = "smol"  # the name of the checkpoint that `sparsevlm smol-weights` writes
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


def checkpoint_folder(path_or_id: str | Path, *, weights: bool = True, local_files_only: bool = False) -> Path:
    """Return the folder of a checkpoint; only a hub id that is no folder here may use the network.

    Parameters
    ----------
    path_or_id : str or Path
        A folder, a hub id such as ``Qwen/Qwen2.5-VL-3B-Instruct``, ``"bundled"``, the model of this package, or
        ``"smol"``, which ``sparsevlm smol-weights`` writes.
    weights : bool
        Whether a hub id brings its safetensors files, too. Without, a folder with a processor alone will do.
    local_files_only : bool
        Whether a hub id must come from the local hub cache.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or the hub does not give the id.
    ValueError
        If the folder is none of a model.
    """
    if path_or_id == BUNDLED:
        return bundled_path()
    path = smol_path() if path_or_id == SMOL else Path(path_or_id)
    if path.is_file():
        raise ValueError(f"{path} is a file; give the folder of a model in Hugging Face layout.")
    if not path.is_dir():
        if not _HUB_ID.fullmatch(str(path_or_id)):
            raise FileNotFoundError(f"model {path_or_id} is neither a folder nor a hub id (owner/name).")
        path = _from_hub(str(path_or_id), weights, local_files_only)
    wanted = ("config.json",) if weights else ("config.json", "processor_config.json")
    if not any((path / name).is_file() for name in wanted):
        raise ValueError(f"{path} is no model folder: it has no {' and no '.join(wanted)}.")
    return path


def read_model_type(folder: Path) -> str:
    """Return ``model_type`` of a checkpoint folder.

    Raises
    ------
    ValueError
        If ``config.json`` cannot be read or names no type.
    """
    config = read_json(folder / "config.json")
    if not isinstance(model_type := config.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} names no model_type.")
    return model_type


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; ``{}`` where the file does not exist, ``ValueError`` where it is something else."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a JSON file: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return data


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "sdpa",
    local_files_only: bool = False,
) -> Any:
    """Load a vision-language model for inference from safetensors files.

    Parameters
    ----------
    path_or_id : str or Path
        A folder, a hub id, or ``"smol"``.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        ``"auto"``: as stored.
    device : str
        ``"auto"``: CUDA where there is a GPU, else the CPU.
    attn_implementation : str
        As in ``from_pretrained``, but for kernels on the hub, which are refused.
    local_files_only : bool
        Whether a hub id must come from the local hub cache.

    Raises
    ------
    FileNotFoundError, ValueError
        If the checkpoint is missing, incomplete or damaged, or an option is unknown.
    NotImplementedError
        If its model type is not supported.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    folder = checkpoint_folder(path_or_id, local_files_only=local_files_only)
    _check_model_type(folder)
    target = pick_device(device)
    torchvision_works()
    check_attention(attn_implementation, target)
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}") from error
    except ImportError as error:
        raise ValueError(f"the model in {folder} cannot be made with attn {attn_implementation!r}: {error}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"the weights in {folder} are incomplete: {len(missing)} are missing, first {missing[0]}.")
    return model.to(target).eval()


def load_skeleton(folder: Path) -> Any:
    """Make the model of a checkpoint folder without its weights, to learn in no time what it can be asked to do.

    Raises
    ------
    NotImplementedError
        If its model type is not supported.
    """
    _check_model_type(folder)
    torchvision_works()
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _check_model_type(folder: Path) -> None:
    from ..models import supported_model_types

    if (model_type := read_model_type(folder)) not in (supported := supported_model_types()):
        raise NotImplementedError(
            f"{folder} holds a model of type {model_type!r}; supported are {', '.join(supported)}."
        )


def _from_hub(hub_id: str, weights: bool, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    logger.info("%s is no folder here: asking the hub", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=local_files_only))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"model {hub_id} is no folder here and the hub does not give it: {reason}") from error
