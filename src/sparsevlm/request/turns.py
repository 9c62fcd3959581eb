"""Calls of ``generate`` under ``turns="refresh"``: later questions prefill the conversation again, and choose anew."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compat import GenerationSettings, cache_of
from ..models import ModelAdapter
from ..selection.context import VISION_NEEDS
from .conversation import (
    OF_TOKENS,
    Conversation,
    brings_sound,
    check_refillable,
    conversation_of,
    keep_conversation,
)
from .kept_features import FeatureExchange, FeaturesTakenError, KeptFeatures, RowFeatures, size_names
from .kv_cache import empty_layers
from .session import Session
from .timing import Mark

_LATER = "or run this call inside state.options(turns='first'), where it goes on with what earlier questions have left"

Run = Callable[[dict[str, Any]], Any]
Encode = Callable[[Mapping[str, Any]], KeptFeatures | None]


def converse(session: Session, arguments: dict[str, Any], encode: Encode, run: Run) -> Any:
    """Run a call of ``generate`` whose cache is to serve later questions, or does.

    Parameters
    ----------
    session : Session
    arguments : dict
        Of the call.
    encode : callable
        Features of the images of a prompt by the engine; ``None``: it does not run them.
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
    ids, features = _ids(arguments), exchange.taken
    if features is None and ids is not None and not _brings_images(session.adapter, arguments):
        features = KeptFeatures((RowFeatures(torch.empty(0)),) * ids.shape[0])
    if cache is not None and features is not None:
        keep_conversation(session, cache, arguments, features, _sequences(output))
    return output


def _ids(arguments: Mapping[str, Any]) -> Tensor | None:
    ids = arguments.get("input_ids")
    return arguments.get("inputs") if ids is None else ids


def _sequences(output: Any) -> Tensor:
    found: Tensor = output["sequences"] if isinstance(output, Mapping) else output
    return found


def _brings_images(adapter: ModelAdapter, arguments: Mapping[str, Any]) -> bool:
    pixels = (arguments.get(modality.pixels) for modality in adapter.modalities.values())
    return arguments.get("mm_encoder_outputs") is not None or any(one is not None for one in pixels)


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
        cache, ids = cache_of(arguments), _ids(arguments)
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
        whole = _whole(before, arguments, ids, past_len)
        held = _held(adapter, before, whole[:, :past_len])
        return cls(arguments, past_len, before, whole, whole.shape[1] - ids.shape[1], held)

    def run(self, session: Session, encode: Encode, run: Run) -> Any:
        """Prefill the conversation again, with its features and those of new images; without any, go on as it is."""
        adapter, cache = session.adapter, cache_of(self.arguments)
        brings = _brings_images(adapter, self.arguments)
        begin = end = Mark.now(self.ids.device)
        features = self.features
        self._check(adapter, brings)
        if brings:
            new = self._new_arguments(adapter)
            features = features.followed_by(encode(new) or encode_by_modules(session, new), adapter)
            end = Mark.now(self.ids.device)
        arguments = self._whole_arguments(adapter, features)
        if not any(row.tokens.shape[0] for row in features.rows):
            output = run(self.arguments)
            left_out = self.ids[:, : self.n_left_out]
            keep_conversation(session, cache, arguments, features, torch.cat([left_out, _sequences(output)], dim=1))
            return output
        _check_features(session, features, self.ids)
        session.exchange = FeatureExchange(features)
        with _emptied(adapter, cache):
            output = run(arguments)
        assert session.request is not None  # since the prompt
        session.request.count_refreshed(self._n_refreshed)
        if brings:
            session.request.add_time("vision", begin, end)
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
        n_new = int(torch.isin(self.ids[:, self.past_len :], tokens).sum())
        if bool(n_new) != brings:
            given = "pixels were" if brings else "no pixels were"
            raise ValueError(
                f"the new tokens hold {n_new} placeholders of images or videos, and {given} given. Pass the pixels of "
                "new images alone: the features of earlier ones are kept."
            )
        sounds = brings_sound(self.arguments)
        if (sounds or self.before.has_sound) and (brings or any(row.tokens.shape[0] for row in self.features.rows)):
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

    def _new_arguments(self, adapter: ModelAdapter) -> dict[str, Any]:
        """Inputs of the base model for what is new alone."""
        start, mask = self.past_len, self.arguments.get("attention_mask")
        known = _parameters(adapter.base_model.forward) | _parameters(adapter.model.forward)
        known -= {"use_cache", "position_ids", "labels", "logits_to_keep", "cache", "past_key_values"}
        given = {name: value for name, value in self.arguments.items() if name in known and value is not None}
        given |= {name: value[:, start:] for name, value in self._of_tokens(adapter).items()}
        if isinstance(mask, Tensor):
            given["attention_mask"] = mask[:, start:]
        return {**given, "input_ids": self.ids[:, start:]}

    def _whole_arguments(self, adapter: ModelAdapter, features: KeptFeatures) -> dict[str, Any]:
        """The call with all tokens, and without what only the vision tower reads."""
        left_out = {"inputs", "mm_encoder_outputs", *size_names(adapter)}
        for kind, modality in adapter.modalities.items():
            encoder = getattr(adapter.base_model, f"get_{kind}_features", None)
            left_out |= {modality.pixels, *modality.encoder_inputs, *(_parameters(encoder) if encoder else ())}
        rest = {name: value for name, value in self.arguments.items() if name not in left_out}
        sizes = {name: value.to(self.ids.device) for name, value in features.sizes.items()}
        return {**rest, "input_ids": self.ids, **self._of_tokens(adapter), **sizes}

    def _of_tokens(self, adapter: ModelAdapter) -> dict[str, Tensor]:
        """Arguments that say something of every token, for all of them."""
        found: dict[str, Tensor] = {}
        for name in OF_TOKENS:
            given, before = self.arguments.get(name), self.before.of_tokens.get(name)
            if given is None and before is None:
                continue
            if given is not None and given.shape[1] == self.ids.shape[1]:
                found[name] = given
                continue
            made = _token_types(adapter, self.ids, before)
            if before is not None:
                n = min(before.shape[1], self.past_len)
                made[:, :n], made[:, n : self.past_len] = before[:, :n].to(made), 0
            if given is not None:
                made[:, made.shape[1] - given.shape[1] :] = given
            found[name] = made
        return found


