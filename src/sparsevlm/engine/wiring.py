"""Puts the engine in the place of what ``generate`` calls, for what it can carry."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from ..compat import cache_of
from ..runtime.clock import Mark
from ..runtime.engine_host import EngineHost
from ..runtime.prompt import PIXELS
from ..runtime.request import Request
from ..runtime.view import ModelView
from ..selection.context import VISION_NEEDS
from .arena import Arena
from .cache import EngineLayer
from .call import Call, to_device
from .prefill import pack, prefill
from .prompt import Prompt, leave_out
from .refusals import refuses_generation, refuses_patches, refuses_request
from .settings import plain_generation_config
from .stand_ins import StandIns
from .vision import Grids, Seen
from .workshop import Workshop

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
# Of newer transformers: encodes pictures before anything else is done.
_ENCODE = "_prepare_multimodal_encoder_kwargs_for_generation"
_UNCALLED = "no greedy or sampling call of generate"


@dataclass
class Decoding:
    """New tokens of a request."""

    cache: Cache
    arena: Arena
    request: Request
    begin: Mark


def _is_nested(model: Any) -> bool:
    """Whether a call of generate for this model is inside of another."""
    frame, n_calls = sys._getframe(), 0
    while frame is not None:
        n_calls += frame.f_code is _GENERATE and frame.f_locals.get("self") is model
        frame = frame.f_back  # type: ignore[assignment]
    return n_calls > 1


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
        self._begin(view)

    def _begin(self, view: ModelView) -> None:
        self._view = view
        self._stand_ins = StandIns()
        self.reason = _UNCALLED
        self._refused: str | None = _UNCALLED
        self._call = Call()
        self._decoding: Decoding | None = None
        self._nested = False
        self._encoding = False
        self._shop = Workshop(view)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """The engine of a copied model: graphs cannot be copied, it records its own."""
        twin = object.__new__(Engine)
        memo[id(self)] = twin
        twin._host = copy.deepcopy(self._host, memo)
        twin._begin(copy.deepcopy(self._view, memo))
        twin._stand_ins = copy.deepcopy(self._stand_ins, memo)
        return twin

    def attach(self) -> None:
        """Take the place of what generate calls."""
        model = self._view.model
        ours: dict[str, Callable[..., Any]] = {
            "_extract_generation_mode_kwargs": self._on_call,
            "_prepare_generation_config": self._on_config,
            "_prepare_position_ids_for_generation": self._on_positions,
            "get_compiled_call": self._on_compiled_call,
            "_prefill": self._on_prefill,
            "prepare_inputs_for_generation": self._on_inputs,
            "_update_model_kwargs_for_generation": self._on_update,
        }
        if hasattr(model, _ENCODE):
            ours[_ENCODE] = self._on_encode
        for name, own in ours.items():
            self._stand_ins.take(model, name, own)
        self._stand_ins.take(self._view.vision_tower, "forward", self._see)

    def _plain(self, name: str) -> Callable[..., Any]:
        return self._stand_ins.plain(name)

    def detach(self) -> None:
        """Give it back, and the memory."""
        self._stand_ins.give_back()
        self._call, self._decoding = Call(), None
        with self._shop.open():
            self._shop.clear()

    def _on_call(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, *args: Any
    ) -> Any:
        """The first that ``generate`` asks: encode the pictures while it goes on."""
        self._host.claim()
        self._nested = self._decoding is not None and _is_nested(self._view.model)
        if not self._nested:
            self._refused, self._decoding, self._call = _UNCALLED, None, Call()
            alone = custom_generate is None and assistant_model is None
            if alone and self._host.wants_engine() and self._refuses_mode() is None:
                with self._shop.open():
                    self._begin_call(kwargs)
        plain = self._plain("_extract_generation_mode_kwargs")
        return plain(custom_generate, kwargs, synced_gpus, assistant_model, *args)

    def _begin_call(self, kwargs: dict[str, Any]) -> None:
        self._shop.glance()
        self._call = Call.of(kwargs)
        if self._may_see() and kwargs.get("mm_encoder_outputs") is None:
            try:
                self._call.look_ahead(self._view, self._shop.vision, self._host.vision_keep(), self._shop.stream)
            except torch.OutOfMemoryError:
                self._shop.forget()

    def _on_config(self, generation_config: Any = None, **kwargs: Any) -> Any:
        plain = self._plain("_prepare_generation_config")
        found = plain_generation_config(self._view.model.config, plain, generation_config, kwargs)
        settings = found[0]
        self._call.samples_once = settings.num_beams == 1 and settings.num_return_sequences == 1
        self._call.samples_once &= settings.prompt_lookup_num_tokens is None
        return found

    def _on_encode(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Where the pictures are under way, nobody waits for them here."""
        if self._call.ahead is not None and self._call.samples_once:
            return model_kwargs
        with self._expecting():
            found: dict[str, Any] = self._plain(_ENCODE)(model_kwargs)
        return found

    @contextlib.contextmanager
    def _expecting(self) -> Iterator[None]:
        """Where transformers encodes the pictures of this call, and no others."""
        self._encoding = True
        try:
            yield
        finally:
            self._encoding = False
            self._call.ahead = None

    def _may_see(self) -> bool:
        """Whether the tower's program is what is asked for, if nothing is hooked to the tower."""
        if self._host.needs() & VISION_NEEDS or self._view.vision_tower.training:
            return False
        return self._shop.tower_unfit is None and self._stand_ins.disturbed("forward") is None

    def _on_positions(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions, computed on the host where all that they depend on is."""
        plain = self._plain("_prepare_position_ids_for_generation")
        ids = self._call.on_host.get("input_ids")
        cache = cache_of(model_kwargs)
        if ids is None or inputs_tensor is not self._call.given["input_ids"] or cache is not None:
            found: Tensor = plain(inputs_tensor, model_kwargs)
            return found
        positions = plain(ids, self._call.read_all(model_kwargs))
        base_model: Any = self._view.base_model
        base_model.rope_deltas = to_device(base_model.rope_deltas, inputs_tensor.device)
        return self._call.note("position_ids", positions, inputs_tensor.device)

    def consider(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> bool:
        """Note, before ``generate`` begins, what it will do.

        Parameters
        ----------
        model_kwargs, generation_config
            Of the call.

        Returns
        -------
        bool
            Whether the engine will run it, as far as that is known.
        """
        if self._nested:
            self._refused = "a call within another that goes on"
            return False
        self._decoding = None
        if not self._host.wants_engine():
            self._refused = "engine=False, or no GPU"
            return False
        self._refused = refuses_generation(model_kwargs, generation_config) or self._refuses_model()
        return self._refused is None

    def _refuses_mode(self) -> str | None:
        """Why nothing runs on the engine under the modes of torch that are in force."""
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return "gradients"
        device = self._view.text_model.embed_tokens.weight.device.type
        if torch.is_autocast_enabled(device):
            return "autocast"
        return refuses_patches(self._view)

    def _refuses_model(self) -> str | None:
        if (mode := self._refuses_mode()) is not None:
            return mode
        if self._view.text_model.training:
            return "training mode"
        if (replaced := self._stand_ins.disturbed()) is not None:
            return replaced
        with self._shop.open():
            if not self._shop.look():
                self._call.ahead = None
        return self._shop.decoder_unfit or self._shop.decoder_hooked()

    def _on_prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        call, self._call = self._call, Call()
        refused, self._refused = self._refused, _UNCALLED
        self.reason = refused or _UNCALLED
        if refused is None:
            try:
                with self._shop.open():
                    found = self._prefill(call, input_ids, generation_config, model_kwargs)
            except torch.OutOfMemoryError:
                found, self.reason, call.ahead = None, "out of memory", None
                with self._shop.open():
                    self._shop.forget()
            if found is not None:
                return found
        self._call = call  # its pictures are encoded
        with self._expecting():
            if self._stand_ins.has(_ENCODE) and not model_kwargs.get("mm_encoder_outputs"):
                encoded = self._plain(_ENCODE)(dict(model_kwargs))
                model_kwargs.clear()
                model_kwargs.update(encoded)
            return self._plain("_prefill")(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prefill(
        self, call: Call, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> CausalLMOutputWithPast | None:
        """Run a prompt, or tell in ``reason`` why not."""
        ids = call.read("input_ids", input_ids)
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        kinds = {kind for kind, name in PIXELS.items() if model_kwargs.get(name) is not None or encoded.get(kind)}
        on_host = call.read_all(model_kwargs)
        grids = {name: grid for name, grid in call.on_host.items() if name.endswith("_grid_thw")}
        pixels = {name: model_kwargs.get(name) for name in PIXELS.values()}
        request = self._host.open_request({**on_host, **grids, **pixels, "input_ids": ids})
        if request is None:
            self.reason = "no picture"
            return None
        if (refused := refuses_request(request)) is not None:
            self.reason = refused
            return None
        positions = on_host["position_ids"]
        if positions.ndim != 3:
            self.reason = f"position_ids of {positions.ndim} dimensions"
            return None
        prompt = Prompt.of(self._view, ids, positions[-3:], kinds)
        if call.ahead is not None and call.ahead.n_tokens(self._view) != prompt.n_features:
            call.ahead = None
        if call.ahead is not None and (kept := call.ahead.kept()) is not None:
            prompt = prompt.only(kept)
            leave_out(self._view, request, prompt)
        features = self._features(call, kinds, model_kwargs)
        if features.shape[0] != prompt.n_features:
            self.reason = "placeholders and features that differ in number"  # the model's own error follows
            return None
        request.path, request.path_reason = "engine", "packed samples"
        if prompt.kept is None and request.config.vision_keep < 1.0:
            request.path_reason += "; the tower computed all: pictures of two kinds, or several answers to a prompt"
        room = max(1, generation_config.max_length - ids.shape[1])
        begin = Mark.now(features.device)
        logits, arena = self._run(request, prompt, features)
        end = Mark.now(features.device)
        request.clock.add("prefill", begin, end)
        arena.start(prompt.next_positions, room)
        cache: Cache = cache_of(model_kwargs)
        cache.layers[:] = [EngineLayer(layer, arena, len(ids), ids.shape[1]) for layer in arena.prompt]
        request.rows = torch.stack([sample.last for sample in request.samples])
        self._host.close_request(request, cache)
        if call.ahead is not None:
            request.clock.add("vision", call.ahead.begin, call.ahead.end)
        self._decoding = Decoding(cache, arena, request, end)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    def _run(self, request: Request, prompt: Prompt, features: Tensor) -> tuple[Tensor, Arena]:
        if self._shop.programs.takes(request, prompt):
            logits, caches, arena = self._shop.programs.prefill(request, prompt, features)
            return logits, arena or self._shop.arenas.take(caches, request.batch)
        embeds = prompt.embeddings(self._view, features)
        request.to(embeds.device)
        if {"features", "text_features"} & request.traits.needs:
            request.features = embeds
        packed = pack(self._view, request, embeds, prompt.positions.to(embeds.device))
        hidden, caches = prefill(self._view, self._shop.weights, request, packed)
        request.features = None
        return self._view.model.lm_head(hidden), self._shop.arenas.take(caches, request.batch)

    def _features(self, call: Call, kinds: set[str], model_kwargs: Mapping[str, Any]) -> Tensor:
        """Rows of the vision tower: images before videos."""
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        if call.ahead is not None and not encoded:
            call.ahead.wait()
            return call.ahead.seen.tokens
        found: list[Tensor] = []
        base_model: Any = self._view.base_model
        for kind in (kind for kind in PIXELS if kind in kinds):
            output = encoded.get(kind)
            if output is None:
                encode = getattr(base_model, f"get_{kind}_features")
                output = encode(model_kwargs[PIXELS[kind]], model_kwargs[f"{kind}_grid_thw"])
            found += output.pooler_output
        return torch.cat(found)

    def _on_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        return self._step if self._refused is None else self._plain("get_compiled_call")(compile_config)

    def _on_inputs(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._decoding is not None and cache_of(kwargs) is self._decoding.cache:
            return {"tokens": input_ids[:, -1]}
        found: dict[str, Any] = self._plain("prepare_inputs_for_generation")(input_ids, *args, **kwargs)
        return found

    def _on_update(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._decoding is not None and cache_of(outputs) is self._decoding.cache:
            return model_kwargs
        found: dict[str, Any] = self._plain("_update_model_kwargs_for_generation")(
            outputs, model_kwargs, *args, **kwargs
        )
        return found

    def _step(self, tokens: Tensor | None = None, **kwargs: Any) -> Any:
        """One token of every sample; by the model itself where the engine did not run the prompt."""
        decoding = self._decoding
        if tokens is None or decoding is None:
            return self._view.model(**kwargs)
        with self._shop.open():
            logits = decoding.arena.step(tokens)
        decoding.request.decode_steps += 1
        end = Mark.now(logits.device)
        decoding.request.clock.add("decode", decoding.begin, end)
        decoding.begin = end
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=decoding.cache)

    def _see(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """The tower's forward pass."""
        asks = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
        asks |= kwargs.get("return_dict") is False
        if self._host.wants_engine() and not asks and self._refuses_mode() is None:
            with self._shop.open():
                seen = self._seen(hidden_states, tuple((t, h, w) for t, h, w in grid_thw.tolist()))
            if seen is not None:
                return BaseModelOutputWithPooling(
                    last_hidden_state=seen.hidden.clone(), pooler_output=seen.tokens.clone()
                )
        return self._plain("forward")(hidden_states, grid_thw=grid_thw, **kwargs)

    def _seen(self, hidden_states: Tensor, grids: Grids) -> Seen | None:
        """Pictures by the tower's program, if it can run."""
        ahead = None
        if self._encoding:
            ahead, self._call.ahead = self._call.ahead, None
        try:
            same = self._shop.look()
            if not self._may_see() or self._shop.tower_hooked():
                return None
            if same and ahead is not None and ahead.grids == grids and ahead.seen.kept is None:
                ahead.wait()
                return ahead.seen
            return self._shop.vision(hidden_states, grids)
        except torch.OutOfMemoryError:
            self._shop.forget()
            return None
