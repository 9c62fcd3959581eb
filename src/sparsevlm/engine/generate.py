"""Runs calls of ``generate`` on packed samples, fixed shapes and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..runtime.clock import Mark
from ..runtime.opening import open_request
from ..runtime.prompt import PIXELS, visual_masks
from ..runtime.request import Request
from ..runtime.session import Session
from ..runtime.view import ModelView
from ..selection.context import VISION_NEEDS
from .arena import Arena
from .call import Call
from .prefill import pack, prefill
from .prompt import Prompt, leave_out
from .refusals import refuses_arguments, refuses_mode, refuses_prepared, refuses_request
from .workshop import Workshop


class UnsupportedByEngineError(Exception):
    """What transformers has prepared is not for the engine, as :attr:`Engine.reason` tells; nothing was changed."""


@dataclass
class Decoding:
    """New tokens of a request."""

    arena: Arena
    request: Request
    begin: Mark

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token of every sample, (batch, vocab_size)."""
        logits = self.arena.step(tokens)
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
        self._made: Workshop | None = None
        self.reason = ""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make what they need themselves: graphs cannot be copied."""
        return {**vars(self), "_made": None}

    @property
    def _view(self) -> ModelView:
        return self._session.view

    @property
    def _shop(self) -> Workshop:
        if self._made is None:
            self._made = Workshop(self._view)
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
        settings = compat.GenerationSettings(self._view.model, arguments)
        self.reason = "a call within another that goes on" if is_nested else ""
        self.reason = self.reason or refuses_arguments(arguments, settings, modes) or refuses_mode(self._view) or ""
        if self.reason:
            return None
        arguments = compat.with_generation_config(self._view.model, arguments)
        with self._shop.open():
            self._shop.glance()
            call = Call.of(arguments, settings["num_return_sequences"] or 1)
            if not call.kinds:
                self.reason = "no image or video"
                return None
            if self._may_see():
                try:
                    share = self._session.options.config.vision_keep
                    call.prefetch_vision(self._view, self._shop.vision, share, self._shop.stream)
                except torch.OutOfMemoryError:
                    self._shop.forget()
            if not self._shop.look():
                call.pending = None
            self.reason = self._shop.decoder_unfit or self._shop.decoder_hooked() or ""
        if self.reason:
            return None
        call.position_on_host(self._view.model, self._view.base_model)
        return call

    def _may_see(self) -> bool:
        """Whether the tower's program may take the place of its modules, if nothing is hooked to them."""
        if self._session.options.traits.needs & VISION_NEEDS or self._view.vision_tower.training:
            return False
        return self._shop.tower_unfit is None

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
    ) -> Tensor:
        """Run a call that transformers has prepared.

        Raises
        ------
        UnsupportedByEngineError
            If it is not for the engine after all.
        """
        self.reason = refuses_prepared(prepared, generation_config, modes) or ""
        if self.reason:
            raise UnsupportedByEngineError
        room = max(1, generation_config.max_length - input_ids.shape[1])
        try:
            with self._shop.open():
                logits, decoding = self._prefill(call, input_ids, prepared, room)
        except torch.OutOfMemoryError as error:
            with self._shop.open():
                self._shop.forget()
            self.reason = "out of memory"
            raise UnsupportedByEngineError from error

        def step(tokens: Tensor) -> Tensor:
            with self._shop.open():
                return decoding.step(tokens)

        return sample(
            input_ids, logits, step, logits_processor, stopping_criteria, generation_config, modes.get("streamer")
        )

    def _refuse(self, reason: str) -> UnsupportedByEngineError:
        self.reason = reason
        return UnsupportedByEngineError(reason)

    def _prefill(
        self, call: Call, input_ids: Tensor, prepared: Mapping[str, Any], room: int
    ) -> tuple[Tensor, Decoding]:
        """Run a prompt."""
        view = self._view
        ids = call.prepared("input_ids", input_ids)
        positions = prepared.get("position_ids")
        if not isinstance(positions, Tensor) or positions.ndim != 3:
            raise self._refuse(f"position_ids of {getattr(positions, 'ndim', 0)} dimensions")
        positions = call.prepared("position_ids", positions, dim=1)
        inputs = {name: tensor for name, tensor in call.on_host.items() if name.endswith("_grid_thw")}
        inputs["attention_mask"] = call.prepared("attention_mask", prepared.get("attention_mask"))
        inputs |= {"input_ids": ids, **call.visual}
        request = open_request(self._session, inputs, visual_masks(view, inputs))
        if (refused := refuses_request(request)) is not None:
            raise self._refuse(refused)
        request.see_positions(positions)
        prompt = Prompt.of(view, ids, positions[-3:], call.kinds, call.copies)
        if call.pending is not None and call.pending.n_tokens(view) != prompt.n_features:
            call.pending = None
        if call.pending is not None and (kept := call.pending.kept()) is not None:
            prompt = prompt.only(kept)
            leave_out(view, request, prompt)
        features = self._features(call)
        if features.shape[0] != prompt.n_features:
            raise self._refuse("placeholders and features that differ in number")  # the model's own error follows
        request.run_on("engine", "packed samples")
        if prompt.kept is None and request.config.vision_keep < 1.0:
            request.remark("; the tower computed all: images and videos in one call, or images given encoded")
        begin = Mark.now(features.device)
        logits, arena = self._run(request, prompt, features)
        end = Mark.now(features.device)
        request.add_time("prefill", begin, end)
        if call.pending is not None:
            request.add_time("vision", call.pending.begin, call.pending.end)
        arena.start(prompt.next_positions, room)
        request.place(torch.stack([sample.last for sample in request.samples]))
        request.finish(None, arena.cache_bytes(len(ids) * ids.shape[1]))
        return logits, Decoding(arena, request, end)

    def _run(self, request: Request, prompt: Prompt, features: Tensor) -> tuple[Tensor, Arena]:
        if self._shop.programs.takes(request, prompt):
            logits, caches, arena = self._shop.programs.prefill(request, prompt, features)
            return logits, arena or self._shop.arenas.take(caches, request.batch)
        embeds = prompt.embeddings(self._view, features)
        request.to(embeds.device)
        request.see_embeddings(embeds)
        packed = pack(self._view, request, embeds, prompt.positions.to(embeds.device))
        hidden, caches = prefill(self._view, self._shop.weights, request, packed)
        request.forget_embeddings()
        return self._view.model.lm_head(hidden), self._shop.arenas.take(caches, request.batch)

    def _features(self, call: Call) -> Tensor:
        """Rows of the vision tower: images before videos."""
        if call.pending is not None:
            call.pending.wait()
            return call.pending.seen.tokens
        found: list[Tensor] = []
        for kind in call.kinds:
            output = call.encoded(kind)
            if output is None:
                pixels, grid = call.visual[PIXELS[kind]], f"{kind}_grid_thw"
                if (tokens := self._see(pixels, call.on_host[grid])) is not None:
                    found.append(tokens)
                    continue
                output = getattr(self._view.base_model, f"get_{kind}_features")(pixels, call.arguments[grid])
            found += output.pooler_output
        return torch.cat(found)

    def _see(self, pixels: Tensor, grid: Tensor) -> Tensor | None:
        """Images by the tower's program, if it can run."""
        try:
            self._shop.look()
            if not self._may_see() or self._shop.tower_hooked():
                return None
            return self._shop.vision(pixels, tuple((t, h, w) for t, h, w in grid.tolist())).tokens.clone()
        except torch.OutOfMemoryError:
            self._shop.forget()
            self._shop.look()
            return None


def sample(
    input_ids: Tensor,
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
) -> Tensor:
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

    Returns
    -------
    Tensor of shape (batch, length + n_new), int64
    """
    pad = generation_config._pad_token_tensor
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    while True:
        scores = logits_processor(input_ids, logits.to(copy=True, dtype=torch.float32, device=input_ids.device))
        if generation_config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if pads:
            tokens = tokens * unfinished + pad.to(input_ids.device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if not bool(unfinished.max()):
            break
        logits = step(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids
