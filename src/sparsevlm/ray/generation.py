"""Options of ``generate`` for one answer a row, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import did_you_mean
from ..inputs import torchvision_works

MAX_NEW_TOKENS = 128
# They would make something else of what generate returns than one sequence of tokens a row.
_OTHER_OUTPUTS = (
    *("num_return_sequences", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
)


def checked_generation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate``: greedy, with 128 new tokens, where they do not say otherwise.

    Raises
    ------
    TypeError
        If an option does not exist.
    ValueError
        If a value is out of range, or an option changes what ``generate`` returns.
    """
    torchvision_works()
    from transformers import GenerationConfig

    known = set(vars(GenerationConfig()))
    if unknown := sorted(set(given) - known):
        named = ", ".join(name + did_you_mean(name, known) for name in unknown)
        raise TypeError(f"unknown generation option {named}; the options are those of transformers' GenerationConfig.")
    if other := [name for name in _OTHER_OUTPUTS if name in given]:
        raise ValueError(f"{', '.join(other)} changes what generate returns, and a row has one answer; leave it out.")
    options = {"do_sample": False, **given}
    if "max_length" not in given:
        options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    GenerationConfig(**options).validate()
    return options
