"""Puts the engine in the place of the model's own forward passes, for what it can carry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from ..runtime.request import Request
from ..runtime.state import EngineHost
from ..runtime.view import ModelView
from ..selection.context import VISION_NEEDS
from .arena import Arena, Arenas
from .prefill import LayerCache, pack, prefill
from .programs import Programs
from .refusals import refuses_generation, refuses_model, refuses_request
from .vision import VisionPrograms, refuses_tower

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
    host : EngineHost
        The state that the engine belongs to.
    """

    def __init__(self, view: ModelView, host: EngineHost) -> None:
        self._host = host
        self._begin(view, view.text_model.forward, view.vision_tower.forward)

    def _begin(self, view: ModelView, plain: Callable[..., Any], plain_tower: Callable[..., Any]) -> None:
        self._view, self._plain, self._plain_tower = view, plain, plain_tower
        self._before: dict[nn.Module, Any] = {}
        self._room = 0
        self._reason: str | None = _UNCALLED
        self._decoding: tuple[Cache, Arena] | None = None
        self._arenas, self._programs, self._vision = Arenas(view), Programs(view), VisionPrograms(view)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """The engine of a copied model: graphs cannot be copied, it records its own."""
        twin = object.__new__(Engine)
        memo[id(self)] = twin
        twin._host = copy.deepcopy(self._host, memo)
        view, plain = copy.deepcopy(self._view, memo), copy.deepcopy(self._plain, memo)
        twin._begin(view, plain, copy.deepcopy(self._plain_tower, memo))
        twin._before = copy.deepcopy(self._before, memo)
        return twin

    def attach(self) -> None:
        """Take the place of the forward passes."""
        # Bound methods: copies of the model get a copy of the engine.
        for module, ours in ((self._view.text_model, self._forward), (self._view.vision_tower, self._see)):
            self._before[module] = vars(module).get("forward")  # accelerate, for one, sets one
            module.forward = ours

    def detach(self) -> None:
        """Give it back, and the memory."""
        for module, before in self._before.items():
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before
        self._before.clear()
        self._decoding = None
        for kept in (self._arenas, self._programs, self._vision):
            kept.clear()

    def consider(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> None:
        """Note, before ``generate`` begins, what it will do.

        Parameters
        ----------
        model_kwargs, generation_config
            Of the call.
        """
        self._decoding = None
        if not self._host.wants_engine():
            self._reason = "engine=False"
            return
        self._reason = refuses_generation(model_kwargs, generation_config) or refuses_model(self._view)
        mask = model_kwargs.get("attention_mask")
        prompt = 0 if mask is None else mask.shape[1]
        self._room = generation_config.max_length - prompt

    def _see(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        asks = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
        if not self._host.wants_engine() or asks or torch.is_grad_enabled():
            return self._plain_tower(hidden_states, grid_thw=grid_thw, **kwargs)
        if self._host.needs() & VISION_NEEDS or refuses_tower(self._view):
            return self._plain_tower(hidden_states, grid_thw=grid_thw, **kwargs)
        grids = tuple((t, h, w) for t, h, w in grid_thw.tolist())
        hidden, tokens = self._vision(hidden_states, grids)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=tokens)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self._decoding is not None and self._decoding[0] is cache and cache is not None:
            return self._decode(cache, self._decoding[1], kwargs)
        request = self._host.running_request()
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
