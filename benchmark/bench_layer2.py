"""Benchmark of packed vision blocks and prompts against transformers' padded modules.

``python -m benchmark.bench_layer2`` appends its rows to ``results/packing.csv``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmark.timed import Bench, Work
from sparsevlm.bench.shapes import random_model
from sparsevlm.engine.fused_weights import FusedWeights
from sparsevlm.engine.text.layer import run_layer, summed
from sparsevlm.engine.vision.program import VisionReadings, encode_images
from sparsevlm.engine.vision.tables import Grids, VisionInputs, host_tables, n_integers
from sparsevlm.kernels.attention import varlen_attention
from sparsevlm.kernels.elementwise import rotate
from sparsevlm.models import ModelAdapter, adapter_for
from sparsevlm.request.costs import prefill_flops

# An eighth to a quarter of the whole. One of the blocks has full attention, as one in eight of the whole.
LAYERS, BLOCKS = 4, 8
_GRIDS: dict[str, Grids] = {
    "one image": ((1, 64, 64),),
    "six images": ((1, 16, 16), (1, 32, 32), (1, 64, 64), (1, 18, 42), (1, 36, 54), (1, 80, 24)),
}
_SMALL_GRIDS: dict[str, Grids] = {"one image": ((1, 8, 8),), "three images": ((1, 4, 4), (1, 6, 8), (1, 8, 4))}
_LENGTHS = {
    "equal": [1066] * 8,
    "some shorter": [1066, 1066, 810, 810, 618, 618, 298, 298],
    "one long": [4138, *[298] * 7],
}
_SMALL_LENGTHS = {"equal": [20] * 3, "some shorter": [20, 12, 7], "one long": [40, 6, 6]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures everything and appends the rows."""
    bench = Bench.begin("bench_layer2", "packing.csv", arguments)
    shape, layers, blocks = ("tiny", 2, 2) if bench.small else ("7b", LAYERS, BLOCKS)
    with torch.no_grad():
        model = random_model(shape, str(bench.device), bench.dtype, "sdpa", layers=layers, blocks=blocks)
        adapter = adapter_for(copy.deepcopy(model))  # whose weights are put side by side
        weights = FusedWeights(adapter)
        weights.fuse_decoder()
        weights.fuse_tower()
        tower(bench, model, adapter, weights, _SMALL_GRIDS if bench.small else _GRIDS)
        prompts(bench, model, adapter, weights, _SMALL_LENGTHS if bench.small else _LENGTHS)
    bench.end()


def tower(bench: Bench, model: Any, adapter: ModelAdapter, weights: FusedWeights, cases: dict[str, Grids]) -> None:
    """Measures blocks of the vision tower."""
    vision, program = model.model.visual, adapter.vision.program
    assert program is not None  # of a family with a tower that the engine runs
    size = vision.patch_embed.proj.weight[0].numel()
    n_weights = sum(weight.numel() for weight in vision.blocks.parameters())
    for what, grids in cases.items():
        tokens = tuple((t, h // program.side, w // program.side) for t, h, w in grids)
        n = sum(t * h * w for t, h, w in grids)
        tables = host_tables(program.side, program.window, tokens)
        capacities = tables.shape()
        integers = torch.zeros(n_integers(capacities, program.side**2), dtype=torch.int64)
        VisionInputs.of(capacities, program.side**2, integers).fill(tables, capacities)
        given = VisionInputs.of(capacities, program.side**2, integers.to(bench.device))
        sets = bench.sets(lambda n=n: (bench.random(n, size),))
        padded = [(pad(patches, (0, 0, 0, capacities.patches - n)),) for (patches,) in sets]
        readings = VisionReadings(adapter, frozenset(), given)  # no selector asks for any
        theirs = partial(vision, grid_thw=torch.tensor(grids, device=bench.device))
        ours = partial(encode_images, program, weights, capacities, given, readings=readings)
        n_tokens = n // program.side**2
        _check_equal(theirs(*sets[0]).pooler_output, ours(*padded[0])[0][:n_tokens], bench.dtype)
        shape, work = f"{what}, {n} patches, {adapter.vision.n_blocks} blocks", Work(2 * n * n_weights)
        bench.time("vision tower", shape, "transformers", theirs, sets, graph=False, work=work)
        note = f"{100 * (1 - n / capacities.patches):.1f} % of its patches fill up"
        bench.time_both("vision tower", shape, "ours", ours, padded, work, note)


def prompts(
    bench: Bench, model: Any, adapter: ModelAdapter, weights: FusedWeights, cases: dict[str, list[int]]
) -> None:
    """Measures decoder layers over a batch of prompts, padded and packed."""
    size = adapter.decoder.module.config.hidden_size
    for what, lengths in cases.items():
        batch, max_seqlen = len(lengths), max(lengths)
        begins = max_seqlen - torch.tensor(lengths, device=bench.device)
        mask = torch.arange(max_seqlen, device=bench.device) >= begins[:, None]
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0).expand(3, batch, max_seqlen)
        rows = mask.flatten().nonzero()[:, 0]
        padded = bench.sets(lambda b=batch, n=max_seqlen: (bench.random(b, n, size),))
        packed = [(embeds.flatten(0, 1)[rows],) for (embeds,) in padded]
        theirs = partial(_padded, model.model.language_model, mask.long(), positions)
        ours = _packed(adapter, weights, lengths, positions.flatten(1)[:, rows])
        _check_equal(theirs(*padded[0]).flatten(0, 1)[rows], ours(*packed[0]), bench.dtype)
        shape = f"{what}, {batch} x {max_seqlen}, {sum(lengths)} rows, {adapter.n_layers} layers"
        work = Work(sum(prefill_flops(adapter, [length] * adapter.n_layers, 0) for length in lengths))
        waste = f"{100 * (1 - sum(lengths) / (batch * max_seqlen)):.0f} % of the padded rows are padding"
        bench.time("prompt", shape, "transformers, padded", theirs, padded, graph=False, work=work, note=waste)
        bench.time_both("prompt", shape, "ours, packed", ours, packed, work)


def _padded(decoder: Any, mask: Tensor, positions: Tensor, embeds: Tensor) -> Tensor:
    output: Tensor = decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return output


def _packed(
    adapter: ModelAdapter, weights: FusedWeights, lengths: list[int], positions: Tensor
) -> Callable[[Tensor], Tensor]:
    cu_seqlens = torch.tensor([0, *lengths], device=positions.device).cumsum(0).to(torch.int32)
    like = adapter.decoder.embed.weight[:1, None]
    cos, sin = (table[0] for table in adapter.decoder.rotary(like, positions[:, None]))

    def run(hidden: Tensor) -> Tensor:
        residual: Tensor | None = None
        for block in weights.blocks:

            def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float = block.scaling) -> Tensor:
                query, key = rotate(query, key, cos, sin)
                return varlen_attention(query, key, value.contiguous(), cu_seqlens, max(lengths), scaling, causal=True)

            hidden, residual = run_layer(block, weights, hidden, residual, attend)
        output: Tensor = adapter.decoder.norm(summed(hidden, residual))
        return output

    return run


def _check_equal(expected: Tensor, packed: Tensor, dtype: torch.dtype) -> None:
    """Raises if packed outputs are not the padded ones."""
    error = float((packed.float() - expected.float()).norm() / expected.float().norm())
    if not error <= (5e-2 if dtype == torch.bfloat16 else 1e-4):
        raise RuntimeError(f"packed rows differ from padded ones by {error:.2g} (relative): nothing was timed.")


if __name__ == "__main__":
    main()
