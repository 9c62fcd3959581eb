"""Conversations that caches keep beside keys and values, for later questions that choose anew."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..models import ModelAdapter
from .kept_features import KeptFeatures
from .kv_cache import adopt, check_cache
from .session import Session

# What says something of every token.
OF_TOKENS = ("mm_token_type_ids", "token_type_ids")
_SOUND = ("input_features", "audio")


@dataclass(frozen=True)
class Conversation:
    """What a cache keeps of the conversation that it holds; copies of the cache share it.

    Attributes
    ----------
    model : weak reference
    features : KeptFeatures
        By row of the cache.
    ids : Tensor of shape (batch, length), int64, optional
        All tokens so far; ``None``: which of several answers a row holds is not known.
    of_tokens : dict of Tensor of shape (batch, length)
        Arguments that say something of every token.
    has_sound : bool
        Whether sound was given, which is not kept.
    """

    model: weakref.ref[Any]
    features: KeptFeatures
    ids: Tensor | None
    of_tokens: dict[str, Tensor]
    has_sound: bool

    @property
    def batch(self) -> int:
        """Rows of the cache."""
        return len(self.features.rows)

    def at(self, row_idx: Sequence[int]) -> Conversation:
        """That of some rows."""
        return dataclasses.replace(
            self,
            features=self.features.at(row_idx),
            ids=None if self.ids is None else self.ids[list(row_idx)],
            of_tokens={name: value[list(row_idx)] for name, value in self.of_tokens.items()},
        )

    def of_prompts(self, n: int) -> Conversation:
        """That of the ``n`` prompts of a call: one a row, or one for as many equal rows each as beams have left.

        Raises
        ------
        ValueError
        """
        rows, copies = self.features.rows, self.batch // max(1, n)
        if n * copies == self.batch and all(row is rows[i - i % copies] for i, row in enumerate(rows)):
            return self if copies == 1 else self.at(range(0, self.batch, copies))
        raise ValueError(
            f"{n} prompts were given with a cache of {self.batch} rows, and which of these each goes on with is not "
            "known. Give one prompt a row (cache.batch_select_indices chooses rows)."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        return self


def _layer_of(cache: Cache) -> int:
    return next(i for i, layer in enumerate(cache.layers) if not isinstance(layer, LinearAttentionLayer))


def conversation_of(cache: Any) -> Conversation | None:
    """What a cache keeps of its conversation, if anything."""
    return next(filter(None, (getattr(layer, "conversation", None) for layer in getattr(cache, "layers", ()))), None)


def keep_conversation(
    session: Session,
    cache: Any,
    arguments: Mapping[str, Any],
    features: KeptFeatures,
    sequences: Tensor,
    *,
    had_sound: bool = False,
) -> None:
    """Keep the conversation with the cache that holds it; ``had_sound``: earlier turns have brought sound."""
    with contextlib.suppress(NotImplementedError):  # a cache that cannot be pruned: nothing was dropped
        check_refillable(session.adapter, cache)
        place = _layer_of(cache)
        batch, n_prompts = cache.layers[place].keys.shape[0], len(features.rows)
        row_idx = [prompt for prompt in range(n_prompts) for _ in range(batch // n_prompts)]
        of_tokens = {name: arguments[name] for name in OF_TOKENS if isinstance(arguments.get(name), Tensor)}
        adopt(cache, place).conversation = Conversation(
            weakref.ref(session.adapter.model),
            features.at(row_idx),
            sequences if sequences.shape[0] == batch else None,
            {name: value[row_idx] for name, value in of_tokens.items()},
            had_sound or brings_sound(arguments),
        )
        if session.request is not None:
            session.request.count_kept(features.n_bytes)


def check_refillable(adapter: ModelAdapter, cache: Cache) -> None:
    """Refuse caches that cannot be pruned; see :func:`~.kv_cache.check_cache`."""
    check_cache(cache, adapter.decoder.first_shared, adapter.decoder.sliding_layers)


def brings_sound(arguments: Mapping[str, Any]) -> bool:
    """Tells whether a call brings sound."""
    return any(value is not None and name.startswith(_SOUND) for name, value in arguments.items())
