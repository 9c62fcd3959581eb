"""Puts the engine in the place of the text model's forward pass, for the calls of ``generate`` that it can carry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..runtime.request import Request
from ..runtime.view import ModelView
from .arena import Arena, Arenas
from .prefill import LayerCache, pack, prefill
from .programs import Programs
from .refusals import refuses_generation, refuses_model, refuses_request

_UNCALLED = "no greedy or sampling call of generate"


class EngineLayer(DynamicLayer):
    """A layer of a cache whose keys and values the engine keeps; it tells ``generate`` the logical length.

    Parameters
    ----------
    prompt : LayerCache
    batch : int
    length : int
        Of the padded prompt.
    """

    def __init__(self, prompt: LayerCache, batch: int, length: int) -> None:
        super().__init__()
        self._prompt, self._batch, self.length = prompt, batch, length

    def get_seq_length(self) -> int:
        """Logical length, dropped tokens included."""
        return self.length

    def cache_bytes(self, dense_length: int) -> tuple[int, int]:
        """Bytes of the prompt's keys and values, as they would be dense and as they are."""
        keys = self._prompt.keys
        per_row = 2 * keys[0].numel() * keys.element_size()
        return per_row * self._batch * dense_length, per_row * keys.shape[0]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Nobody but the engine appends."""
        raise RuntimeError("this cache belongs to a generate call that has ended; start again with a new cache.")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = update  # type: ignore[assignment]


class Engine:
    """The engine of one model.

    Parameters
    ----------
    view : ModelView
    current_request : callable
        The request of the pass that is running, if it may prune.
    """

    def __init__(self, view: ModelView, current_request: Callable[[], Request | None]) -> None:
        self._view, self._current_request = view, current_request
        self._plain = view.text_model.forward
        self._room = 0
        self._reason: str | None = _UNCALLED
        self._decoding: tuple[Cache, Arena] | None = None
        self._arenas, self._programs = Arenas(view), Programs(view)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """The engine of a copied model: graphs cannot be copied, it records its own."""
        twin = object.__new__(Engine)
        memo[id(self)] = twin
        view = copy.deepcopy(self._view, memo)
        twin._view, twin._plain = view, copy.deepcopy(self._plain, memo)
        twin._current_request = copy.deepcopy(self._current_request, memo)
        twin._room, twin._reason, twin._decoding = 0, _UNCALLED, None
        twin._arenas, twin._programs = Arenas(view), Programs(view)
        return twin

    def attach(self) -> None:
        """Take the place of the text model's forward pass."""
        self._view.text_model.forward = self._forward  # a bound method: copies of the model get a copy of the engine

    def detach(self) -> None:
        """Give it back."""
        vars(self._view.text_model).pop("forward", None)
        self._decoding = None
        self._arenas.clear()
        self._programs.clear()

    def consider(self, wanted: bool, model_kwargs: Mapping[str, Any], generation_config: Any) -> None:
        """Note, before ``generate`` begins, what it will do.

        Parameters
        ----------
        wanted : bool
            The option ``engine``.
        model_kwargs, generation_config
            Of the call.
        """
        self._decoding = None
        if not wanted:
            self._reason = "engine=False"
            return
        self._reason = refuses_generation(model_kwargs, generation_config) or refuses_model(self._view)
        mask = model_kwargs.get("attention_mask")
        prompt = 0 if mask is None else mask.shape[1]
        self._room = generation_config.max_length - prompt

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self._decoding is not None and self._decoding[0] is cache and cache is not None:
            return self._decode(cache, self._decoding[1], kwargs)
        request = self._current_request()
        reason = self._reason
        if cache is not None:  # without one, every step of generate is a pass like the first
            self._reason = _UNCALLED
        if request is None:
            return self._plain(*args, **kwargs)
        reason = reason or refuses_request(request)
        if reason is None and isinstance(cache, Cache):
            return self._prefill(cache, request, kwargs)
        request.path_reason = f"hooks on the model's own modules ({reason})"
        return self._plain(*args, **kwargs)

    def _prefill(self, cache: Cache, request: Request, kwargs: dict[str, Any]) -> BaseModelOutputWithPast:
        embeds, position_ids = kwargs["inputs_embeds"], kwargs["position_ids"][-3:]
        request.to(embeds.device)
        request.path, request.path_reason = "engine", "packed samples"
        packed = pack(self._view, request, embeds, position_ids)
        if self._programs.takes(request):
            hidden, prompt = self._programs.prefill(request, packed)
        else:
            hidden, prompt = prefill(self._view, request, packed)
        batch, q_len = embeds.shape[:2]
        cache.layers[:] = [EngineLayer(layer, batch, q_len) for layer in prompt]
        self._decoding = (cache, self._arenas.take(prompt, batch, max(1, self._room)))
        request.rows = torch.stack([sample.last for sample in request.samples])
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, None], past_key_values=cache)

    def _decode(self, cache: Any, arena: Arena, kwargs: dict[str, Any]) -> BaseModelOutputWithPast:
        hidden = arena.step(kwargs["inputs_embeds"][:, 0], kwargs["position_ids"][-3:])
        for layer in cache.layers:
            layer.length += 1
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, None], past_key_values=cache)
