"""Runs calls of ``generate`` on packed samples, fixed shapes and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..kernels.skinny_linear import MOST_ROWS
from ..models import ModelAdapter
from ..request.inputs import check_mask, visual_masks
from ..request.opening import open_request, warn_clamped
from ..request.request import Request
from ..request.session import Session
from ..request.timing import Mark
from ..selection.context import VISION_NEEDS
from .call import Call, Prompt, leave_out
from .runner import ModelRunner
from .support import unsupported_arguments, unsupported_call, unsupported_mode, unsupported_request
from .text.decode_graph import DecodeGraph
from .text.kept_cache import fill_cache
from .vision.tables import Grids

_FLOAT8 = "; new tokens by float8 copies of the weights"
_NOT_FLOAT8 = f"; new tokens by the model's own weights, as float8 copies serve {MOST_ROWS} samples at most"


class UnsupportedByEngineError(Exception):
    """Raised where prepared inputs are not for the engine, as :attr:`Engine.reason` tells; nothing was changed."""


@dataclass
class Decoding:
    """New tokens of a request."""

    decode_graph: DecodeGraph
    request: Request
    begin: Mark

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token of every sample, (batch, vocab_size)."""
        logits = self.decode_graph.step(tokens)
        end = Mark.now(logits.device)
        self.request.begin_decode_step()
        self.request.add_time("decode", self.begin, end)
        self.begin = end
        return logits


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
    def _runner(self) -> ModelRunner:
        if self._made is None:
            self._made = ModelRunner(self._session.adapter)
        return self._made

    def detach(self) -> None:
        """Free everything, and give every weight a place of its own again."""
        if self._made is not None:
            with self._made.open():
                self._made.clear()

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
        call.position_on_host(self._adapter.model, self._adapter.base_model)
        call.arguments = compat.with_generation_config(self._adapter.model, call.arguments)
        return call

    def _read(self, arguments: dict[str, Any], copies: int) -> Call:
        """Read a call, and begin to encode its images; where it is not for the engine, say so."""
        self._runner.quick_check()
        call = Call.of(self._adapter, arguments, copies)
        if call.grids:
            check_mask(call.on_host.get("attention_mask"))
        self.reason = ("no image or video" if not call.grids else call.misfit(self._adapter)) or ""
        if self.reason:
            return call
        if self._may_encode():
            try:
                config = self._session.options.config
                call.prefetch_vision(self._adapter, self._runner.vision, config, self._runner.stream)
            except torch.OutOfMemoryError:
                self._runner.release_memory()
        if not self._runner.look():
            call.pending = None
        self.reason = self._runner.unsupported() or ""
        return call

    def _release_memory(self) -> None:
        with self._runner.open():
            self._runner.release_memory()
        self.reason = "out of memory"

    def _may_encode(self) -> bool:
        """Tells whether the tower's program may take the place of its modules, if nothing is hooked to them."""
        if self._session.options.traits.needs & VISION_NEEDS or self._adapter.vision.module.training:
            return False
        return self._runner.tower_unsupported is None

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
        self.reason = unsupported_call(prepared, generation_config, modes) or ""
        if self.reason:
            raise UnsupportedByEngineError
        capacity = max(1, generation_config.max_length - input_ids.shape[1])
        try:
            with self._runner.open():
                logits, decoding = self._prefill(call, input_ids, prepared, capacity)
        except torch.OutOfMemoryError as error:
            self._release_memory()
            raise UnsupportedByEngineError from error

        def step(tokens: Tensor) -> Tensor:
            try:
                with self._runner.open():
                    return decoding.step(tokens)
            except torch.OutOfMemoryError:  # the answer is lost, but not the next one
                self._release_memory()
                raise

        def check() -> None:
            if self._runner.prefill.is_faulty:
                raise ValueError(
                    "what the visual tokens are judged by holds NaN or infinity; check the model's inputs and dtype."
                )

        sequences, scores, raw = sample(
            input_ids,
            logits,
            step,
            logits_processor,
            stopping_criteria,
            generation_config,
            modes.get("streamer"),
            check,
        )
        wants_dict, cache = generation_config.return_dict_in_generate, compat.cache_of(prepared)
        if wants_dict or compat.cache_of(call.arguments) is not None:
            with self._runner.open():
                fill_cache(cache, decoding.request, decoding.decode_graph.caches, decoding.decode_graph.n_new)
        return compat.generation_output(sequences, scores, raw, cache) if wants_dict else sequences

    def _refuse(self, reason: str) -> UnsupportedByEngineError:
        self.reason = reason
        return UnsupportedByEngineError(reason)

    def _prefill(
        self, call: Call, input_ids: Tensor, prepared: Mapping[str, Any], capacity: int
    ) -> tuple[Tensor, Decoding]:
        """Run a prompt."""
        adapter = self._adapter
        ids = call.prepared("input_ids", input_ids)
        positions = prepared.get("position_ids")
        if not isinstance(positions, Tensor) or positions.ndim != 3:
            raise self._refuse(f"position_ids of {getattr(positions, 'ndim', 0)} dimensions")
        positions = call.prepared("position_ids", positions, dim=1)
        mask = call.prepared("attention_mask", prepared.get("attention_mask"))
        inputs = {"input_ids": ids, "attention_mask": mask, **call.visual}
        request = open_request(self._session, inputs, visual_masks(adapter, inputs), call.grids)
        if (refused := unsupported_request(request)) is not None:
            raise self._refuse(refused)
        request.see_positions(adapter, positions)
        prompt = Prompt.of(adapter, ids, positions[-3:], call.grids, call.copies)
        if call.pending is not None and call.pending.n_tokens != prompt.n_features:
            call.pending = None
        if call.pending is not None and (kept := call.pending.kept()) is not None:
            prompt = prompt.only(kept)
            leave_out(adapter, request, prompt)
            warn_clamped(self._session, request)
        features = self._features(call)
        if features.shape[0] != prompt.n_features:
            raise self._refuse("placeholders and features that differ in number")  # the model's own error follows
        request.run_on("engine", "packed samples")
        if prompt.kept is None and request.config.vision_keep < 1.0:
            request.remark("; the tower computed all: images and videos in one call, or images given encoded")
        begin = Mark.now(features.device)
        logits = self._runner.prefill.run(request, prompt, features)
        end = Mark.now(features.device)
        request.add_time("prefill", begin, end)
        if call.pending is not None:
            request.add_time("vision", call.pending.begin, call.pending.end)
        space = self._runner.prefill.space
        assert space is not None  # since the prompt
        is_float8 = request.config.weights == "fp8" and request.batch <= MOST_ROWS
        decode_graph = self._runner.decode_graphs.over(space, request.batch, is_float8)
        if request.config.weights == "fp8":
            request.remark(_FLOAT8 if is_float8 else _NOT_FLOAT8)
        decode_graph.start(prompt.next_positions, capacity)
        request.place(torch.stack([sample.last for sample in request.samples]))
        request.finish(None, request.kv_bytes)
        return logits, Decoding(decode_graph, request, end)

    def _features(self, call: Call) -> Tensor:
        """Rows of the vision tower: images before videos."""
        if call.pending is not None:
            call.pending.wait()
            return call.pending.seen.tokens
        found: list[Tensor] = []
        for kind, grids in call.grids.items():
            output, modality = call.encoded(kind), self._adapter.modalities[kind]
            if output is None:
                pixels = call.visual[modality.pixels]
                if grids is not None and (tokens := self._encode_images(pixels, tuple(grids))) is not None:
                    found.append(tokens)
                    continue
                sizes = {name: call.arguments.get(name) for name in modality.size_inputs}
                output = getattr(self._adapter.base_model, f"get_{kind}_features")(pixels, **sizes)
            found += output.pooler_output
        return torch.cat(found)

    def _encode_images(self, pixels: Tensor, grids: Grids) -> Tensor | None:
        """Images by the tower's program, if it can run."""
        try:
            self._runner.look()
            if not self._may_encode() or self._runner.foreign_tower_hook():
                return None
            return self._runner.vision(pixels, grids).tokens.clone()
        except torch.OutOfMemoryError:
            self._runner.release_memory()
            self._runner.look()
            return None


