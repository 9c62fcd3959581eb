"""Random inputs of ``generate``: noise images and texts of random words, new in every call."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..models import BlankImage, ModelAdapter, adapter_for, blank_word
from .cases import Case


def images_of(adapter: ModelAdapter, case: Case) -> tuple[BlankImage, ...]:
    """Images of one sample of a case: one, or several where one has fewer tokens; empty: none are made in code."""
    return adapter.family.blank_images(adapter, (1, *case.grid))


def fitted(adapter: ModelAdapter, case: Case) -> Case:
    """The case with as many visual tokens as the model's images make of it, which may be a few more or less."""
    n_visual = sum(image.n_visual for image in images_of(adapter, case))
    return case if n_visual == case.n_visual else dataclasses.replace(case, n_visual=n_visual, height=None)


def fresh_inputs(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws inputs of ``generate`` in the form of the model's processor.

    Parameters
    ----------
    model : PreTrainedModel
        Of a family whose images are made in code.
    case : Case
        With as many visual tokens as the model's images have.
    generator : torch.Generator
        On the model's device.
    """
    adapter = adapter_for(model)
    inputs = adapter.family.inputs_of(adapter, images_of(adapter, case), case.n_text)
    ids, pixels, word = inputs["input_ids"], inputs.pop("pixel_values"), blank_word(adapter)
    special = {modality.token_id for modality in adapter.modalities.values()} | set(ids.unique().tolist()) - {word}
    of_sound = (getattr(model.config, f"audio_{part}token_id", None) for part in ("", "start_", "end_"))
    special.update(token for token in of_sound if token is not None)
    inputs = {name: torch.cat([tensor] * case.batch) for name, tensor in inputs.items()}
    is_word = inputs["input_ids"] == word
    size = (case.batch, int((ids == word).sum()))
    n_words = model.config.get_text_config().vocab_size - len(special)
    words = torch.randint(0, n_words, size, generator=generator, device=model.device)
    for token_id in sorted(special):
        words += words >= token_id  # no word is a special token
    inputs["input_ids"][is_word] = words.flatten()
    shape = (case.batch * pixels.shape[0], *pixels.shape[1:])
    noise = torch.randn(shape, generator=generator, device=model.device)
    return {**inputs, "pixel_values": noise.to(pixels.dtype)}
