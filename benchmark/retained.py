"""Time of a decoder layer by retained visual tokens, beside the stored accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmark.e2e_rows import StoredRow
from benchmark.tables import stored_rows
from benchmark.timed import Bench, Work
from sparsevlm.bench.shapes import random_model
from sparsevlm.engine.fused_weights import FusedWeights
from sparsevlm.engine.text.layer import run_layer
from sparsevlm.kernels.attention import varlen_attention
from sparsevlm.kernels.elementwise import rotate
from sparsevlm.models import ModelAdapter, adapter_for
from sparsevlm.selection.selectors import DEFAULT

RETAINED = (256, 128, 96, 64)


def print_retained(bench: Bench, n_text: int) -> None:
    """Times a decoder layer at each number of retained tokens and prints the table; the rows are kept."""
    model = random_model("tiny" if bench.small else "7b", str(bench.device), bench.dtype, "sdpa", layers=1)
    adapter = adapter_for(model)
    weights = FusedWeights(adapter)
    weights.fuse_decoder()
    size, layer_bytes = (
        adapter.decoder.module.config.hidden_size,
        sum(p.nbytes for p in adapter.decoder.layers.parameters()),
    )
    lines, dense = ["| retained tokens | decoder layer, ms | speed-up | accuracy |", "|---|---|---|---|"], 0.0
    for n_visual in RETAINED:
        n = n_visual + n_text
        work = Work(2 * n * sum(p.numel() for p in adapter.decoder.layers.parameters()), layer_bytes)
        sets = bench.sets(lambda n=n: (bench.random(n, size),))
        took = bench.time(
            "decoder layer", f"{n_visual} visual + {n_text}", "ours", _layer(adapter, weights, n), sets, work=work
        )
        dense = dense or took
        lines.append(f"| {n_visual} | {took:.3f} | {dense / took:.2f} | {accuracy(stored_rows(), n_visual)} |")
    print("\n".join([*lines, ""]))


def _layer(adapter: ModelAdapter, weights: FusedWeights, n: int) -> Callable[[Tensor], object]:
    block = weights.blocks[0]
    device = adapter.decoder.embed.weight.device
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32, device=device)
    positions = torch.arange(n, device=device).expand(3, 1, n)
    cos, sin = (table[0] for table in adapter.decoder.rotary(adapter.decoder.embed.weight[:1, None], positions))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = rotate(query, key, cos, sin)
        return varlen_attention(query, key, value.contiguous(), cu_seqlens, n, block.scaling, causal=True)

    return lambda hidden: run_layer(block, weights, hidden, None, attend)


def accuracy(rows: list[StoredRow], n_retained: int) -> str:
    """Retained percent at a number of tokens of 256, from the stored run with the most questions.

    The row is that of the stored budget that is nearest; the cell names the model, the selector and the run.
    """
    if n_retained == RETAINED[0]:
        return "100 (dense)"
    fraction = n_retained / RETAINED[0]
    fitting = [
        row
        for row in rows
        if (row["model"], row["suite"], row["task"], row["selector"], row["target_layers"], row["options"])
        == ("bundled", "demo", "average", DEFAULT, "default", "")
        and row["keep"] not in ("", "adaptive")
        and row["retained"]
        and abs(float(row["keep"]) - fraction) < 0.01
    ]
    if not fitting:
        return "no stored row"
    best = max(fitting, key=lambda row: (int(row["n"]), row["timestamp"]))
    where = f"{best['model']}, {best['selector']}, keep {best['keep']}, n = {best['n']}, {best['run']}"
    return f"{float(best['retained']):.1f} ({where})"
