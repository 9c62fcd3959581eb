"""Session of a model: its options by context, its lock, its requests."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..compat import cache_of, is_draft, tensor_parallel_group
from ..config import SparseVLMConfig
from ..models import ModelAdapter
from ..selection.budget import below_min_keep
from ..selection.context import SelectorTraits
from ..selection.overrides import unused_options
from ..selection.selectors import make_selector
from ..template import Template
from .feature_exchange import FeatureExchange
from .inputs import check_mask
from .kv_cache import cache_bytes
from .lock import GenerationLock
from .options import Options
from .request import Request

logger = logging.getLogger(__name__)

# By session; contexts (threads, tasks) do not see each other's.
_OVERRIDES: ContextVar[tuple[_Override, ...]] = ContextVar("sparsevlm_overrides", default=())
_LAST: ContextVar[tuple[tuple[weakref.ref[Session], Request, _Override | None], ...]] = ContextVar(
    "sparsevlm_last", default=()
)


@dataclass(eq=False)
class _Override:
    """Options of a session within a context and its copies, and the last request under them."""

    session: weakref.ref[Session]
    options: Options
    last: Request | None = None


class Session:
    """The calls of one model.

    Parameters
    ----------
    adapter : ModelAdapter
    config : SparseVLMConfig
        Options outside of :meth:`override`.
    template : Template

    Attributes
    ----------
    lock : GenerationLock
    in_generate : bool
        Whether ``generate`` owns the running call.
    is_drafting : bool
        Whether the running call verifies drafted tokens (assisted decoding).
    n_given : int
        Length of the sequence that the running call was given, what is cached included; 0: not known.
    copies : int
        Rows that the running call makes of every prompt: beams or returned sequences.
    plain_reason : str
        Why the running call is not for the engine; empty without an engine.
    given : mapping
        Arguments of the running call; transformers keeps some to itself, such as the sizes of images.
    exchange : FeatureExchange, optional
        Visual features that the running call brings, or leaves for later ones.
    """

    def __init__(self, adapter: ModelAdapter, config: SparseVLMConfig, template: Template) -> None:
        self.adapter, self.template = adapter, template
        self.lock = GenerationLock()
        self.plain_reason, self.copies, self.n_given = "", 1, 0
        self.given: Mapping[str, Any] = {}
        self.exchange: FeatureExchange | None = None
        self.in_generate = self.is_drafting = self._is_open = self._expects_images = False
        self._n_overrides, self._warned = 0, set[str]()
        self._current: Request | None = None
        self._base = Options.of(adapter, config)
        self.warn_unused(config, [] if config.preset else [f.name for f in dataclasses.fields(config)])
        self._warn_small(config)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without requests."""
        return {**vars(self), "_n_overrides": 0, "_current": None, "in_generate": False, "given": {}, "exchange": None}

    @property
    def options(self) -> Options:
        """Options in force in the calling context."""
        own = self._innermost
        return self._base if own is None else own.options

    @property
    def _innermost(self) -> _Override | None:
        return next((one for one in reversed(_OVERRIDES.get()) if one.session() is self), None)

    @property
    def config(self) -> SparseVLMConfig:
        """Options in force outside of :meth:`override`."""
        return self._base.given

    @contextlib.contextmanager
    def override(self, changes: Mapping[str, Any]) -> Iterator[None]:
        """Other options for the calls inside, in this context alone."""
        options = Options.of(self.adapter, self.options.given.replace(**changes))
        self.warn_unused(options.given, changes)
        self._warn_small(options.given)
        own = _Override(weakref.ref(self), options)
        _OVERRIDES.set((*_OVERRIDES.get(), own))
        self._n_overrides += 1
        try:
            yield
        finally:
            self._n_overrides -= 1
            if own.last is not None and self.last is own.last:
                self._make_last(own.last, None)
            # By itself, not as the last: contexts of generators and tasks end in any order.
            _OVERRIDES.set(tuple(one for one in _OVERRIDES.get() if one is not own))

    def expect_n_visual(self, n_vis: int | None) -> None:
        """Set the number of visual tokens that requests are expected to have, inside of :meth:`override` as well."""

        def expecting(options: Options) -> Options:
            return Options.of(self.adapter, options.given.replace(n_vis=n_vis))

        self._base = expecting(self._base)
        for one in _OVERRIDES.get():
            if one.session() is self:
                one.options = expecting(one.options)

    @property
    def wants_engine(self) -> bool:
        """Tells whether the option ``engine`` is in force; unset, it is where the decoder is on a CUDA device."""
        wanted = self.options.config.engine
        if wanted is not None:
            return wanted
        return next(self.adapter.decoder.module.parameters()).is_cuda

    @property
    def request(self) -> Request | None:
        """The request that is running, or the one that ran last."""
        return self._current

    @property
    def running(self) -> Request | None:
        """The request that the running call has begun."""
        return self._current if self._is_open else None

    @property
    def last(self) -> Request | None:
        """The last request of the calling context, or of any where it made none.

        Inside :meth:`override` that may be one of a copy of the context, as ``asyncio.to_thread`` makes it.
        """
        own = self._innermost
        request, under = next(((request, under) for of, request, under in _LAST.get() if of() is self), (None, None))
        if own is not None and own.last is not None and (request is None or under is not own):
            return own.last
        return request or self._current

    def new_request(self, cache: Any, batch: int, q_len: int, logits_to_keep: int = 0) -> Request:
        """Begin a request under the options in force."""
        options = self.options
        if self._n_overrides and options is self._base:
            self.warn_once(
                "context",
                "options(...) is open in another thread or task and does not hold in this one. To hand it on, start "
                "the thread with contextvars.copy_context().run.",
            )
        past_len = 0 if cache is None else int(cache.get_seq_length())
        request = self._make_request(
            q_len, past_len, batch, logits_to_keep=logits_to_keep, copies=self.copies,
            cache=None if cache is None else weakref.ref(cache), tp_group=tensor_parallel_group(self.adapter.model),
        )  # fmt: skip
        if self.plain_reason:
            request.remark(f" ({self.plain_reason})")
        if past_len:
            request.count_past(cache_bytes(cache.layers[: self.adapter.n_layers], past_len))
        self._current, self._is_open = request, True
        return request

    def going_on(self, cache: Any, ids: Tensor) -> Request | None:
        """The request that tokens without images, (batch, q_len), are a step of; ``None``: of none.

        In ``generate`` that is the one that the same call has begun. Outside, one token is a step of the last request,
        and several are a turn of their own.
        """
        request = self.running if self.in_generate or ids.shape[1] > 1 else self._current
        if request is None or not request.finished:
            return None
        if not request.fills(cache) and not (cache is None and request.continues_in(ids)):
            return None
        if not self._is_open:
            self._is_open, request.failed = True, None
        return request

    def _make_request(self, q_len: int, past_len: int, batch: int, **more: Any) -> Request:
        """Request under the options in force, from now on the last one of the calling context."""
        of = self.options
        request = Request(of.config, of.selector, of.traits, of.target_layers, q_len, past_len, batch, **more)
        own = self._innermost
        if own is not None:
            own.last = request
        self._make_last(request, own)
        return request

    def _make_last(self, request: Request, under: _Override | None) -> None:
        of_others = (entry for entry in _LAST.get() if entry[0]() not in (None, self))
        _LAST.set((*of_others, (weakref.ref(self), request, under)))

    def take_turn(self) -> int:
        """Take the lock, or wait for it as long as the option ``timeout`` says; the value is how often it is held.

        Raises
        ------
        TimeoutError
            The report of the calling context says so, too; that of the call that runs is left alone.
        """
        try:
            return self.lock.acquire(self.options.config.timeout)
        except TimeoutError as error:
            _end_before_first_pass(self._make_request(0, 0, 0), error)
            raise

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        """Hold the lock inside; the value is what :meth:`take_turn` returns."""
        depth = self.take_turn()
        try:
            yield depth
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def between_requests(self) -> Iterator[None]:
        """Context in which no request runs: those that do are waited for.

        Raises
        ------
        RuntimeError
            If the calling thread's own request is running.
        TimeoutError
        """
        if self.lock.is_mine and self.in_generate:
            raise RuntimeError(
                "this model's own request is running: remove_sparsevlm and apply_sparsevlm wait for it to end. Call "
                "them after generate."
            )
        self.lock.release()  # a direct call that was ended by Ctrl-C holds it
        self.lock.acquire(self.options.config.timeout)
        try:
            yield
        finally:
            self.lock.release()

    def begin_call(self, plain_reason: str = "") -> None:
        """Begin a call of ``generate``, or a direct one; ``plain_reason`` tells why the engine does not run it."""
        self.plain_reason, self.copies = plain_reason, 1
        self.n_given = 0
        self.is_drafting = self._is_open = self._expects_images = False
        self.given, self.exchange = {}, None

    def begin_attempt(self, arguments: Mapping[str, Any]) -> None:
        """Begin to run a call of ``generate``, on the engine or on hooks: its first pass begins a request.

        What the engine has begun before it left the call to the hooks is given up. Rounds of drafts are one answer, and
        so one request.
        """
        self.expect_images(arguments)
        last = self._current
        self._is_open = last is not None and is_draft(arguments) and last.fills(cache_of(arguments))

    def expect_images(self, arguments: Mapping[str, Any]) -> None:
        """Note the arguments of the running call, and whether images or videos are among them, under whatever name
        transformers has for these."""
        self.given = arguments
        self._expects_images = any("pixel" in name and value is not None for name, value in arguments.items())

    @property
    def expects_images(self) -> bool:
        """Tells whether the running call was given images or videos that no pass has brought yet."""
        return self._expects_images

    def check_mask(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a call with images whose mask hides a whole sample, before transformers prepares it.

        Raises
        ------
        ValueError
        """
        if self._expects_images:
            check_mask(arguments.get("attention_mask"))

    @contextlib.contextmanager
    def generating(self, *, is_nested: bool) -> Iterator[None]:
        """Context in which ``generate`` owns the call; the request is told of an error.

        Parameters
        ----------
        is_nested : bool
            Whether another call goes on around it: what belongs to that one comes back at the end.
        """
        names = (
            *("_current", "_is_open", "_expects_images", "is_drafting", "n_given"),
            *("plain_reason", "copies", "in_generate", "given", "exchange"),
        )
        before = {name: getattr(self, name) for name in names}
        self.begin_call()
        self.in_generate = True
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self.in_generate = is_nested  # Ctrl-C may have kept an earlier call from saying that it has ended
            self.given, self.exchange = {}, None  # which hold pixels and features
            if is_nested:
                vars(self).update(before)
                if self._current is not None and self._is_open:
                    self._make_last(self._current, self._innermost)

    def check_images_found(self, inputs: Mapping[str, Any], found: bool) -> None:
        """Refuse to go on dense where the call was given images and its first pass shows none.

        Raises
        ------
        RuntimeError
        """
        expects, self._expects_images = self._expects_images, False
        if expects and not found:
            raise RuntimeError(
                f"images were given, but the first pass of the model brings none ({', '.join(sorted(inputs))}): this "
                "version of transformers hands them on in another way than those that were tested, and nothing would "
                "be pruned. Install a tested version, or call remove_sparsevlm(model)."
            )

    def fail(self, error: BaseException) -> None:
        """Note that the running call ended in an error, for its report."""
        if self._current is not None and self._is_open:
            self._current.fail(error)
        else:
            _end_before_first_pass(self.new_request(None, 0, 0), error)

    def warn_unused(self, config: SparseVLMConfig, given: Collection[str]) -> None:
        """Warn of options that were given and change nothing."""
        traits = SelectorTraits.of(make_selector(config))
        if idle := unused_options(config, traits, given):
            on_hooks = ", engine=False" if config.engine is False else ""
            message = f"{', '.join(idle)}: no effect under selector={traits.name!r}{on_hooks} and this budget."
            self.warn_once(message, message)

    def _warn_small(self, config: SparseVLMConfig) -> None:
        if (small := below_min_keep(config.keep, config.min_keep)) is not None:
            self.warn_once("budget", small + " (said once; see the reports).")

    def warn_once(self, kind: str, message: str) -> None:
        """Log the first warning of a kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("sparsevlm: %s", message)


def _end_before_first_pass(request: Request, error: BaseException) -> None:
    request.run_on("none", "ended before its first pass")
    request.fail(error)
