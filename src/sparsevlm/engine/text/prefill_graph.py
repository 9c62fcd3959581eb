"""Programs of prompts, one per bucket, and the steps that follow each."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...models import ModelAdapter
from ...request.request import Request
from ...selection.context import OrderedSelector
from ..call import Prompt
from ..cuda_graphs import Recorded, Recorder
from ..fused_weights import Weights
from . import bucketed_prefill
from .bucketed_prefill import Inputs, Outputs, Plan
from .decode_graph import Arena
from .prefill import LayerCache

# Graphs that are kept; each holds the caches of its bucket.
_MOST_PROGRAMS = 8


class Program:
    """One bucket's program with its own inputs, and the decode steps on the caches that it leaves.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : Weights
    recorder : Recorder or None
        ``None``: it is run once, and not recorded.
    bucket : Plan
    selector : OrderedSelector
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        weights: Weights,
        recorder: Recorder | None,
        bucket: Plan,
        selector: OrderedSelector,
    ) -> None:
        embedding = adapter.decoder.embed.weight
        self._integers = torch.zeros(bucketed_prefill.n_integers(bucket), dtype=torch.int64, device=embedding.device)
        self._features = embedding.new_zeros((bucket.n_features, embedding.shape[1]))
        inputs = Inputs.of(bucket, self._integers, self._features)

        def run() -> Outputs:
            return bucketed_prefill.run(adapter, weights, bucket, selector, inputs)

        self._run: Callable[[], Outputs] = run
        self._make_arena: Callable[[list[LayerCache]], Arena] | None = None
        if recorder is not None:
            inputs.offsets[:, -1] = torch.tensor(bucket.rows)  # it runs before a request is filled in
            self._run = recorder.record(run)
            self._make_arena = lambda caches: Arena(adapter, weights, recorder, caches, bucket.batch)
        self._arena: Arena | None = None

    def __call__(self, integers: Tensor, features: Tensor) -> Outputs:
        if self._integers.is_cuda:
            integers = integers.pin_memory()
        self._integers.copy_(integers, non_blocking=True)
        self._features[: features.shape[0]].copy_(features)
        return self._run()

    def arena(self, found: Outputs) -> Arena | None:
        """Decode steps on the caches of the last call, where these stay in place."""
        if self._make_arena is None:
            return None
        if self._arena is None or self._arena.prompt is not found.caches:  # without a graph every call has its own
            self._arena = self._make_arena(found.caches)
        return self._arena


class Programs(Recorded[tuple[Plan, Hashable], Program]):
    """Runs prompts whose choices are made on the device.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : Weights
    recorder : Recorder
    """

    def __init__(self, adapter: ModelAdapter, weights: Weights, recorder: Recorder) -> None:
        super().__init__(_MOST_PROGRAMS, recorder)
        self._adapter, self._weights = adapter, weights

    @staticmethod
    def takes(request: Request, prompt: Prompt) -> bool:
        """Whether neither counts nor choices wait for the device, and there is room for the features."""
        if any(sample.plan is None for sample in request.samples):
            return False
        longest = max(sample.alive.shape[0] for sample in request.samples)
        return request.traits.ordered and prompt.n_features <= longest * len(request.samples)

    def prefill(
        self, request: Request, prompt: Prompt, features: Tensor
    ) -> tuple[Tensor, list[LayerCache], Arena | None]:
        """Run a prompt.

        Parameters
        ----------
        request : Request
            Its samples are on the host; they and its records are brought up to date.
        prompt : Prompt
        features : Tensor of shape (n_features, hidden_size)

        Returns
        -------
        logits : Tensor of shape (batch, vocab_size)
            Overwritten by the next call.
        caches : list of LayerCache
        arena : Arena or None
            To go on with on these caches, where they stay in place.
        """
        bucket, counts = bucketed_prefill.plan(request)
        integers = bucketed_prefill.make_integers(request, prompt, bucket, counts)
        selector = request.selector
        assert isinstance(selector, OrderedSelector)
        # Objects without attributes of their own are as good as any other of their class.
        key: Any = (bucket, selector if vars(selector) else type(selector))
        program = self.pick(key, lambda recorder: Program(self._adapter, self._weights, recorder, bucket, selector))
        found = program(integers, features)
        kept = [rows.clone() for rows in found.kept]
        bucketed_prefill.record(request, bucket, counts, kept, self._adapter.n_layers)
        return found.logits, found.caches, program.arena(found)
