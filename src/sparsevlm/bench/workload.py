"""Random inputs of ``generate``: noise images and texts of random words, new in every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models import adapter_for
from .cases import Case


def fresh_inputs(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws inputs of ``generate`` in the form of the model's processor.

    Parameters
    ----------
    model : PreTrainedModel
        Of a family with examples of this size.
    case : Case
    generator : torch.Generator
        On the model's device.

    Raises
    ------
    NotImplementedError
        If the family is another, of which inputs cannot be drawn without a processor.
    """
    adapter = adapter_for(model)
    blank = adapter.family.example(adapter, (1, *case.grid), case.n_text)
    inputs = {name: torch.cat([value] * case.batch) for name, value in blank.items()}
    ids = inputs["input_ids"]
    word = int(ids[0, 0])
    special = {*ids[0].tolist(), *(modality.token_id for modality in adapter.modalities.values())} - {word}
    n_words = model.config.get_text_config().vocab_size - len(special)
    words = torch.randint(0, n_words, ids.shape, generator=generator, device=model.device)
    for token_id in sorted(special):
        words += words >= token_id  # no word is a special token
    inputs["input_ids"] = torch.where(ids == word, words, ids)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = torch.randn(value.shape, generator=generator, device=model.device).to(value.dtype)
    return inputs
