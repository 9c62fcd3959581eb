"""Calls of ``generate`` under ``turns="refresh"``: later questions prefill the conversation again, and choose anew."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import GenerationSettings, cache_of
from ..models import ModelAdapter
from ..selection.context import VISION_NEEDS
from .conversation import Conversation, brings_sound, check_refillable, conversation_of, keep_conversation
from .feature_exchange import FeatureExchange, FeaturesTakenError, NewFeatures
from .inputs import brings_images
from .kept_features import KeptFeatures, RowFeatures
from .kv_cache import empty_layers
from .later_images import check_new_images, explained_mismatch
from .later_inputs import input_ids_of, new_inputs, whole_ids, whole_inputs
from .session import Session
from .timing import Mark

_LATER = "or run this call inside state.options(turns='first'), where it goes on with what earlier questions have left"

Run = Callable[[dict[str, Any]], Any]
Encode = Callable[[Mapping[str, Any]], NewFeatures | None]


def converse(session: Session, arguments: dict[str, Any], encode: Encode, run: Run) -> Any:
    """Run a call of ``generate`` whose cache is to serve later questions, or does.

    Parameters
    ----------
    session : Session
    arguments : dict
        Of the call.
    encode : callable
        Encodes the images of a turn by the engine; ``None``: it does not run them.
    run : callable
        Runs a call, given its arguments.

    Raises
    ------
    ValueError, NotImplementedError
        If a later question cannot be asked of the cache, before it is touched.
    """
    cache = cache_of(arguments)
    past_len = 0 if cache is None else int(cache.get_seq_length())
    if past_len:
        return LaterTurn.of(session.adapter, arguments, past_len).run(session, encode, run)
    if cache is None and not GenerationSettings(session.adapter.model, arguments)["return_dict_in_generate"]:
        return run(arguments)  # its cache is gone with the call
    exchange = session.exchange = FeatureExchange()
    output = run(arguments)
    cache = cache_of(output) if cache is None else cache
    ids, features = input_ids_of(arguments), exchange.taken
    if features is None and ids is not None and not brings_images(session.adapter, arguments):
        features = KeptFeatures((RowFeatures(torch.empty(0)),) * ids.shape[0])
    if cache is not None and features is not None:
        keep_conversation(session, cache, arguments, features, _sequences(output))
    return output


def _sequences(output: Any) -> Tensor:
    found: Tensor = output["sequences"] if isinstance(output, Mapping) else output
    return found


@dataclass
class LaterTurn:
    """A call of ``generate`` on a cache that is filled.

    Attributes
    ----------
    arguments : dict
        Of the call.
    past_len : int
        Tokens in the cache.
    before : Conversation
        What it keeps, by prompt of the call.
    ids : Tensor of shape (batch, length), int64
        The whole conversation.
    n_left_out : int
        How many of its tokens the call has left out.
    features : KeptFeatures
        Of what is in the cache.
    """

    arguments: dict[str, Any]
    past_len: int
    before: Conversation
    ids: Tensor
    n_left_out: int
    features: KeptFeatures

    @classmethod
    def of(cls, adapter: ModelAdapter, arguments: dict[str, Any], past_len: int) -> LaterTurn:
        """Read a call.

        Raises
        ------
        ValueError, NotImplementedError
            If the cache does not hold what it needs.
        """
        cache, ids = cache_of(arguments), input_ids_of(arguments)
        before = conversation_of(cache)
        if before is None or before.model() is not adapter.model:
            raise ValueError(
                f"turns='refresh' does not know the conversation in this {type(cache).__name__}: it was filled without "
                "turns='refresh', without input_ids, by another model, or outside of generate. "
                f"Begin anew with a new cache, all tokens and all pixels, {_LATER}."
            )
        if ids is None or arguments.get("assistant_model") is not None:
            got = "inputs_embeds without input_ids" if ids is None else "an assistant model"
            raise NotImplementedError(
                f"turns='refresh' prefills the conversation again, and a later call with {got} does not let it. Leave "
                f"it out, {_LATER}."
            )
        before = before.of_prompts(ids.shape[0])
        whole = whole_ids(before, arguments, ids, past_len)
        held = _held(adapter, before, whole[:, :past_len])
        return cls(arguments, past_len, before, whole, whole.shape[1] - ids.shape[1], held)

    def run(self, session: Session, encode: Encode, run: Run) -> Any:
        """Prefill the conversation again, with its features and those of new images; without any, go on as it is."""
        adapter, cache = session.adapter, cache_of(self.arguments)
        features, new = self.features, None
        begin = end = Mark.now(self.ids.device)
        brings = brings_images(adapter, self.arguments)
        self._check(adapter, brings)
        known = (adapter, self.before, self.arguments, self.ids, self.past_len)
        if brings:
            inputs = new_inputs(*known)
            new = encode(inputs) or encode_by_modules(session, inputs)
            features, end = features.followed_by(new.features, adapter), Mark.now(self.ids.device)
        arguments = whole_inputs(*known, features)
        if not features.n_tokens:
            output = run(self.arguments)
            sequences = torch.cat([self.ids[:, : self.n_left_out], _sequences(output)], dim=1)
            had_sound = self.before.has_sound
            keep_conversation(session, cache, arguments, features, sequences, had_sound=had_sound)
            return output
        _check_features(session, features, self.ids)
        session.exchange = FeatureExchange(features)
        with _emptied(adapter, cache):
            output = run(arguments)
        assert session.request is not None  # since the prompt
        session.request.count_refreshed(self._n_refreshed)
        if new is not None:
            session.request.add_time("vision", begin, end)
            session.request.note_tower(new.n_cached, new.apart)
        keep_conversation(session, cache, arguments, features, _sequences(output))
        return self._without_left_out(output)

    @property
    def _n_refreshed(self) -> int:
        mask = self.arguments.get("attention_mask")
        return self.ids[:, : self.past_len].numel() if mask is None else int(mask[:, : self.past_len].sum())

    def _without_left_out(self, output: Any) -> Any:
        if not self.n_left_out:
            return output
        if not isinstance(output, Mapping):
            return output[:, self.n_left_out :]
        output["sequences"] = output["sequences"][:, self.n_left_out :]  # type: ignore[index]
        return output

    def _check(self, adapter: ModelAdapter, brings: bool) -> None:
        tokens = torch.tensor([modality.token_id for modality in adapter.modalities.values()], device=self.ids.device)
        new = self.ids[:, self.past_len :]
        if brings:
            check_new_images(adapter, self.arguments, new)
        elif n_new := int(torch.isin(new, tokens).sum()):
            raise ValueError(
                f"the new tokens hold {n_new} placeholders of images or videos, and no pixels were given. Pass the "
                "pixels of new images: the features of earlier ones are kept."
            )
        sounds = brings_sound(self.arguments)
        if (sounds or self.before.has_sound) and (brings or self.features.n_tokens):
            raise NotImplementedError(
                "turns='refresh' keeps features of images and videos, not of sound. Give the whole conversation anew "
                f"without a cache, {_LATER}."
            )
        positions = self.arguments.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape[-1] != self.ids.shape[1]:
            raise ValueError(
                f"position_ids of {positions.shape[-1]} tokens were given, and turns='refresh' prefills all "
                f"{self.ids.shape[1]} of the conversation. Leave them out, or give those of all tokens."
            )


def _held(adapter: ModelAdapter, before: Conversation, ids: Tensor) -> KeptFeatures:
    """Features of what a cache holds of a conversation, tokens (batch, past_len); it may have been cropped."""
    kept = before.features
    known = kept.token_ids | {modality.token_id for modality in adapter.modalities.values()}
    counts, rows = dataclasses.replace(kept, token_ids=known).places(ids).sum(dim=1).tolist(), []
    for row, n in zip(kept.rows, counts, strict=True):
        if n > row.tokens.shape[0]:
            raise ValueError(
                f"the tokens of earlier turns hold {n} placeholders of images or videos, and features of "
                f"{row.tokens.shape[0]} are kept: some came in a call without turns='refresh', or these are tokens of "
                f"another conversation. Begin anew with a new cache, all tokens and all pixels, {_LATER}."
            )
        rows.append(row.first(n, adapter))
    return dataclasses.replace(kept, rows=tuple(rows))


def _check_features(session: Session, features: KeptFeatures, ids: Tensor) -> None:
    """Refuse features that do not fit a conversation or the selector."""
    counts, needs = features.places(ids).sum(dim=1).tolist(), session.options.traits.needs & VISION_NEEDS
    for row, n in zip(features.rows, counts, strict=True):
        if row.tokens.shape[0] != n:
            raise ValueError(
                f"the conversation holds {n} placeholders of images or videos, and there are features of "
                f"{row.tokens.shape[0]}. Pass the pixels of the new images alone: those of earlier ones are kept."
            )
        if needs and n and (row.vision is None or not row.vision.holds(needs)):
            raise ValueError(
                f"selector {session.options.traits.name!r} needs {', '.join(sorted(needs))}, which no selector of "
                f"earlier turns has had read. Begin anew with a new cache under this selector, {_LATER}."
            )


def encode_by_modules(session: Session, arguments: Mapping[str, Any]) -> NewFeatures:
    """Encode the images of a turn by the model's own modules, as far as its decoder.

    Raises
    ------
    ValueError
        If the images are not those of its tokens.
    """
    exchange = session.exchange = FeatureExchange(only_takes=True)
    given, session.given = session.given, arguments
    try:
        with explained_mismatch(), torch.no_grad(), contextlib.suppress(FeaturesTakenError):
            session.adapter.base_model(**arguments, use_cache=False)
    finally:
        session.exchange, session.given = None, given
    assert exchange.taken is not None  # since the decoder was called
    return NewFeatures(exchange.taken)


@contextlib.contextmanager
def _emptied(adapter: ModelAdapter, cache: Any) -> Iterator[None]:
    """Context in which a cache is filled anew; where that fails it is as it was."""
    check_refillable(adapter, cache)
    before = list(cache.layers)
    cache.layers[:] = empty_layers(cache)
    try:
        yield
    except BaseException:
        cache.layers[:] = before
        raise
