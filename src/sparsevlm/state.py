"""The user's handle of a model under SparseVLM: its options, its reports, warm-up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .config import SparseVLMConfig, check_whole
from .models import ModelAdapter, compiled_parts, may_have_compiled
from .report import Report
from .request.reporting import make_report
from .request.session import Session
from .template import Template
from .warmup import WarmupReport, given, ladder, warmup

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .typed_options import AllOptions

# Where a model's state is found: on the module whose hooks it holds, so that copies of the model carry copies of it.
STATE_ATTRIBUTE = "_sparsevlm_state"
_COMPILED = (
    "{} is compiled, and hooks break its graph at every layer: it prunes, but is compiled anew, for minutes, and gains "
    "little. Without torch.compile it begins at once; on a GPU the engine records graphs of its own."
)
logger = logging.getLogger(__name__)


class SparseVLMState:
    """One model's pruning: made by :func:`sparsevlm.apply_sparsevlm`, undone by :func:`sparsevlm.remove_sparsevlm`.

    Used as a context manager, it removes itself at the end.
    """

    def __init__(self, adapter: ModelAdapter, config: SparseVLMConfig, template: Template | None = None):
        # transformers' modelling modules, which die of a broken torchvision, load where there is a model, not before.
        from .engine.generate import Engine
        from .generate import Generate
        from .hooks.model_hooks import ModelHooks

        self._session = Session(adapter, config, template or Template())
        self._hooks = ModelHooks(self._session)
        self._engine = Engine(self._session)
        self._generate = Generate(self._session, self._engine)
        self._report: tuple[Any, Report] | None = None

    @property
    def adapter(self) -> ModelAdapter:
        """The model, its decoder and its vision tower."""
        return self._session.adapter

    @property
    def config(self) -> SparseVLMConfig:
        """Options in force outside of :meth:`options`."""
        return self._session.config

    @property
    def attached(self) -> bool:
        """Tells whether the model prunes."""
        return self._hooks.attached

    @property
    def report(self) -> Report:
        """Report of the last request of this thread or task (of the running one, as far as it is).

        A thread or task that made none gets the last of any.

        Raises
        ------
        RuntimeError
            If there was none yet.
        """
        request = self._session.last
        if request is None:
            raise RuntimeError(
                "no request yet: call model.generate(**inputs) first."
                if self.attached
                else "no request was made under this state, and the model is no longer its own: read the report of "
                "what the last apply_sparsevlm returned."
            )
        so_far = (request.serial, request.finished, request.decode_steps, request.failed)
        if self._report is None or self._report[0] != so_far:
            knows = self._session.template != Template()  # of a processor
            self._report = (so_far, make_report(self.adapter, request, knows_template=knows))
        return self._report[1]

    @contextlib.contextmanager
    def options(self, **changes: Unpack[AllOptions]) -> Iterator[SparseVLMState]:
        """Other options for the requests inside: ``with state.options(keep=0.25): model.generate(...)``.

        They hold in the calling thread or task alone. ``keep`` may be a list with one budget per sample.

        Raises
        ------
        TypeError, ValueError
            As :func:`sparsevlm.apply_sparsevlm`, before anything runs.
        RuntimeError
            If the model does not prune under this state (any more).
        """
        self._check_attached()
        with self._session.override(changes):
            yield self

    def warmup(
        self,
        *requests: Mapping[str, Any],
        max_new_tokens: int = 64,
        seconds: float = 60.0,
        largest: float = 0.9,
        most_visual: int = 4096,
    ) -> WarmupReport:
        """Run typical requests ahead, largest first: kernels are compiled and what they need is recorded.

        Without requests these are blank images of all sizes, one a prompt, up to ``most_visual`` visual tokens: later
        requests of one image and up to 200 other tokens find all that they need under the options in force. On a CPU,
        where nothing is recorded, no such request is run.

        Parameters
        ----------
        *requests : mapping
            Inputs of ``generate`` each, as the processor makes them; sizes matter, not what they say.
        max_new_tokens : int
            As later requests will ask for.
        seconds : float
            No request begins after that.
        largest : float
            Share of the GPU's memory; once so much is taken, no further request begins.
        most_visual : int
            Visual tokens of the largest image, without requests.

        Returns
        -------
        WarmupReport
            What was run, how long it took, and what memory.

        Raises
        ------
        RuntimeError
            If the model does not prune under this state (any more).
        NotImplementedError
            If no requests are named and there are no examples for the model's family.
        """
        self._check_attached()
        check_whole("most_visual", most_visual, 1)
        rungs = given(requests)
        if not requests and self.adapter.model.device.type == "cuda":  # elsewhere nothing is recorded
            options = self._session.options
            rungs = ladder(self.adapter, most_visual, options.reads_text, options.is_free)
        return warmup(self.adapter.model, rungs, max_new_tokens, seconds, largest)

    def expect_n_visual(self, n_vis: int | None) -> None:
        """Set the expected number of visual tokens, inside :meth:`options` as well.

        Raises
        ------
        RuntimeError
            If the model does not prune under this state (any more).
        """
        self._check_attached()
        self._session.expect_n_visual(n_vis)

    def clear_image_cache(self) -> None:
        """Forget the images that the option ``image_cache`` has kept, once the request that runs has ended.

        The engine does so by itself where weights are replaced, or written into as torch counts it.

        Raises
        ------
        RuntimeError
            If it is the calling thread's own request.
        TimeoutError
            If another thread's lasts longer than the option ``timeout``.
        """
        with self._session.between_requests():
            self._engine.forget_images()

    def _check_attached(self) -> None:
        if not self.attached:
            raise RuntimeError(
                "this state was removed or replaced by another apply_sparsevlm: its options would change nothing. "
                "Use the state that the last apply_sparsevlm returned."
            )

    def __enter__(self) -> SparseVLMState:
        self._check_attached()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Register the hooks and take ``generate``: nothing else of the model is replaced; harmless when done already.

        Raises
        ------
        RuntimeError
            If another state is in force.
        """
        if self.attached:
            return
        adapter = self.adapter
        if hasattr(adapter.base_model, STATE_ATTRIBUTE):
            raise RuntimeError("another apply_sparsevlm is in force on this model: call remove_sparsevlm on it first.")
        if may_have_compiled():
            torch.compiler.reset()  # what was compiled without the hooks would go on to run without them
        if parts := compiled_parts(adapter.model, self._hooks.modules):
            logger.warning("sparsevlm: %s", _COMPILED.format(", ".join(part or adapter.name for part in parts[:3])))
        self._hooks.attach()
        self._generate.attach()
        setattr(adapter.base_model, STATE_ATTRIBUTE, self)

    def detach(self) -> None:
        """Give the untouched model back, once the request that runs has ended; harmless when done already.

        Raises
        ------
        RuntimeError
            If it is the calling thread's own request.
        TimeoutError
            If another thread's lasts longer than the option ``timeout``.
        """
        if not self.attached:
            return
        with self._session.between_requests():
            self._generate.detach()
            self._hooks.detach()
            self._engine.detach()
        if getattr(self.adapter.base_model, STATE_ATTRIBUTE, None) is self:
            delattr(self.adapter.base_model, STATE_ATTRIBUTE)
