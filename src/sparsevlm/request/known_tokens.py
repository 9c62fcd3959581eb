"""Tokens that caches were filled with, known as long as nobody else changes these."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from ..compat import GenerationSettings, QuantizedLayerBase, cache_of
from ..models import ModelAdapter
from .later_inputs import gives_all, input_ids_of


@dataclass(frozen=True)
class _Filled:
    """What a call has left in a cache: tokens, (batch, length), and the keys of its layers with their versions."""

    ids: Tensor
    keys: list[tuple[weakref.ref[Tensor], int]]


class KnownTokens:
    """Tokens by cache; copies and pickles begin without any.

    A cache whose keys are no longer those that a call of ``generate`` has left, since it was cropped, reordered, or
    filled by other calls, is not known.
    """

    def __init__(self) -> None:
        self._filled: weakref.WeakKeyDictionary[Any, _Filled] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[KnownTokens], tuple[()]]:
        return KnownTokens, ()

    def of(self, cache: Any) -> Tensor | None:
        """Tokens that a cache was filled with, (batch, length), where they are known."""
        keys = _keys(cache)
        filled = None if keys is None else self._filled.get(cache)
        if filled is None or keys is None or len(keys) != len(filled.keys):
            return None
        pairs = zip(filled.keys, keys, strict=True)
        return filled.ids if all(was() is now and version == _version(now) for (was, version), now in pairs) else None

    def keep(self, adapter: ModelAdapter, arguments: Mapping[str, Any], before: Tensor | None, output: Any) -> None:
        """Keep the tokens of a call of ``generate`` with the cache that it has filled, if it leaves one.

        Parameters
        ----------
        adapter : ModelAdapter
        arguments : mapping
            Of the call.
        before : Tensor of shape (batch, past_len), int64, optional
            Those that were in the cache, where they are known.
        output : Tensor or mapping
            What the call returns.
        """
        sequences, ids = output, input_ids_of(arguments)
        cache = cache_of(arguments)
        if isinstance(output, Mapping):
            sequences, cache = output.get("sequences"), cache_of(output) if cache is None else cache
        if (keys := _keys(cache)) is None or not isinstance(sequences, Tensor) or ids is None:
            return
        self._filled.pop(cache, None)
        beams = (GenerationSettings(adapter.model, arguments)["num_beams"] or 1) > 1  # whose rows change places
        if beams or arguments.get("inputs_embeds") is not None or arguments.get("custom_generate") is not None:
            return
        if not gives_all(arguments, ids):
            n_before = arguments["attention_mask"].shape[1] - ids.shape[1]
            if before is None or before.shape != (sequences.shape[0], n_before):
                return
            sequences = torch.cat([before.to(sequences.device), sequences], dim=1)
        if keys and all(one.shape[0] == sequences.shape[0] for one in keys):
            self._filled[cache] = _Filled(sequences.clone(), [(weakref.ref(one), _version(one)) for one in keys])


def _keys(cache: Any) -> list[Tensor] | None:
    """Keys of the layers of a cache, where no change of them goes unseen."""
    if not isinstance(cache, Cache):
        return None
    layers = [one for one in cache.layers if not isinstance(one, LinearAttentionLayer)]
    if not all(isinstance(one, DynamicLayer) and not isinstance(one, QuantizedLayerBase) for one in layers):
        return None
    found = [getattr(one, "keys", None) for one in layers]
    keys = [one for one in found if isinstance(one, Tensor)]
    return keys if len(keys) == len(found) else None


def _version(tensor: Tensor) -> int:
    """Number of changes in place, which tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


def check_known(known: Tensor, arguments: Mapping[str, Any], past_len: int) -> None:
    """Refuse tokens of a whole conversation that differ, where they are seen, from those in the cache.

    Parameters
    ----------
    known : Tensor of shape (batch, length), int64
        Those that the cache was filled with.
    arguments : mapping
        Of the call.
    past_len : int
        Tokens in the cache.

    Raises
    ------
    ValueError
    """
    ids, mask, n = input_ids_of(arguments), arguments.get("attention_mask"), min(past_len, known.shape[1])
    if ids is None or not gives_all(arguments, ids) or ids.shape[0] != known.shape[0]:
        return
    given, held = ids[:, :n], known[:, :n].to(ids.device)
    differs = given != held
    if mask is not None:
        differs &= mask[:, :n].to(ids.device) != 0
    found = differs.nonzero()
    if found.shape[0]:
        row, position = found[0].tolist()
        raise ValueError(
            f"token {position} of sample {row} is {int(given[row, position])}, and the cache was filled with "
            f"{int(held[row, position])} there. Give the tokens that generate returned, and the new ones behind them: "
            "an answer that is tokenized again can be other tokens of the same text. To change what was said, crop the "
            "cache to what stays, or begin with a new one."
        )
