"""The processor of a checkpoint: from text and images to model inputs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .checkpoint import checkpoint_folder, read_json
from .torchvision_guard import torchvision_works

logger = logging.getLogger(__name__)

# Checkpoints and saved processors for which tokenizer and PIL image processor do what AutoProcessor's does.
_OURS = ("qwen2_vl", "qwen2_5_vl", "Qwen2VLProcessor", "Qwen2_5_VLProcessor")


def load_processor(path_or_id: str | Path, *, local_files_only: bool = False) -> Any:
    """Load what turns text and images into inputs: transformers' ``AutoProcessor``.

    Most processors need torchvision. Where that is missing or broken, :class:`ImageTextProcessor` stands in for those
    of Qwen2-VL and Qwen2.5-VL, of which the bundled model's is one. Batches are padded on the left in any case.

    Parameters
    ----------
    path_or_id : str or Path
        A folder, or a hub id; a folder never touches the network.
    local_files_only : bool
        Whether a hub id must come from the local hub cache.

    Raises
    ------
    FileNotFoundError, ValueError
        If the checkpoint is missing, or has no processor of text and images.
    ImportError
        If its processor needs a package that is not installed.
    """
    folder = checkpoint_folder(path_or_id, weights=False, local_files_only=local_files_only)
    works = torchvision_works()  # else it is hidden: transformers' models and processors die of one that is broken
    try:
        processor = _auto_processor(folder)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        processor = _in_its_place(folder, error, works)
    processor.tokenizer.padding_side = "left"
    return processor


def _auto_processor(folder: Path) -> Any:
    """transformers' own processor.

    Raises
    ------
    ImportError, OSError, RuntimeError, ValueError
        What transformers raises, and if it finds none.
    """
    from transformers import AutoProcessor, ProcessorMixin

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Without a processor config, AutoProcessor quietly returns a tokenizer or an image processor.
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{type(processor).__name__} is no processor of text and images")
    return processor


def has_own_processor(folder: Path) -> bool:
    """Tells whether :class:`ImageTextProcessor` does what the processor of a checkpoint folder does."""
    return _kind(folder) in _OURS


def _kind(folder: Path) -> str:
    """Type of the model, or class of the processor where there is no model."""
    files = (read_json(folder / name) for name in ("config.json", "processor_config.json"))
    names = [file.get(key) for file in files for key in ("model_type", "processor_class")]
    return next((name for name in names if isinstance(name, str)), "unknown")


def _in_its_place(folder: Path, error: Exception, works: bool) -> Any:
    """What does the same where ``AutoProcessor`` does not load; else what to do about it."""
    why = " ".join(str(error).split())
    kind = _kind(folder)
    if kind in _OURS:
        from .image_text_processor import ImageTextProcessor

        logger.info("AutoProcessor does not load from %s (%s); using tokenizer and PIL image processor", folder, why)
        try:
            return ImageTextProcessor.from_folder(folder)
        except ValueError as ours:
            raise ValueError(f"{ours} (AutoProcessor does not load: {why})") from error
    if not works and "torchvision" in why.lower():
        raise ImportError(
            f"the processor of {folder} ({kind}) needs torchvision, which is not installed or cannot be imported. "
            "Install the build that fits torch: pip install torchvision, or sparsevlm[cli], which brings it."
        ) from error
    if isinstance(error, ImportError):
        raise ImportError(f"the processor of {folder} ({kind}) needs a package that is missing: {why}") from error
    raise ValueError(f"{folder} ({kind}) has no processor that loads: {why}") from error
