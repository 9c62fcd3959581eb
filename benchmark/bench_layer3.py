"""Benchmark of CUDA graphs against the same operations one by one, for the prompt and for a decode step.

``python -m benchmark.bench_layer3`` appends its rows to ``results/graphs.csv``: times, share of padding, and costs
of the capture, room for a request included. Without CUDA graphs both are the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmark.timed import Bench
from sparsevlm import apply_sparsevlm
from sparsevlm.bench.cases import Case
from sparsevlm.bench.roofline import roofline_bounds
from sparsevlm.bench.shapes import random_model
from sparsevlm.bench.workload import fresh_inputs
from sparsevlm.engine.call import Prompt
from sparsevlm.engine.capacities import power_of_two
from sparsevlm.engine.cuda_graphs import GraphPool
from sparsevlm.engine.fused_weights import FusedWeights
from sparsevlm.engine.text.decode_graph import DecodeGraphs
from sparsevlm.engine.text.prefill import Prefill
from sparsevlm.engine.vision.program import VisionOutput
from sparsevlm.request.inputs import visual_masks
from sparsevlm.request.opening import open_request
from sparsevlm.state import SparseVLMState

CASES = (Case(256, 1, 64), Case(1024, 1, 64), Case(256, 8, 64))
SMALL_CASES = (Case(36, 1, 8), Case(36, 2, 8))
KEEPS = (1.0, 0.25)
_REPEATS = 10
_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures everything and appends the rows."""
    bench = Bench.begin("bench_layer3", "graphs.csv", arguments)
    shape, cases = ("tiny", SMALL_CASES) if bench.small else ("7b", CASES)
    with torch.no_grad():
        model = random_model(shape, str(bench.device), bench.dtype, "sdpa")
        state = apply_sparsevlm(model, keep=1.0)
        weights = FusedWeights(state.adapter)
        weights.fuse_decoder()
        for case in cases:
            for keep in KEEPS:
                with state.options(keep=keep):
                    for provider, device in (("one by one", torch.device("cpu")), ("graph", bench.device)):
                        GraphBenchmark(bench, state, weights, case, f"{case.name}, keep {keep}", provider).run(
                            GraphPool(device)
                        )
    bench.end()


@dataclass(frozen=True)
class GraphBenchmark:
    """Benchmark of one provider in one case.

    Attributes
    ----------
    bench : Bench
    state : SparseVLMState
    weights : FusedWeights
    case : Case
    shape, provider : str
        Of the rows.
    """

    bench: Bench
    state: SparseVLMState
    weights: FusedWeights
    case: Case
    shape: str
    provider: str

    def run(self, pool: GraphPool) -> None:
        """Times the prompt and the decode steps, by graphs of ``pool``."""
        adapter, case = self.state.adapter, self.case
        gc.collect()  # programs of the case before
        prompt, host = self._prompt()
        seen = VisionOutput(self.bench.random(prompt.n_features, adapter.decoder.module.config.hidden_size))
        decode_graphs = DecodeGraphs(adapter, self.weights, pool)
        prefill = Prefill(adapter, self.weights, pool, decode_graphs)
        request = self._request(host)
        _, cost = self._first(lambda: prefill.run(request, prompt, seen))
        request.settle()
        space = prefill.space
        assert space is not None  # since the prompt
        request.settle()
        bounds = roofline_bounds(adapter, case, request.samples[0].layer_tokens, self.bench.roofline)
        rows = space.layer_cu_seqlens[:, [power_of_two(case.batch), power_of_two(case.batch) + 1]].sum(dim=0).tolist()
        note = f"{100 * (1 - rows[0] / rows[1]):.1f} % of the rows fill up"
        requests = iter([self._request(host) for _ in range(_REPEATS)])
        values = self._repeat(lambda: prefill.run(next(requests), prompt, seen))
        self._keep("prompt", values, cost, bounds["prefill"], note)
        decode_graph = decode_graphs.over(space, case.batch, is_float8=False)
        tokens = torch.zeros(case.batch, dtype=torch.int64, device=self.bench.device)

        def begin() -> None:
            decode_graph.start(prompt.next_positions, case.new_tokens)
            decode_graph.step(tokens)

        _, cost = self._first(begin)
        values = self._repeat(lambda: decode_graph.step(tokens), min(_REPEATS, case.new_tokens - 1))
        self._keep("decode step", values, cost, bounds["decode_per_token"])

    def _prompt(self) -> tuple[Prompt, dict[str, Tensor]]:
        adapter = self.state.adapter
        inputs = fresh_inputs(adapter.model, self.case, self.bench.generator)
        host = {name: tensor.cpu() for name, tensor in inputs.items()}
        positions = torch.arange(host["input_ids"].shape[1]).expand(3, self.case.batch, -1)
        return Prompt.of(adapter, host["input_ids"], positions, {"image"}), host

    def _request(self, host: dict[str, Tensor]) -> Any:
        adapter = self.state.adapter
        grids = {"image": adapter.family.grids(adapter, "image", host)}
        return open_request(self.state._session, host, visual_masks(adapter, host), grids)

    def _first(self, call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
        """Result of a first call, its milliseconds, and the device memory that stays allocated, in bytes."""
        cuda = self.bench.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved() if cuda else 0
        begin = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        took = 1e3 * (time.perf_counter() - begin)
        if cuda:
            torch.cuda.empty_cache()
        return result, (took, float(torch.cuda.memory_reserved() - before) if cuda else 0.0)

    def _repeat(self, call: Callable[[], Any], most: int = _REPEATS) -> list[float]:
        values: list[float] = []
        while len(values) < most and (len(values) < 3 or sum(values) < 1e3 * _SECONDS):
            if self.bench.device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if self.bench.device.type == "cuda":
                torch.cuda.synchronize()
            values.append(1e3 * (time.perf_counter() - begin))
        return values

    def _keep(
        self, operation: str, values: list[float], cost: tuple[float, float], bound: float, note: str = ""
    ) -> None:
        keep = self.bench.keep
        keep(operation, self.shape, self.provider, "ms", values, timing="calls", bound=bound, note=note)
        keep(f"{operation}, first", self.shape, self.provider, "ms", [cost[0]], timing="calls")
        keep(f"{operation}, first", self.shape, self.provider, "bytes", [cost[1]])


if __name__ == "__main__":
    main()
