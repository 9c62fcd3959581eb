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
from ..cuda_graphs import CapturedPrograms, GraphPool
from ..fused_weights import FusedWeights
from . import bucketed_prefill
from .bucketed_prefill import BucketShape, Inputs, Outputs
from .decode_graph import DecodeGraph
from .prefill import LayerCache

# Graphs that are kept; each holds the caches of its bucket.
_MOST_GRAPHS = 8


class PrefillGraph:
    """One bucket's program with its own inputs, and the decode steps on the caches that it leaves.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool or None
        ``None``: it is run once, and not recorded.
    bucket : BucketShape
    selector : OrderedSelector
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        weights: FusedWeights,
        pool: GraphPool | None,
        bucket: BucketShape,
        selector: OrderedSelector,
    ) -> None:
        embedding = adapter.decoder.embed.weight
        self._integers = torch.zeros(bucketed_prefill.n_integers(bucket), dtype=torch.int64, device=embedding.device)
        self._features = embedding.new_zeros((bucket.n_features, embedding.shape[1]))
        inputs = Inputs.of(bucket, self._integers, self._features)

        def run() -> Outputs:
            return bucketed_prefill.run(adapter, weights, bucket, selector, inputs)

        self._run: Callable[[], Outputs] = run
        self._make_decode_graph: Callable[[list[LayerCache]], DecodeGraph] | None = None
        if pool is not None:
            inputs.cu_seqlens[:, -1] = torch.tensor(bucket.rows)  # it runs before a request is filled in
            self._run = pool.record(run)
            self._make_decode_graph = lambda caches: DecodeGraph(adapter, weights, pool, caches, bucket.batch)
        self._decode_graph: DecodeGraph | None = None

    def __call__(self, integers: Tensor, features: Tensor) -> Outputs:
        if self._integers.is_cuda:
            integers = integers.pin_memory()
        self._integers.copy_(integers, non_blocking=True)
        self._features[: features.shape[0]].copy_(features)
        return self._run()

    def decode_graph(self, found: Outputs) -> DecodeGraph | None:
        """Decode steps on the caches of the last call, where these stay in place."""
        if self._make_decode_graph is None:
            return None
        # Without a graph every call has caches of its own.
        if self._decode_graph is None or self._decode_graph.prompt is not found.caches:
            self._decode_graph = self._make_decode_graph(found.caches)
        return self._decode_graph


class PrefillGraphs(CapturedPrograms[tuple[BucketShape, Hashable], PrefillGraph]):
    """Runs prompts whose choices are made on the device.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool) -> None:
        super().__init__(_MOST_GRAPHS, pool)
        self._adapter, self._weights = adapter, weights

    @staticmethod
    def takes(request: Request, prompt: Prompt) -> bool:
        """Tells whether neither counts nor choices wait for the device, and there is room for the features."""
        if any(sample.plan is None for sample in request.samples):
            return False
        max_seqlen = max(sample.alive.shape[0] for sample in request.samples)
        return request.traits.ordered and prompt.n_features <= max_seqlen * len(request.samples)

    def prefill(
        self, request: Request, prompt: Prompt, features: Tensor
    ) -> tuple[Tensor, list[LayerCache], DecodeGraph | None]:
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
        decode_graph : DecodeGraph or None
            To go on with on these caches, where they stay in place.
        """
        bucket, counts = bucketed_prefill.plan(request)
        integers = bucketed_prefill.make_integers(request, prompt, bucket, counts)
        selector = request.selector
        assert isinstance(selector, OrderedSelector)
        # Objects without attributes of their own are as good as any other of their class.
        key: Any = (bucket, selector if vars(selector) else type(selector))
        program = self.get_or_capture(
            key, lambda pool: PrefillGraph(self._adapter, self._weights, pool, bucket, selector)
        )
        found = program(integers, features)
        kept = [rows.clone() for rows in found.kept]
        bucketed_prefill.record(request, bucket, counts, kept, self._adapter.n_layers)
        return found.logits, found.caches, program.decode_graph(found)
