"""Roofline bounds: the least time of a phase, from measured peaks of the device and the work of the phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import ModelAdapter
from ..request.costs import kv_numbers, prefill_flops
from .cases import Case

_REPEATS = 5


@dataclass(frozen=True)
class Roofline:
    """Measured peaks of one device and dtype.

    Attributes
    ----------
    flops_per_s : float
        Of a large square matrix product.
    bytes_per_s : float
        Of a large copy, bytes read and written.
    """

    flops_per_s: float
    bytes_per_s: float


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measures the peaks of a device; takes about a second."""
    size, n = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 24)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = _best_seconds(lambda: a @ b, device), _best_seconds(lambda: target.copy_(source), device)
    return Roofline(2 * size**3 / product, 2 * n / copy)


def _best_seconds(run: Callable[[], Any], device: torch.device) -> float:
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


def roofline_bounds(
    adapter: ModelAdapter, case: Case, visual_per_layer: Sequence[float], roofline: Roofline, vision_keep: float = 1.0
) -> dict[str, float]:
    """Roofline bounds of a case, in milliseconds per phase.

    Parameters
    ----------
    adapter : ModelAdapter
    case : Case
    visual_per_layer : sequence of float
        Visual tokens of a sample at the input of each decoder layer.
    roofline : Roofline
    vision_keep : float
        Share of the visual tokens that the tower computes.
    """
    element = next(adapter.decoder.module.parameters()).element_size()
    patches = round(vision_keep * case.n_visual) * adapter.vision.patches_per_token
    tower = sum(weight.numel() for weight in adapter.vision.module.parameters())
    layers = sum(weight.numel() for weight in adapter.decoder.layers.parameters())
    head = adapter.decoder.head.weight.numel()
    tokens = [round(visual) + case.n_text for visual in visual_per_layer]
    kv = element * sum(n * numbers for n, numbers in zip(tokens, kv_numbers(adapter), strict=True))
    vision = max(
        case.batch * _vision_flops(adapter, patches) / roofline.flops_per_s, tower * element / roofline.bytes_per_s
    )
    prefill = max(
        case.batch * (prefill_flops(adapter, tokens, 0) + 2 * head) / roofline.flops_per_s,
        (layers + head) * element / roofline.bytes_per_s,
    )
    decode = ((layers + head) * element + case.batch * kv) / roofline.bytes_per_s
    bounds = {"vision": vision, "prefill": prefill, "first_token": vision + prefill}
    bounds["total"] = vision + prefill + (case.new_tokens - 1) * decode
    if case.new_tokens > 1:
        bounds["decode_per_token"] = decode
    return {phase: 1e3 * seconds for phase, seconds in bounds.items()}


def _vision_flops(adapter: ModelAdapter, patches: int) -> float:
    """FLOPs of one image: two per weight and patch (a quarter in the merger), attention in windows and whole.

    0 for a tower that no family describes: the bound is that of reading its weights then.
    """
    tower = adapter.vision.program
    if tower is None:
        return 0.0
    merger = sum(weight.numel() for weight in tower.merger.parameters())
    weights = sum(weight.numel() for weight in adapter.vision.module.parameters()) - merger
    width = tower.blocks[0].output.in_features
    window = patches if tower.window is None else min(patches, (tower.window * tower.side) ** 2)
    n_full = sum(block.is_full for block in tower.blocks)
    pairs = n_full * patches**2 + (len(tower.blocks) - n_full) * patches * window
    return 2.0 * weights * patches + 2.0 * merger * patches / adapter.vision.patches_per_token + 4.0 * width * pairs
