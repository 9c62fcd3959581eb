"""The plain path: hooks on the model's own modules, which prune while these run."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..compat import cache_of, check_layer_arguments, is_paged
from ..request.inputs import (
    check_call,
    check_copies,
    check_inputs,
    check_mode,
    check_packing,
    visual_grids,
    visual_masks,
)
from ..request.kv_cache import cache_bytes, check_cache, memory_note
from ..request.opening import check_fillers, open_request
from ..request.request import Request
from ..request.session import Session
from ..request.step import choose_embedding_raters
from ..request.timing import Mark
from ..selection.context import VISION_NEEDS
from .direct_calls import DirectCalls
from .features import exchange_features, kept_readings
from .late_rows import LateRows
from .proof import Proof
from .pruning import ForwardPass, before_layer, gathered_arguments
from .text_prompt import begin_text
from .vision_hooks import VisionHooks, bound_arguments


class ModelHooks:
    """Hooks of one model; all of them see every call, of ``generate`` and of the modules themselves.

    Parameters
    ----------
    session : Session
    """

    is_sparsevlm_hook = True  # tells these hooks from those of others

    def __init__(self, session: Session) -> None:
        self._session = session
        self._adapter = session.adapter
        self._vision = VisionHooks(session)
        self._forward: ForwardPass | None = None
        self._logits_to_keep = self._n_last = 0
        self._begin: Mark | None = None
        self._direct = DirectCalls(session)
        self._proof: Proof | None = None
        self._is_proven = not session.adapter.family.must_be_proven
        self._handles: list[RemovableHandle] = []
        self._layers: tuple[nn.Module, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are in no call."""
        return {**vars(self), "_forward": None, "_begin": None, "_proof": None}

    @property
    def attached(self) -> bool:
        """Tells whether the hooks are registered."""
        return bool(self._handles)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules that get hooks."""
        adapter = self._adapter
        return (
            adapter.model,
            adapter.base_model,
            adapter.vision.module,
            adapter.decoder.module,
            *adapter.decoder.layers,
        )

    def attach(self) -> None:
        """Register the hooks; nothing of the model is replaced."""
        adapter, add = self._adapter, self._handles.append
        # In an order that holds where both are one module.
        add(adapter.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(adapter.base_model.register_forward_pre_hook(self._before_base, with_kwargs=True))
        add(adapter.base_model.register_forward_hook(self._after_base, always_call=True))
        add(adapter.model.register_forward_hook(self._leave, always_call=True))
        add(adapter.vision.module.register_forward_pre_hook(self._before_tower, with_kwargs=True))
        add(adapter.vision.module.register_forward_hook(self._after_tower, always_call=True))
        add(adapter.decoder.module.register_forward_pre_hook(self._before_text, with_kwargs=True))
        add(adapter.decoder.module.register_forward_hook(self._after_text, always_call=True))
        self._layers = tuple(adapter.decoder.layers)
        for layer_idx, layer in enumerate(self._layers):
            add(layer.register_forward_pre_hook(_LayerHook(self, layer_idx), with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook; harmless when done already."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._end_forward()
        self._vision.release()

    @property
    def _is_flash(self) -> bool:
        return "flash" in (self._adapter.decoder.module.config._attn_implementation or "")

    def _enter(self, module: nn.Module) -> None:
        """Take the lock for a direct call that begins at ``module``."""
        if not (self._session.lock.is_mine and self._session.in_generate):
            self._direct.enter(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._proof is None and self._session.lock.is_mine and not self._session.in_generate:
            self._direct.leave(module, output)

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(module)
        inputs = bound_arguments(module, args, kwargs)
        if is_paged(cache_of(inputs)):
            return
        check_call(self._adapter, inputs)
        if not self._session.in_generate:
            check_inputs(self._adapter, inputs, of_generate=False)
            self._session.expect_images(inputs)
        keep = inputs.get("logits_to_keep")
        self._logits_to_keep = keep if isinstance(keep, int) else 0

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._proof is not None:
            self._forward = self._proof.forward
            return
        if module is not self._adapter.model:  # that has been entered
            self._enter(module)
        inputs = bound_arguments(module, args, kwargs)
        if is_paged(cache_of(inputs)):  # continuous batching, of token ids alone: nothing to prune
            self._end_forward()
            return
        if not self._session.in_generate and self._direct.begins_at(module):
            check_inputs(self._adapter, inputs, of_generate=False)
        logits_to_keep, self._logits_to_keep = self._logits_to_keep, 0
        cache = cache_of(inputs)
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        self._begin = Mark.now(ids.device)
        self._end_forward()
        check_mode(self._adapter)
        self._vision.begin_pass(inputs)
        exchange = self._session.exchange
        kept = None if exchange is None else exchange.hand_over()
        masks = visual_masks(self._adapter, inputs) if kept is None else kept.masks(self._adapter, ids)
        self._session.check_images_found(inputs, bool(masks))
        if not masks:
            self._begin_dense(cache, ids, inputs)
            return
        layouts = self._vision.layouts(inputs, masks) if kept is None else kept.layouts
        if exchange is not None and exchange.only_takes:
            by_row = visual_grids(self._adapter, layouts, ids)
            self._forward = ForwardPass(None, visual_masks=masks, ids=ids, layouts=by_row)
            return
        check_copies(self._adapter, inputs, self._session.copies)
        if not self._is_proven:
            self._prove(module, inputs, ids.shape[:2], cache)
        request = open_request(self._session, inputs, masks, layouts, logits_to_keep)
        if cache is not None and not request.drops_nothing:
            check_cache(cache, self._adapter.decoder.first_shared, self._adapter.decoder.sliding_layers)
            check_fillers(self._adapter, request)
        if request.config.vision_keep < 1.0 and request.first is None:
            request.remark("; the tower computed all, vision_keep is the engine's")
        if request.config.weights == "fp8" and request.first is None:
            request.remark("; the model's own weights were read, weights='fp8' is the engine's")
        if request.config.image_cache and request.first is None and kept is None:
            request.remark("; images were encoded anew, image_cache is the engine's")
        self._forward = ForwardPass(
            cache, request, masks, is_flash=self._is_flash, ids=inputs.get("input_ids"), kept=kept
        )

    def _prove(self, module: nn.Module, inputs: Mapping[str, Any], shape: tuple[int, int], cache: Any) -> None:
        """Let a model that nobody has described prove itself, once."""
        self._proof = Proof(self._session, self._is_flash)
        try:
            self._proof.run(module, inputs, shape, cache)
        finally:
            self._proof = self._forward = None
        self._is_proven = True

    def _begin_dense(self, cache: Any, ids: Tensor, inputs: Mapping[str, Any]) -> None:
        """A pass without pixels: a decode step, a turn of text, or a prompt of text."""
        self._forward = ForwardPass(cache, is_flash=self._is_flash)
        if (request := self._session.going_on(cache, ids)) is not None:
            request.begin_decode_step()
            request.goes_on("plain")
        elif (running := self._session.running) is not None and running.finished:
            self._forward.is_beside = True  # such as the pass without the prompt under guidance_scale
        else:
            begin_text(self._session, cache, ids, inputs)

    def _before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._proof is not None:
            return None
        self._enter(module)
        forward, exchange, given = self._forward, self._session.exchange, kwargs
        if forward is not None and exchange is not None:
            kwargs = exchange_features(self._session, exchange, forward, kwargs, self._vision)
        request = forward.request if forward is not None else None
        if forward is None or request is None:
            return None
        if not request.drops_nothing:
            self._check_layers(getattr(module, "layers", self._layers))
        if request.traits.needs & VISION_NEEDS and not request.drops_nothing and request.first is None:
            visual = [sample.visual for sample in request.samples]
            forward.readout.vision = (
                self._vision.rows(forward.visual_masks, visual, request.traits)
                if forward.kept is None
                else kept_readings(forward.kept, request)
            )
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim == 3:
            check_packing(positions, kwargs.get("attention_mask"))
        request.see_positions(self._adapter, positions)
        embeds = kwargs["inputs_embeds"]
        request.see_embeddings(embeds)
        choose_embedding_raters(request, lambda b, tokens: embeds[b, tokens.to(embeds.device)])
        keep = kwargs.get("logits_to_keep")
        keep = keep if isinstance(keep, int) else 0
        request.compute_last(0 if _records(module, kwargs) else keep)
        changed = kwargs
        if not request.drops_nothing:
            late = self._adapter.decoder.late_features
            if late is not None and late.come_behind(min(request.target_layers), kwargs):
                forward.late = LateRows(request, kwargs[late.mask], kwargs[late.features])
                changed = {**kwargs, late.mask: None, late.features: None}
            if keep:  # the text model would cut tables by the length of the whole sequence, or nothing at all
                self._n_last, changed = keep, {**changed, "logits_to_keep": 0}
        return None if changed is given else (args, changed)

    def _after_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Give the rows that logits are wanted of, if the text model was to choose them."""
        n_last, self._n_last = self._n_last, 0
        if n_last and output is not None:
            output.last_hidden_state = output.last_hidden_state[:, -n_last:]
        self._leave(module, args, output)
        return output

    def _check_layers(self, layers: Iterable[nn.Module]) -> None:
        """Refuse layers that have no hook, which would take dropped tokens for their own."""
        layers = tuple(layers)
        if len(layers) != len(self._layers) or not all(map(operator.is_, layers, self._layers)):
            replaced = [i for i, (new, old) in enumerate(zip(layers, self._layers, strict=False)) if new is not old]
            raise RuntimeError(
                f"decoder layers were replaced since apply_sparsevlm(model): {len(layers)} layers now, "
                f"{len(self._layers)} then, others at {replaced}. Call apply_sparsevlm(model) again."
            )

    def _after_base(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._proof is not None:
            self._forward = None
            return
        if not self._session.lock.is_mine:  # torch calls this for a thread that gave up waiting as well
            return
        forward, request = self._forward, self._session.request
        if forward is not None and not forward.is_beside and request is not None and output is not None:
            device = next(iter(self._adapter.decoder.layers[-1].parameters())).device
            assert self._begin is not None
            request.add_time("decode" if request.decode_steps else "prefill", self._begin, self._begin.end(device))
            if not request.decode_steps:
                self._finish_prefill(request, forward.cache)
        self._vision.end_pass(comes_again=forward is not None and forward.cache is None)
        self._end_forward()
        self._leave(module, args, output)

    def _finish_prefill(self, request: Request, cache: Any) -> None:
        self._vision.book(request.clock)
        if cache is None:
            request.finish(None)
            return
        layers = cache.layers[: self._adapter.n_layers]
        request.finish(cache, cache_bytes(layers, request.past_len + request.q_len), memory_note(layers))

    def _before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._proof is not None:
            return
        self._enter(module)
        self._vision.before(module, args, kwargs)

    def _after_tower(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._session.lock.is_mine and self._proof is None:
            self._vision.after(module, args, output)
            self._leave(module, args, output)

    def _end_forward(self) -> None:
        """Drop what belongs to one pass; after an exception as well."""
        forward, self._forward = self._forward, None
        if forward is not None:
            forward.disarm()
            if forward.request is not None:
                forward.request.forget_embeddings()


def _records(module: Any, arguments: Mapping[str, Any]) -> bool:
    """Tells whether a text model is to return what its layers make of all rows."""
    names = ("output_hidden_states", "output_attentions", "output_router_logits")
    return any(arguments.get(name) or getattr(module.config, name, False) for name in names)


class _LayerHook:
    """Forward pre-hook of one decoder layer."""

    is_sparsevlm_hook = True

    def __init__(self, hooks: ModelHooks, layer_idx: int):
        self.hooks = hooks
        self.layer_idx = layer_idx

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self.hooks._forward
        if forward is None or not self.hooks._session.lock.is_mine:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if self.layer_idx == 0 and forward.request is not None:
            check_layer_arguments(kwargs)
        if forward.cache is None:  # without one given, the text model has just made its own
            forward.cache = cache_of(kwargs)
        pruned, changed = before_layer(self.hooks._adapter, forward, self.layer_idx, hidden_states, kwargs)
        if args:
            return gathered_arguments(self.hooks._adapter, forward, pruned, args), changed
        return args, {**changed, "hidden_states": pruned}
