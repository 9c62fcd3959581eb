"""Drafts of a pruned assistant model: it sees the images in the first round, and prunes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from ..compat import cache_of
from ..models import ModelAdapter
from .inputs import image_arguments

_ENCODED = "mm_encoder_outputs"
# What the target of the running call was given; transformers hands an assistant the target's features instead.
_OF_TARGET: ContextVar[Mapping[str, Any]] = ContextVar("sparsevlm_images_of_target", default={})  # noqa: B039


@contextlib.contextmanager
def images_at_hand(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Context in which a pruned assistant finds the images of the target's call."""
    token = _OF_TARGET.set(arguments)
    try:
        yield
    finally:
        _OF_TARGET.reset(token)


def arguments_of_round(adapter: ModelAdapter, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an assistant's ``generate`` in one round of drafts.

    The first brings the images, as the processor made them where the target is under SparseVLM as well; later ones
    find the tokens in the cache.

    Parameters
    ----------
    adapter : ModelAdapter
        Of the assistant.
    arguments : mapping
        As the target's ``generate`` gives them.

    Raises
    ------
    ValueError
        For features of the target that do not fit the assistant.
    """
    visual = image_arguments(adapter)
    if cache_of(arguments) is not None:
        return {name: value for name, value in arguments.items() if name not in visual}
    images = {name: value for name, value in _OF_TARGET.get().items() if name in visual and value is not None}
    if images:
        rest = {name: value for name, value in arguments.items() if name not in visual}
        device = adapter.model.device
        return rest | {name: value.to(device) if hasattr(value, "to") else value for name, value in images.items()}
    _check_features(adapter, arguments.get(_ENCODED) or {})
    return dict(arguments)


def _check_features(adapter: ModelAdapter, encoded: Mapping[str, Any]) -> None:
    wanted = adapter.decoder.embed.weight.shape[-1]
    for kind, output in encoded.items():
        features = getattr(output, "pooler_output", output)
        first = features[0] if isinstance(features, (list, tuple)) else features
        if first is not None and first.shape[-1] != wanted:
            raise ValueError(
                f"the assistant, a {adapter.name} of width {wanted}, was handed {kind} features of width "
                f"{first.shape[-1]}, which the target's vision tower has made. Call apply_sparsevlm(target, keep=1.0): "
                "nothing of the target is pruned then, and the assistant gets the images themselves."
            )
