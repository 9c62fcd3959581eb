"""The handle of a model under SparseVLM: attaches the hooks, holds the options, tells the last report."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from ..compat import cache_of
from ..config import SparseVLMConfig
from ..report import Report
from ..selection.context import VISION_NEEDS, Selector, SelectorTraits
from ..selection.overrides import effective_config, idle_options
from ..selection.selectors import make_selector
from ..template import Template
from . import prompt
from .cache import check_cache
from .clock import Mark
from .costs import cache_bytes, static_note
from .engine_host import Engine, EngineHost
from .forward import Forward
from .pruner import before_layer
from .recorder import make_report
from .refusals import check_call, check_mode, check_packing, check_prefill
from .request import Request
from .threads import ThreadGuard
from .view import ModelView
from .vision import VisionWatch, bound_arguments
from .warm_up import WarmUp, warm_up

# Where a model's state is found; on the module whose hooks it holds, so that copies of the model carry copies of it.
STATE_ATTRIBUTE = "_sparsevlm_state"


class SparseVLMState:
    """One model's pruning: made by :func:`sparsevlm.apply_sparsevlm`, undone by ``remove``.

    Used as a context manager, it removes itself at the end.

    Attributes
    ----------
    config : SparseVLMConfig
        Options in force outside :meth:`options`.
    """

    def __init__(
        self,
        view: ModelView,
        config: SparseVLMConfig,
        template: Template | None = None,
        make_engine: Callable[[ModelView, EngineHost], Engine] | None = None,
    ):
        self.view = view
        self.config = config
        self._template = template or Template()
        self._overrides: list[SparseVLMConfig] = []
        self._warned: set[str] = set()
        self._check(config, [] if config.preset else [f.name for f in dataclasses.fields(config)])
        self._forward: Forward | None = None
        self._request: Request | None = None
        self._report: tuple[Any, Report] | None = None
        self._logits_to_keep = 0
        self._threads = ThreadGuard(view)
        self._vision = VisionWatch(view, self.needs, self._threads, self.wants_engine)
        self._begin: Mark | None = None
        self._handles: list[RemovableHandle] = []
        self._engine = None if make_engine is None else make_engine(view, self)

    @property
    def attached(self) -> bool:
        """Whether the model prunes."""
        return bool(self._handles)

    @property
    def report(self) -> Report:
        """Report of the last request (of the running one, as far as it is).

        Raises
        ------
        RuntimeError
            If there was none yet.
        """
        if self._request is None:
            raise RuntimeError("no request yet: call model.generate(**inputs) first.")
        so_far = (self._request.finished, self._request.decode_steps)
        if self._report is None or self._report[0] != so_far:
            self._report = (so_far, make_report(self.view, self._request))
        return self._report[1]

    @contextlib.contextmanager
    def options(self, **changes: Any) -> Iterator[SparseVLMState]:
        """Other options for the requests inside: ``with state.options(keep=0.25): model.generate(...)``.

        ``keep`` may be a list with one budget per sample.

        Raises
        ------
        TypeError, ValueError
            As :func:`sparsevlm.apply_sparsevlm`, before anything runs.
        RuntimeError
            If the model does not prune under this state (any more).
        """
        if not self.attached:
            raise RuntimeError(
                "this state was removed or replaced by another apply_sparsevlm: its options would change nothing. "
                "Use the state that the last apply_sparsevlm returned."
            )
        config = self._active().replace(**changes)
        self._check(config, changes)
        self._overrides.append(config)
        try:
            yield self
        finally:
            self._overrides.pop()

    def warm_up(
        self,
        *requests: Mapping[str, Any],
        max_new_tokens: int = 64,
        seconds: float = 60.0,
        largest: float = 0.9,
    ) -> WarmUp:
        """Run typical requests ahead, largest first: kernels are compiled and what they need is recorded.

        Parameters
        ----------
        *requests : mapping
            Inputs of ``generate`` each, as the processor makes them; sizes matter, not what they say.
        max_new_tokens : int
            As later requests will ask for.
        seconds, largest : float
            No request begins after so many seconds, or once this share of the GPU's memory is taken.

        Returns
        -------
        WarmUp
            What was run, how long it took, and what memory.
        """
        return warm_up(self.view.model, requests, max_new_tokens, seconds, largest)

    def announce(self, n_vis: int | None) -> None:
        """Set the expected number of visual tokens, inside :meth:`options` as well."""
        self.config = self.config.replace(n_vis=n_vis)
        self._overrides = [config.replace(n_vis=n_vis) for config in self._overrides]

    def __enter__(self) -> SparseVLMState:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Register the hooks. Nothing of the model is replaced but one method that decides on compilation."""
        view, add = self.view, self._handles.append
        setattr(view.base_model, STATE_ATTRIBUTE, self)
        add(view.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(view.base_model.register_forward_pre_hook(self._before_base, with_kwargs=True))
        add(view.base_model.register_forward_hook(self._after_base, always_call=True))
        add(view.vision_tower.register_forward_pre_hook(self._vision.before, with_kwargs=True))
        add(view.vision_tower.register_forward_hook(self._vision.after, always_call=True))
        add(view.text_model.register_forward_pre_hook(self._before_text, with_kwargs=True))
        for layer_idx, layer in enumerate(view.layers):
            hook = _LayerHook(self, layer_idx)
            add(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if self._engine is not None:
            self._engine.attach()
        # generate asks this before it compiles the decode step, in which hooks would break the graph at every layer.
        view.model._valid_auto_compile_criteria = self._decide_compilation

    def detach(self) -> None:
        """Remove every hook; harmless when done already."""
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.view.base_model.__dict__.pop(STATE_ATTRIBUTE, None)
        self.view.model.__dict__.pop("_valid_auto_compile_criteria", None)
        if self._engine is not None:
            self._engine.detach()
        self._end_forward()
        self._vision.release()

    def _active(self) -> SparseVLMConfig:
        return self._overrides[-1] if self._overrides else self.config

    def _resolve(self, config: SparseVLMConfig) -> tuple[SparseVLMConfig, Selector, SelectorTraits, tuple[int, ...]]:
        """Options in force under the selector, itself, and target layers of a configuration, all checks made."""
        selector = make_selector(config)
        config = effective_config(config, selector)
        traits = SelectorTraits.of(selector)
        prompt.check_needs(self.view, traits)
        layers = prompt.resolved_target_layers(self.view, config, traits)
        prompt.check_budget(self.view, config, layers)
        return config, selector, traits, layers

    def _check(self, config: SparseVLMConfig, given: Collection[str]) -> None:
        """Raise where options do not fit the model; warn of those ``given`` that change nothing."""
        traits = self._resolve(config)[2]
        if idle := idle_options(config, traits, given):
            message = f"{', '.join(idle)}: no effect under selector={traits.name!r} and this budget."
            prompt.warn_once(self._warned, message, message)

    def _decide_compilation(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> bool:
        """Whether ``generate`` shall ask for a compiled step: what it gets is the engine's."""
        check_prefill(generation_config)
        return self._engine is not None and self._engine.consider(model_kwargs, generation_config)

    def wants_engine(self) -> bool:
        """Whether the option ``engine`` is in force; unset, it is where the decoder is on a CUDA device."""
        wanted = self._active().engine
        if wanted is not None:
            return wanted
        return next(self.view.text_model.parameters()).is_cuda

    def vision_keep(self) -> float:
        """Share of the visual tokens that the vision tower computes under the engine."""
        return self._active().vision_keep

    def needs(self) -> frozenset[str]:
        """What the selector in force needs."""
        return SelectorTraits.of(make_selector(self._active())).needs

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._threads.claim()
        inputs = bound_arguments(module, args, kwargs)
        check_call(inputs)
        keep = inputs.get("logits_to_keep")
        self._logits_to_keep = keep if isinstance(keep, int) else 0

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._threads.claim()
        inputs = bound_arguments(module, args, kwargs)
        logits_to_keep, self._logits_to_keep = self._logits_to_keep, 0
        cache = cache_of(inputs)
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        self._begin = Mark.now(ids.device)
        opened = self._open(inputs, logits_to_keep)
        if opened is None:
            self._begin_dense(cache, ids, inputs.get("attention_mask"))
            return
        request, masks = opened
        if self._engine is not None and self.wants_engine():
            request.path_reason += f" ({self._engine.reason})"
        if request.config.vision_keep < 1.0:
            request.path_reason += "; the tower computed all, vision_keep is the engine's"
        self._forward = Forward(cache, request, masks)

    def _open(self, inputs: Mapping[str, Any], logits_to_keep: int) -> tuple[Request, dict[str, Tensor]] | None:
        """Begin the request of a pass that brings pictures, and tell where their tokens are."""
        self._end_forward()
        check_mode(self.view)
        self._vision.begin_pass(inputs)
        masks = prompt.visual_masks(self.view, inputs)
        if not masks:
            return None
        cache = cache_of(inputs)
        mask = torch.stack(list(masks.values())).any(dim=0)
        request = self._new_request(cache, mask.shape[0], mask.shape[1])
        request.logits_to_keep = logits_to_keep
        # Assisted decoding appends guesses to the prompt and asks for their logits and the one before them.
        n_drafted = logits_to_keep - 1 if logits_to_keep > 1 and _in_assisted_decoding() else 0
        inputs = {**inputs, **self._vision.grids(inputs)}
        request.samples = prompt.make_samples(self.view, inputs, mask, self._template, n_drafted)
        prompt.plan_samples(self.view, request, inputs.get("input_ids"))
        self._warn(request)
        request.n_valid = [sample.visual.shape[0] + sample.other.shape[0] for sample in request.samples]
        if cache is not None and not request.drops_nothing:
            check_cache(cache, self.view.n_layers)
        return request, masks

    def claim(self) -> None:
        """Take the model for the calling thread; raises ``RuntimeError`` where it works for another."""
        self._threads.claim()

    def open_request(self, inputs: Mapping[str, Any]) -> Request | None:
        """Begin a request that the engine will run; ``None`` if it brings no picture."""
        self._threads.claim()
        opened = self._open(inputs, 1)
        return None if opened is None else opened[0]

    def close_request(self, request: Request, cache: Cache) -> None:
        """End the prompt of a request that the engine has run."""
        self._finish_prefill(request, cache)
        self._vision.end_pass(comes_again=False)

    def _begin_dense(self, cache: Any, ids: Tensor, attention_mask: Any) -> None:
        """A pass without pixels: a decode step, a turn of text, or a prompt of text."""
        self._forward = Forward(cache)
        request = self._request
        if request is not None and request.fills(cache) and (ids.shape[1] == 1 or int(cache.get_seq_length()) > 0):
            request.decode_steps += 1
            return
        request = self._new_request(cache, ids.shape[0], ids.shape[1])
        request.skipped_because = "no image or video in the input"
        request.n_valid = [ids.shape[1]] * ids.shape[0]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            request.n_valid = attention_mask[:, -ids.shape[1] :].sum(dim=-1).tolist()

    def _new_request(self, cache: Any, batch: int, q_len: int) -> Request:
        config, selector, traits, layers = self._resolve(self._active())
        past_len = 0 if cache is None else int(cache.get_seq_length())
        self._request = Request(config, selector, traits, layers, q_len, past_len, batch)
        self._request.cache = None if cache is None else weakref.ref(cache)
        self._report = None
        return self._request

    def _warn(self, request: Request) -> None:
        counts = sorted({sample.visual.shape[0] for sample in request.samples if sample.visual.shape[0]})
        n_vis = request.config.n_vis
        if n_vis is not None and counts != [n_vis]:
            message = f"n_vis={n_vis} was announced, the inputs hold {counts} visual tokens: these are used."
            prompt.warn_once(self._warned, "n_vis", message)
        for sample in request.samples:
            if sample.plan is not None and sample.plan.clamped:
                prompt.warn_once(self._warned, "budget", sample.plan.clamped + " (said once; see the reports).")

    def _before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._threads.claim()
        forward = self._forward
        request = forward.request if forward is not None else None
        if forward is None or request is None:
            return
        if request.traits.needs & VISION_NEEDS and not request.drops_nothing:
            visual = [sample.visual for sample in request.samples]
            forward.vision = self._vision.rows(forward.visual_masks, visual, request.traits)
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim == 3:
            check_packing(positions, kwargs.get("attention_mask"))
            request.coordinates = positions[-3:].expand(3, *positions.shape[1:])
        if {"features", "text_features"} & request.traits.needs or request.config.raters == "embedding":
            request.features = kwargs["inputs_embeds"]

    def _after_base(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._threads.is_mine:  # torch calls this for a refused thread as well
            return
        forward, request = self._forward, self._request
        if forward is not None and request is not None and output is not None:
            device = next(iter(self.view.layers[-1].parameters())).device
            assert self._begin is not None
            request.clock.add("decode" if request.decode_steps else "prefill", self._begin, Mark.now(device))
            if not request.decode_steps:
                self._finish_prefill(request, forward.cache)
        self._vision.end_pass(comes_again=forward is not None and forward.cache is None)
        self._end_forward()

    def _finish_prefill(self, request: Request, cache: Cache | None) -> None:
        self._vision.book(request.clock)
        if cache is not None:
            request.cache = weakref.ref(cache)
            layers = cache.layers[: self.view.n_layers]
            request.kv_bytes = cache_bytes(layers, request.past_len + request.q_len)
            request.kv_note = static_note(layers)
        request.finished = True

    def _end_forward(self) -> None:
        """Drop what belongs to one pass; after an exception as well."""
        forward, self._forward = self._forward, None
        if forward is not None:
            forward.disarm()
            if forward.request is not None:
                forward.request.features = None


class _LayerHook:
    """Forward pre-hook of one decoder layer."""

    def __init__(self, state: SparseVLMState, layer_idx: int):
        self.state = state
        self.layer_idx = layer_idx

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self.state._forward
        if forward is None:
            return None
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if forward.cache is None:  # without one given, the text model has just made its own
            forward.cache = cache_of(kwargs)
        pruned, changed = before_layer(self.state.view, forward, self.layer_idx, hidden_states, kwargs)
        if args:
            return (pruned, *args[1:]), changed
        return args, {**changed, "hidden_states": pruned}


def _in_assisted_decoding() -> bool:
    """Whether transformers' assisted decoding makes this call; it takes its method from the class, past any hook."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_assisted_decoding":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