def _whole(before: Conversation, arguments: Mapping[str, Any], ids: Tensor, past_len: int) -> Tensor:
    """All tokens of a conversation, where a call may leave out those in the cache."""
    mask = arguments.get("attention_mask")
    length = ids.shape[1] if mask is None else mask.shape[1]
    if length == ids.shape[1] and length > past_len:
        return ids
    known = 0 if before.ids is None else before.ids.shape[1]
    if length != past_len + ids.shape[1] or known < past_len:
        raise ValueError(
            f"{ids.shape[1]} tokens and an attention_mask for {length} were given on a cache of {past_len}, of which "
            f"{known} are known. For turns='refresh' pass all tokens of the conversation and a mask for all of them."
        )
    assert before.ids is not None  # since some are known
    return torch.cat([before.ids[:, :past_len].to(ids), ids], dim=1)


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


def _token_types(adapter: ModelAdapter, ids: Tensor, before: Tensor | None) -> Tensor:
    """Kinds of tokens as earlier turns have told them, or as processors do: 1 for images, 2 for videos."""
    made = torch.zeros_like(ids)
    for number, modality in enumerate(adapter.modalities.values(), 1):
        places = ids == modality.token_id
        told = None if before is None else before[places[:, : before.shape[1]]]
        made[places] = number if told is None or not told.numel() else int(told[0])
    return made


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


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "kwargs", "return_dict"}


def encode_by_modules(session: Session, arguments: Mapping[str, Any]) -> KeptFeatures:
    """Features of the images of a prompt by the model's own modules, as far as its decoder.

    Raises
    ------
    ValueError
        If the images are not those of the prompt.
    """
    exchange = session.exchange = FeatureExchange(only_takes=True)
    given, session.given = session.given, arguments
    try:
        with torch.no_grad(), contextlib.suppress(FeaturesTakenError):
            session.adapter.base_model(**arguments, use_cache=False)
    except ValueError as error:
        raise ValueError(
            f"the images do not fit the new tokens ({error}). Pass the pixels of new images alone: the features of "
            "earlier ones are kept."
        ) from error
    finally:
        session.exchange, session.given = None, given
    assert exchange.taken is not None  # since the decoder was called
    return exchange.taken


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
