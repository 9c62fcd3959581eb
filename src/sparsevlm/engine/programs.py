"""The prompt programs of a model, by bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from ..runtime.request import Request
from ..runtime.view import ModelView
from ..selection.selectors.span import SpanSelector
from . import static_prefill
from .graphs import Recent, recorded
from .prefill import LayerCache, Packed
from .static_prefill import Inputs, Outputs, Plan

# Graphs that are kept; each holds the activations of its bucket.
_MOST_PROGRAMS = 4


class Program:
    """One bucket's program with its own inputs."""

    def __init__(self, view: ModelView, bucket: Plan, selector: SpanSelector, like: Inputs) -> None:
        self._inputs = Inputs(*(getattr(like, field.name).clone() for field in dataclasses.fields(like)))
        self._run: Callable[[], Outputs] = recorded(
            lambda: static_prefill.run(view, bucket, selector, self._inputs), like.hidden.device
        )

    def __call__(self, given: Inputs) -> Outputs:
        for field in dataclasses.fields(given):
            getattr(self._inputs, field.name).copy_(getattr(given, field.name))
        return self._run()


class Programs(Recent[Plan, Program]):
    """Runs prompts whose choices are made on the device.

    Parameters
    ----------
    view : ModelView
    """

    def __init__(self, view: ModelView) -> None:
        super().__init__(_MOST_PROGRAMS)
        self._view = view

    @staticmethod
    def takes(request: Request) -> bool:
        """Whether the selector's choice waits for nothing."""
        return type(request.selector) is SpanSelector

    def prefill(self, request: Request, packed: Packed) -> tuple[Tensor, list[LayerCache]]:
        """As :func:`sparsevlm.engine.prefill.prefill`; the caches are overwritten by the next call."""
        bucket, counts = static_prefill.plan(request)
        given = static_prefill.make_inputs(request, packed, bucket, counts)
        assert isinstance(request.selector, SpanSelector)
        selector = request.selector
        program = self.get(bucket, lambda: Program(self._view, bucket, selector, given))
        found = program(given)
        kept = [rows.clone() for rows in found.kept]
        static_prefill.record(request, bucket, counts, kept, self._view.n_layers)
        return found.hidden.clone(), found.caches
