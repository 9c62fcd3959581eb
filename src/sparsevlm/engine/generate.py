"""Runs calls of ``generate`` on packed samples, fixed shapes and CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..kernels.skinny_linear import MOST_ROWS
from ..models import ModelAdapter
from ..request.feature_exchange import NewFeatures
from ..request.inputs import check_mask, visual_masks
from ..request.opening import open_request, warn_clamped
from ..request.request import Request
from ..request.session import Session
from ..request.timing import Mark
from ..selection.context import VISION_NEEDS
from .call import Call, Prompt, leave_out
from .decoding import Decoding
from .runner import ModelRunner
from .sampling import sample
from .support import unsupported_arguments, unsupported_call, unsupported_mode, unsupported_request
from .text.kept_cache import unsupported_past
from .turn import Turn
from .vision.features import encode_before, encode_now, handed_over, taken
from .vision.program import VisionOutput

_FLOAT8 = "; new tokens by float8 copies of the weights"
_ALL_COMPUTED = "images and videos in one call, or images given encoded"
_NOT_FLOAT8 = f"; new tokens by the model's own weights, as float8 copies serve {MOST_ROWS} samples at most"


class UnsupportedByEngineError(Exception):
    """Raised where prepared inputs are not for the engine, as :attr:`Engine.reason` tells; nothing was changed."""


class Engine:
    """The engine of one model; made ready by the first call that is for it.

    Parameters
    ----------
    session : Session

    Attributes
    ----------
    reason : str
        Why the last call was not for it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._made: ModelRunner | None = None
        self.reason = ""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make what they need themselves: graphs cannot be copied."""
        return {**vars(self), "_made": None}

    @property
    def _adapter(self) -> ModelAdapter:
        return self._session.adapter

    @property
    def _has_one_axis(self) -> bool:
        return self._adapter.decoder.n_position_axes == 1

    @property
    def _runner(self) -> ModelRunner:
        if self._made is None:
            self._made = ModelRunner(self._session.adapter)
        return self._made

    def detach(self) -> None:
        """Free everything, and give every weight a place of its own again."""
        if self._made is not None:
            with self._made.open():
                self._made.clear()

    def forget_images(self) -> None:
        """Free what is kept of images."""
        if self._made is not None:
            self._made.images = None

    def begin(self, arguments: dict[str, Any], modes: Mapping[str, Any], *, is_nested: bool) -> Call | None:
        """Begin a call: encode its images while transformers prepares the rest.

        Parameters
        ----------
        arguments : dict
            Of ``generate``.
        modes : mapping
            From :func:`~sparsevlm.compat.split_mode_arguments`.
        is_nested : bool
            Whether it is inside of another call that goes on.

        Returns
        -------
        Call or None
            ``None``: it is not for the engine, as :attr:`reason` tells.
        """
        settings = compat.GenerationSettings(self._adapter.model, arguments)
        self.reason = "a call within another that goes on" if is_nested else ""
        self.reason = (
            self.reason or unsupported_arguments(arguments, settings, modes) or unsupported_mode(self._adapter) or ""
        )
        if self.reason:
            return None
        try:
            with self._runner.open():
                call = self._read(arguments, settings["num_return_sequences"] or 1)
        except torch.OutOfMemoryError:
            self._release_memory()
        if self.reason:
            return None
        if not call.past_len:
            call.position_on_host(self._adapter, self._runner.positions)
        call.arguments = compat.with_generation_config(self._adapter.model, call.arguments)
        return call

    def _read(self, arguments: dict[str, Any], copies: int) -> Call:
        """Read a call, and begin to encode its images; where it is not for the engine, say so."""
        self._runner.quick_check()
        call = Call.of(self._adapter, arguments, copies)
        exchange = self._session.exchange
        if exchange is not None and exchange.given is not None:
            call.hand_over(exchange.given)
        if call.layouts:
            check_mask(call.on_host.get("attention_mask"))
        past_len = call.past_len
        self.reason = ("no image or video" if not call.layouts and not past_len else call.misfit(self._adapter)) or ""
        if past_len and not self.reason:
            self.reason = unsupported_past(self._adapter, compat.cache_of(arguments), len(call.ids)) or ""
            self.reason = self.reason or ("several answers on a kept cache" if copies > 1 else "")
        if self.reason:
            return call
        if call.layouts and self._may_encode():
            try:
                config = self._session.options.config
                needs = self._session.options.traits.needs & VISION_NEEDS
                call.prefetch_vision(self._adapter, self._runner.encode, config, self._runner.stream, needs)
            except torch.OutOfMemoryError:
                self._runner.release_memory()
        if not self._runner.look():
            call.pending = None
        self.reason = self._runner.unsupported() or ""
        return call

    def encode(self, arguments: Mapping[str, Any]) -> NewFeatures | None:
        """Encode the images of a turn, by its tokens and all that belongs to them, before its prompt.

        Returns
        -------
        NewFeatures or None
            ``None``: the engine is not in force, does not run the model or the call, or memory is short.
        """
        if not self._session.wants_engine or unsupported_mode(self._adapter) is not None:
            return None
        options = self._session.options
        needs, cache_bytes = options.traits.needs & VISION_NEEDS, options.config.image_cache
        try:
            with self._runner.open():
                self._runner.look()
                if self._runner.unsupported() is not None:
                    return None
                return encode_before(arguments, self._adapter, self._runner, self._may_encode, cache_bytes, needs)
        except torch.OutOfMemoryError:
            self._release_memory()
            return None

    def _release_memory(self) -> None:
        with self._runner.open():
            self._runner.release_memory()
        self.reason = "out of memory"

    def _may_encode(self) -> bool:
        """Tells whether the tower's program may take the place of its modules, if nothing is hooked to them."""
        options = self._session.options
        if options.traits.needs & VISION_NEEDS and options.config.vision_keep < 1.0:  # refused by the request
            return False
        return self._runner.tower_unsupported is None and not self._adapter.vision.module.training

    def run(
        self,
        call: Call,
        modes: Mapping[str, Any],
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **prepared: Any,
    ) -> Any:
        """Run a call that transformers has prepared; a tensor or a dictionary, as it asks for.

        Raises
        ------
        UnsupportedByEngineError
            If it is not for the engine after all.
        """
        self.reason = unsupported_call(self._adapter, prepared, generation_config, modes) or ""
        positions = prepared.get("position_ids")
        if not isinstance(positions, Tensor) or positions.ndim != (2 if self._has_one_axis else 3):
            self.reason = self.reason or f"position_ids of {getattr(positions, 'ndim', 0)} dimensions"
        if self.reason:
            raise UnsupportedByEngineError
        capacity = max(1, generation_config.max_length - input_ids.shape[1])
        try:
            with self._runner.open():
                if call.past_len:
                    length = compat.mask_length(generation_config)
                    logits, decoding = self._continue(call, input_ids, prepared, capacity, length)
                else:
                    logits, decoding = self._prefill(call, input_ids, prepared, capacity)
        except torch.OutOfMemoryError as error:
            self._release_memory()
            raise UnsupportedByEngineError from error

        self._session.check_images_found({}, True)  # a pass that a processor makes of the model may bring none
        space = self._runner.prefill.space
        sequences, scores, raw = sample(
            input_ids,
            logits,
            decoding,
            logits_processor,
            stopping_criteria,
            generation_config,
            modes.get("streamer"),
            None if decoding.turn is not None or space is None else space.is_faulty.clone(),
        )
        wants_dict, cache = generation_config.return_dict_in_generate, compat.cache_of(prepared)
        if wants_dict or compat.cache_of(call.arguments) is not None:
            with self._runner.open():
                decoding.keep(cache)
        return compat.generation_output(sequences, scores, raw, cache) if wants_dict else sequences

    def _refuse(self, reason: str) -> UnsupportedByEngineError:
        self.reason = reason
        return UnsupportedByEngineError(reason)

    def _prefill(
        self, call: Call, input_ids: Tensor, prepared: Mapping[str, Any], capacity: int
    ) -> tuple[Tensor, Decoding]:
        """Run a prompt."""
        ids = call.prepared("input_ids", input_ids)
        positions = call.prepared("position_ids", prepared["position_ids"], dim=0 if self._has_one_axis else 1)
        if self._has_one_axis:
            positions = positions.expand(ids.shape)[None]
        mask = call.prepared("attention_mask", prepared.get("attention_mask"))
        request, prompt, seen = self._open(call, {"input_ids": ids, "attention_mask": mask}, positions)
        begin = Mark.now(seen.tokens.device)
        logits = self._runner.prefill.run(request, prompt, seen)
        end = Mark.now(seen.tokens.device)
        request.add_time("prefill", begin, end)
        space = self._runner.prefill.space
        assert space is not None  # since the prompt
        request.place(torch.stack([sample.last for sample in request.samples]))
        request.finish(None, request.kv_bytes)
        return logits, self._decode(request, prompt, capacity, end)

    def _continue(
        self, call: Call, input_ids: Tensor, prepared: Mapping[str, Any], capacity: int, mask_length: int
    ) -> tuple[Tensor, Decoding]:
        """Run a turn on a kept cache."""
        try:
            turn = Turn.of(call, self._adapter, input_ids, prepared, mask_length)
        except ValueError as error:
            raise self._refuse(str(error)) from error
        if call.layouts:
            request, prompt, seen = self._open(call, turn.inputs, turn.positions)
        else:
            request, prompt, seen = turn.open_text(self._session), turn.prompt(self._adapter), None
        begin = Mark.now(input_ids.device)
        logits = turn.run(self._adapter, self._runner, request, prompt, seen)
        end = Mark.now(input_ids.device)
        request.add_time("prefill", begin, end)
        return logits, self._decode(request, prompt, capacity, end, turn)

    def _decode(
        self, request: Request, prompt: Prompt, capacity: int, begin: Mark, turn: Turn | None = None
    ) -> Decoding:
        space = self._runner.prefill.space
        assert space is not None  # since the prompt
        batch, wants_float8 = prompt.ids.shape[0], self._session.options.config.weights == "fp8"
        decode_graph = self._runner.decode_graphs.over(space, batch, wants_float8 and batch <= MOST_ROWS)
        if wants_float8:
            request.remark(_FLOAT8 if batch <= MOST_ROWS else _NOT_FLOAT8)
        decode_graph.start(prompt.next_positions, capacity)
        return Decoding(decode_graph, request, self._runner, self._release_memory, begin, turn)

    def _open(self, call: Call, inputs: Mapping[str, Any], positions: Tensor) -> tuple[Request, Prompt, VisionOutput]:
        """Begin the request of a prompt with images: its tokens, and the rows of the vision tower."""
        adapter, ids, inputs = self._adapter, inputs["input_ids"], {**inputs, **call.visual}
        request = open_request(self._session, inputs, visual_masks(adapter, inputs), call.layouts)
        if (refused := unsupported_request(request)) is not None:
            raise self._refuse(refused)
        request.see_positions(adapter, positions)
        n_axes = adapter.decoder.n_position_axes
        prompt = Prompt.of(adapter, ids, positions[-n_axes:], call.layouts, call.copies)
        if call.pending is not None and call.pending.n_tokens != prompt.n_features:
            call.pending = None
        if call.pending is not None and (kept := call.pending.kept()) is not None:
            prompt = prompt.only(kept)
            leave_out(adapter, request, prompt)
            warn_clamped(self._session, request)
        given = None if self._session.exchange is None else self._session.exchange.given
        if given is not None and given.n_tokens != prompt.n_features:
            raise self._refuse("features of other tokens than placeholders")
        if given is None:
            seen = self._encoded(call, request, prompt)
        else:
            seen = handed_over(given, prompt, call.copies, request.traits.needs & VISION_NEEDS)
        request.run_on("engine", "packed samples")
        if prompt.kept is None and request.config.vision_keep < 1.0:
            why = self._runner.tower_unsupported and f"{self._runner.tower_unsupported}, which has no program"
            request.remark(f"; the tower computed all: {why or _ALL_COMPUTED}")
        if given is None:
            request.note_tower(seen.n_cached, seen.apart)
        return request, prompt, seen

    def _encoded(self, call: Call, request: Request, prompt: Prompt) -> VisionOutput:
        """Rows of the vision tower, images before videos, which later turns may get as well."""
        needs, exchange = request.traits.needs & VISION_NEEDS, self._session.exchange
        if request.drops_nothing and exchange is None:
            needs = frozenset()
        seen = self._encode(call, request, needs)
        if seen is None:
            reading = ", ".join(sorted(needs))
            raise self._refuse(f"selector {request.traits.name!r} needs {reading} of a tower that is not the engine's")
        if seen.tokens.shape[0] != prompt.n_features:
            raise self._refuse("placeholders and features that differ in number")  # the model's own error follows
        if exchange is not None:
            layouts = [sample.layouts for sample in request.samples[:: call.copies]]
            given = self._session.given
            exchange.taken = taken(self._adapter, prompt, call.copies, seen, [*call.layouts], layouts, given)
        return seen

    def _encode(self, call: Call, request: Request, needs: frozenset[str]) -> VisionOutput | None:
        """Rows of the vision tower; the request books their time."""
        if (pending := call.pending) is not None:
            pending.wait()
            request.add_time("vision", pending.begin, pending.end)
            return pending.seen
        cache_bytes, device = self._session.options.config.image_cache, self._adapter.decoder.embed.weight.device
        begin = Mark.now(device)
        seen = encode_now(call, self._adapter, self._runner, self._may_encode, cache_bytes, needs)
        if any(modality.pixels in call.visual for modality in self._adapter.modalities.values()):
            request.add_time("vision", begin, Mark.now(device))  # else all were given encoded
        return seen
