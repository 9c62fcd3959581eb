"""Text and images to model inputs, with or without torchvision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .checkpoint import checkpoint_folder
from .torchvision_guard import torchvision_works

logger = logging.getLogger(__name__)


def load_processor(path_or_id: str | Path, *, local_files_only: bool = False) -> Any:
    """Load what turns text and images into inputs: ``AutoProcessor``, or :class:`ImageTextProcessor` in its place.

    ``AutoProcessor`` of Qwen2-VL and Qwen2.5-VL needs torchvision for its video processor. Where that is missing or
    broken, tokenizer and PIL image processor do the same. Batches are padded on the left either way.

    Parameters
    ----------
    path_or_id : str or Path
        A folder, or a hub id; a folder never touches the network.
    local_files_only : bool
        Whether a hub id must come from the local hub cache.

    Raises
    ------
    FileNotFoundError, ValueError
        If the checkpoint is missing, or has no tokenizer or image processor.
    """
    folder = checkpoint_folder(path_or_id, weights=False, local_files_only=local_files_only)
    torchvision_works()  # else it is hidden: transformers' models and processors die of one that is broken
    processor, why_not = _auto_processor(folder)
    if processor is None:
        from .image_text_processor import ImageTextProcessor

        try:
            processor = ImageTextProcessor.from_folder(folder)
        except ValueError as error:
            raise ValueError(f"{error} (AutoProcessor does not load: {why_not})") from error
    processor.tokenizer.padding_side = "left"
    return processor


def _auto_processor(folder: Path) -> tuple[Any | None, str]:
    """transformers' own processor, or why there is none."""
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        logger.info("AutoProcessor does not load from %s (%s); using tokenizer and PIL image processor", folder, error)
        return None, str(error)
    # Without a processor config, AutoProcessor quietly returns a tokenizer or an image processor.
    is_whole = isinstance(processor, ProcessorMixin)
    return (processor, "") if is_whole else (None, f"{type(processor).__name__} is no processor of text and images")
