"""``generate`` of a model under SparseVLM: owns a call from its first step to its last."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin

from . import compat
from .config import REFRESH
from .engine.generate import Engine, UnsupportedByEngineError
from .request.drafting import arguments_of_round, images_at_hand
from .request.inputs import brings_images, check_inputs
from .request.known_tokens import KnownTokens, check_known
from .request.later_images import later_images
from .request.later_inputs import check_later_inputs
from .request.modes import check_modes
from .request.session import Session
from .request.turns import converse


class Generate:
    """Stands on the model in the place of ``generate``; the only thing of it that is replaced.

    A call takes its turn, is prepared by transformers, and then runs on the engine or on the hooks: transformers hands
    what it has prepared to a callable (its ``custom_generate``), which decides.

    Parameters
    ----------
    session : Session
    engine : Engine
    """

    is_sparsevlm = True  # tells a pruned model's from others

    def __init__(self, session: Session, engine: Engine) -> None:
        self._session, self._engine = session, engine
        self._known_tokens = KnownTokens()
        self._before: Callable[..., Any] | None = None
        self._wrapper: Callable[..., Any] | None = None
        self._is_attached = False

    @property
    def plain(self) -> Callable[..., Any]:
        """The ``generate`` whose place this takes."""
        model = self._session.adapter.model
        return self._before or getattr(type(model), "generate").__get__(model)  # noqa: B009

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def attach(self) -> None:
        """Take the place, or stay behind what somebody else has put there before :meth:`detach`."""
        model, self._is_attached = self._session.adapter.model, True
        taken = vars(model).get("generate")
        if taken is None or taken is not self._wrapper:
            self._before = taken
            model.generate = self

    def detach(self) -> None:
        """Give it back, unless somebody else has taken it since; whoever still calls this reaches the plain one."""
        model, self._is_attached = self._session.adapter.model, False
        self._wrapper = vars(model).get("generate")
        if self._wrapper is self:
            self._wrapper = None
            del model.generate
            if self._before is not None:
                model.generate = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_attached:
            return self.plain(*args, **kwargs)
        session, arguments = self._session, compat.with_cache_named(_named(self.plain, args, kwargs))
        if not session.in_generate:  # a direct call of this thread was ended by Ctrl-C, which torch tells no hook
            session.lock.release()
        with (
            _ends_streamer(arguments.get("streamer")),
            session.turn() as depth,
            session.generating(is_nested=depth > 1),
        ):
            if not self._is_attached:  # removed, or replaced, while this call waited for its turn
                return session.adapter.model.generate(**arguments)
            check_inputs(session.adapter, arguments, of_generate=True)
            run = functools.partial(self._run, is_nested=depth > 1)
            if compat.is_draft(arguments):  # rounds of one answer, no turns
                return run(arguments_of_round(session.adapter, arguments))
            return self._take_turn(arguments, run)

    def _take_turn(self, arguments: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> Any:
        """Run a call as a turn of a conversation, the first or a later one, and remember its tokens."""
        session, cache = self._session, compat.cache_of(arguments)
        past_len = 0 if cache is None else int(cache.get_seq_length())
        known = self._known_tokens.of(cache) if past_len else None
        if past_len:
            check_later_inputs(arguments, past_len)
        if session.options.config.turns == REFRESH:
            output = converse(session, arguments, self._engine.encode, run)
        elif past_len:
            if known is not None:
                check_known(known, arguments, past_len)
            with later_images(session.adapter, arguments, past_len) as with_positions:
                output = run(with_positions)
        else:
            output = run(arguments)
        self._known_tokens.keep(session.adapter, arguments, None if known is None else known[:, :past_len], output)
        return output

    def _run(self, arguments: dict[str, Any], *, is_nested: bool) -> Any:
        session, given = self._session, arguments
        session.begin_attempt(arguments)
        wants_engine = session.wants_engine
        settings = compat.GenerationSettings(session.adapter.model, arguments)
        session.copies = settings.copies
        if settings.may_be_refused:
            check_modes(session, arguments, settings)
        if (other := compat.other_generation(session.adapter.model, self.plain, arguments)) is not None:
            session.plain_reason = other if wants_engine else ""
            session.check_mask(arguments)
            return self.plain(**arguments)
        arguments, modes = compat.split_mode_arguments(session.adapter.model, arguments)
        if wants_engine:
            call = self._engine.begin(arguments, modes, is_nested=is_nested)
            if call is not None:
                with contextlib.suppress(UnsupportedByEngineError):
                    return self._prepare(call.arguments, modes, self._engine.run, call)
                session.begin_attempt(given)
                if modes.get("streamer") is not None:
                    modes["streamer"] = _WithoutPrompt(modes["streamer"])
            session.plain_reason = self._engine.reason
        session.check_mask(arguments)
        return self._prepare(arguments, modes, self._run_hooks)

    def _prepare(self, arguments: dict[str, Any], modes: dict[str, Any], run: Callable[..., Any], *own: Any) -> Any:
        """Let transformers prepare the inputs, and ``run`` with them."""
        handed_on = {name: modes[name] for name in ("streamer", "assistant_model") if name in modes}
        return self.plain(**arguments, **handed_on, custom_generate=_Loop(functools.partial(run, *own, modes)))

    def _run_hooks(
        self,
        modes: dict[str, Any],
        model: Any,
        input_ids: Tensor,
        *,
        generation_config: Any,
        inputs_tensor: Tensor | None = None,
        **prepared: Any,
    ) -> Any:
        """Decode by transformers' own loops, with the hooks in the model."""
        decode, is_assisted = compat.decoding_method(model, generation_config, modes)
        self._session.is_drafting, self._session.n_given = is_assisted, input_ids.shape[1]
        generation_config.disable_compile = True  # hooks would break the graph at every layer
        if generation_config.is_assistant and brings_images(self._session.adapter, prepared):
            generation_config.is_assistant = False  # transformers leaves images out of what an assistant is asked
        if is_assisted:
            modes = {**modes, "inputs_tensor": inputs_tensor}
            with images_at_hand(self._session.given):
                return decode(model, input_ids, generation_config=generation_config, **modes, **prepared)
        modes = {name: modes[name] for name in ("streamer", "synced_gpus") if name in modes}
        return decode(model, input_ids, generation_config=generation_config, **modes, **prepared)


class _Loop:
    """Callable that gets the prepared inputs; transformers inspects its signature several times in every call."""

    __signature__ = inspect.Signature(
        [
            inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("input_ids", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("inputs_tensor", inspect.Parameter.KEYWORD_ONLY),
            inspect.Parameter("prepared", inspect.Parameter.VAR_KEYWORD),
        ]
    )

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


class _WithoutPrompt:
    """A streamer that has been given the prompt already, in a call that begins anew."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._is_first = streamer, True

    def put(self, value: Any) -> None:
        """Hand on what comes after the prompt."""
        if not self._is_first:
            self._streamer.put(value)
        self._is_first = False

    def end(self) -> None:
        """Hand on the end."""
        self._streamer.end()


class _ends_streamer(contextlib.AbstractContextManager[None]):  # noqa: N801
    """Ends a streamer where an error ends the call: whoever reads it would wait for ever."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and self._streamer is not None:
            with contextlib.suppress(Exception):
                self._streamer.end()


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    if not args:
        return kwargs
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        if parameter.kind is parameter.VAR_POSITIONAL:  # of a wrapper that hands all on: names are those of generate
            names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
            arguments |= dict(zip(names, arguments.pop(name, ()), strict=False))
    return arguments
