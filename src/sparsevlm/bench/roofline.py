"""The least time that a phase can take: measured ceilings of the device, and what has to be computed and read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import ModelAdapter
from ..request.costs import prefill_flops
from .cases import N_TEXT, Case

_REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Of one device and dtype.

    Attributes
    ----------
    flops_per_s : float
        A large square matrix product.
    bytes_per_s : float
        A large copy, bytes read and written.
    """

    flops_per_s: float
    bytes_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both; a second or so."""
    size, n = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 24)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = _best(lambda: a @ b, device), _best(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / product, 2 * n / copy)


def _best(run: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def floors(
    adapter: ModelAdapter, case: Case, visual_per_layer: Sequence[float], ceilings: Ceilings, vision_keep: float = 1.0
) -> dict[str, float]:
    """Milliseconds per phase.

    Parameters
    ----------
    adapter : ModelAdapter
    case : Case
    visual_per_layer : sequence of float
        Visual tokens of a sample at the input of each decoder layer.
    ceilings : Ceilings
    vision_keep : float
        Share of the visual tokens that the tower computes.
    """
    element = next(adapter.decoder.module.parameters()).element_size()
    patches = round(vision_keep * case.side**2) * adapter.vision.patches_per_token
    tower = sum(weight.numel() for weight in adapter.vision.module.parameters())
    layers = sum(weight.numel() for weight in adapter.decoder.layers.parameters())
    head = adapter.decoder.head.weight.numel()
    tokens = [round(visual) + N_TEXT for visual in visual_per_layer]
    kv = sum(tokens) * _kv_bytes(adapter, element)
    vision = max(
        case.batch * _vision_flops(adapter, patches) / ceilings.flops_per_s, tower * element / ceilings.bytes_per_s
    )
    prefill = max(
        case.batch * (prefill_flops(adapter, tokens, 0) + 2 * head) / ceilings.flops_per_s,
        (layers + head) * element / ceilings.bytes_per_s,
    )
    decode = ((layers + head) * element + case.batch * kv) / ceilings.bytes_per_s
    found = {"vision": vision, "prefill": prefill, "first_token": vision + prefill}
    found["total"] = vision + prefill + (case.new_tokens - 1) * decode
    if case.new_tokens > 1:
        found["decode_per_token"] = decode
    return {phase: 1e3 * seconds for phase, seconds in found.items()}


def _kv_bytes(adapter: ModelAdapter, element: int) -> int:
    """Of one token in one layer."""
    config = adapter.decoder.module.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head_dim * element


def _vision_flops(adapter: ModelAdapter, patches: int) -> float:
    """Of one picture: two per weight and patch (a quarter of that in the merger), attention in windows and whole."""
    tower = adapter.vision.program
    if tower is None:
        raise NotImplementedError(f"no floor is known for the vision tower of a {adapter.name}.")
    merger = sum(weight.numel() for weight in tower.merger.parameters())
    weights = sum(weight.numel() for weight in adapter.vision.module.parameters()) - merger
    width = tower.blocks[0].output.in_features
    window = patches if tower.window is None else min(patches, (tower.window * tower.side) ** 2)
    n_full = sum(block.is_full for block in tower.blocks)
    pairs = n_full * patches**2 + (len(tower.blocks) - n_full) * patches * window
    return 2.0 * weights * patches + 2.0 * merger * patches / adapter.vision.patches_per_token + 4.0 * width * pairs