def sample(
    input_ids: Tensor,
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    check: Callable[[], None] = lambda: None,
) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Greedy and sampled decoding, token for token as transformers' ``_sample``.

    Parameters
    ----------
    input_ids : Tensor of shape (batch, length), int64
        Prompts.
    logits : Tensor of shape (batch, vocab_size)
        Of the first new token.
    step : callable
        ``step(tokens)`` with tokens of shape (batch,) gives the logits of the next.
    logits_processor, stopping_criteria, generation_config
        As transformers has prepared them.
    streamer : BaseStreamer, optional
    check : callable
        Raises where the prompt has failed; called when the first token is there.

    Returns
    -------
    sequences : Tensor of shape (batch, length + n_new), int64
    scores, logits : tuple of Tensor of shape (batch, vocab_size), float32, or None
        By new token, as processed and as they came, where ``generation_config`` asks for them.
    """
    pad, wants_dict = generation_config._pad_token_tensor, generation_config.return_dict_in_generate
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    all_scores: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_scores else None
    all_logits: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_logits else None
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    first = input_ids.shape[1] + 1
    while True:
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = logits_processor(input_ids, logits)
        all_scores = None if all_scores is None else (*all_scores, scores)
        all_logits = None if all_logits is None else (*all_logits, logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if pads:
            tokens = tokens * unfinished + pad.to(input_ids.device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, all_scores)
        if streamer is not None:
            if input_ids.shape[1] == first:
                check()
            streamer.put(tokens.cpu())
        goes_on = bool(unfinished.max())
        if input_ids.shape[1] == first:
            check()
        if not goes_on:
            break
        logits = step(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids, all_scores, all_logits
