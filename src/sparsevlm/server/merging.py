"""Inputs of prompts that were made one by one, as a batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..inputs.turns import process, render_turn

# Inputs with an entry per token of the prompt. What is filled up is hidden by the mask.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
logger = logging.getLogger(__name__)


def shapes(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Equal for inputs that :func:`merged` can put together."""
    return tuple(
        (name, value.dtype, () if name in _PER_TOKEN else tuple(value.shape[1:]))
        for name, value in sorted(inputs.items())
    )


def merged(samples: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Inputs of a batch, as the processor would have made them of all prompts at once, padded on the left.

    Parameters
    ----------
    samples : sequence of dict of Tensor
        Of one prompt each, of the same :func:`shapes`.
    pad_token_id : int
    """
    longest = max(int(sample["input_ids"].shape[1]) for sample in samples)
    batch = {}
    for name in samples[0]:
        parts = [sample[name] for sample in samples]
        if name in _PER_TOKEN:
            fill = pad_token_id if name == "input_ids" else 0
            parts = [torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=fill) for part in parts]
        batch[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return batch


def merges(processor: Any) -> bool:
    """Tells whether :func:`merged` makes of prompts with images what the processor makes of them at once.

    Most processors put images one behind the other; some lay them side by side.
    """
    prompts, images = [], []
    try:
        for colour, text in (("red", "a"), ("blue", "a longer text")):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            prompts.append(render_turn(processor, [{"role": "user", "content": content}]))
            images.append([Image.new("RGB", (224, 168), colour)])
        whole = process(processor, prompts, images)
        parts = [process(processor, [prompt], [own]) for prompt, own in zip(prompts, images, strict=True)]
        parts = [{name: value for name, value in one.items() if isinstance(value, Tensor)} for one in parts]
        batch = merged(parts, processor.tokenizer.pad_token_id or 0)
        return all(torch.equal(value, whole[name]) for name, value in batch.items())
    except Exception:
        logger.info("a batch of two images could not be tried", exc_info=True)
        return False
