"""Timing of single operations for benchmark scripts: CUDA graphs or events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsevlm.bench.roofline import Roofline, measure_roofline
from sparsevlm.bench.rows import Row, append_rows, cell, check_columns, device_and_versions, spread
from sparsevlm.evaluation.execution.provenance import commit

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("benchmark", "operation", "shape", "provider", "timing", "dtype", "metric", "p50", "p20", "p80", "floor"),
    *("gpu", "torch", "triton", "transformers", "commit", "command", "timestamp", "note"),
)
_SECONDS = 0.4
_MIN_RUNS, _MAX_RUNS = 5, 50
_MAX_SETS = 8

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes that an operation needs at least.

    Attributes
    ----------
    flops, bytes : float
    """

    flops: float = 0.0
    bytes: float = 0.0

    def bound_ms(self, roofline: Roofline) -> float:
        """Roofline bound in milliseconds."""
        return 1e3 * max(self.flops / roofline.flops_per_s, self.bytes / roofline.bytes_per_s)


@dataclass
class Bench:
    """Run of one benchmark script.

    Attributes
    ----------
    name : str
    device : torch.device
    dtype : torch.dtype
    small : bool
        Whether to use small shapes, which only try the script out.
    file : Path
    rows : list of dict
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    small: bool
    file: Path
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def begin(cls, name: str, file: str, arguments: Sequence[str] | None) -> Bench:
        """Parses the command line.

        Parameters
        ----------
        name : str
            Of the script.
        file : str
            Of ``results/``, which rows are appended to unless the command line names another.
        arguments : sequence of str, optional
        """
        parser = argparse.ArgumentParser(prog=f"python -m benchmark.{name}")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--small", action="store_true", help="small shapes, to try the script out")
        parser.add_argument("--append-to", type=Path, default=RESULTS / file)
        given = parser.parse_args(arguments)
        check_columns(given.append_to, COLUMNS)
        device = torch.device(given.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(name, device, dtype, given.small, given.append_to)

    def __post_init__(self) -> None:
        self.roofline = measure_roofline(self.device, self.dtype)
        self.generator = torch.Generator(device=self.device).manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draws normal numbers on the device."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def cu_seqlens(self, lengths: Sequence[int]) -> Tensor:
        """Cumulative lengths of packed sequences, int32 of shape (n_sequences + 1,)."""
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)

    def sets(self, make: Callable[[], Inputs]) -> list[Inputs]:
        """Makes inputs to rotate through: more than the device's cache holds, eight sets at most."""
        made = [make()]
        size = sum(part.nbytes for part in made[0] if isinstance(part, Tensor))
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0
        n = min(_MAX_SETS, max(2, -(-2 * cache // max(size, 1))))
        return made + [make() for _ in range(n - 1)]

    def time(
        self, operation: str, shape: str, provider: str, run: Callable[..., Any], sets: Sequence[Inputs],
        *, graph: bool = True, work: Work | None = None, note: str = "",
    ) -> float:  # fmt: skip
        """Times ``run(*inputs)`` and keeps a row.

        Parameters
        ----------
        operation, shape, provider : str
        run : callable
        sets : sequence of tuple
            Inputs, used in turn.
        graph : bool
            Whether all calls are recorded as one CUDA graph, which leaves the host's time out. What waits for the
            device cannot be.
        work : Work, optional
        note : str

        Returns
        -------
        float
            Milliseconds of a call, median.
        """
        graph = graph and self.device.type == "cuda"
        values = _milliseconds(run, sets, self.device, graph)
        bound = None if work is None else work.bound_ms(self.roofline)
        self.keep(
            operation, shape, provider, "ms", values, timing="graph" if graph else "calls", bound=bound, note=note
        )
        return sorted(values)[len(values) // 2]

    def time_both(
        self, operation: str, shape: str, provider: str, run: Callable[..., Any], sets: Sequence[Inputs], work: Work,
        note: str = "",
    ) -> None:  # fmt: skip
        """Times calls one by one, and on a GPU as one CUDA graph as well."""
        self.time(operation, shape, provider, run, sets, graph=False, work=work, note=note)
        if self.device.type == "cuda":
            self.time(operation, shape, provider, run, sets, work=work, note=note)

    def keep(
        self, operation: str, shape: str, provider: str, metric: str, values: Sequence[float], *, timing: str = "",
        bound: float | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Keeps a row of values that were measured elsewhere."""
        row = {"benchmark": self.name, "operation": operation, "shape": shape, "provider": provider, "timing": timing}
        row |= {"dtype": str(self.dtype).removeprefix("torch."), "metric": metric, "note": note}
        self.rows.append({**dict.fromkeys(COLUMNS, ""), **row, **spread(values), "floor": cell(bound)})

    def end(self) -> None:
        """Prints the rows and appends them to the file."""
        command = shlex.join(["python", "-m", f"benchmark.{self.name}", *sys.argv[1:]])
        shared = {**device_and_versions(self.device), "commit": commit(), "command": command}
        self.rows = [{**row, **shared} for row in self.rows]
        print(_table(self.rows))
        append_rows(self.file, self.rows)


def _milliseconds(run: Callable[..., Any], sets: Sequence[Inputs], device: torch.device, graph: bool) -> list[float]:
    """Milliseconds of a call, timed as often as the seconds allow."""

    def once() -> None:
        for inputs in sets:
            run(*inputs)

    once()
    if device.type == "cuda":
        once()
        torch.cuda.synchronize(device)
    if graph:
        once = _recorded(once)
    values: list[float] = []
    begin = time.perf_counter()
    while len(values) < _MIN_RUNS or (len(values) < _MAX_RUNS and time.perf_counter() - begin < _SECONDS):
        values.append(_elapsed(once, device) / len(sets))
    return values


def _recorded(once: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    graph.replay()
    return graph.replay


def _elapsed(once: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        once()
        return 1e3 * (time.perf_counter() - begin)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    once()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def _table(rows: Sequence[Row]) -> str:
    """Formats rows as a table, with the speed-up over the first row of each operation and shape."""
    lines = [("operation", "shape", "provider", "timing", "metric", "p50", "p20", "p80", "floor", "x", "note")]
    first: dict[tuple[str, str, str], float] = {}
    for row in rows:
        base = first.setdefault((row["operation"], row["shape"], row["metric"]), float(row["p50"]))
        times = f"{base / float(row['p50']):.2f}" if row["metric"] == "ms" and float(row["p50"]) else ""
        cells = [row[name] for name in lines[0] if name not in ("x", "note")]
        lines.append((*cells, times, row["note"]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)
