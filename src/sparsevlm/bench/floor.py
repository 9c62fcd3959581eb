"""The least time that a phase can take: measured ceilings of the device, and what has to be computed and read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.costs import prefill_flops
from ..runtime.view import ModelView
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
    view: ModelView, case: Case, visual_per_layer: Sequence[float], ceilings: Ceilings, vision_keep: float = 1.0
) -> dict[str, float]:
    """Milliseconds per phase.

    Parameters
    ----------
    view : ModelView
    case : Case
    visual_per_layer : sequence of float
        Visual tokens of a sample at the input of each decoder layer.
    ceilings : Ceilings
    vision_keep : float
        Share of the visual tokens that the tower computes.
    """
    element = next(view.text_model.parameters()).element_size()
    patches = round(vision_keep * case.side**2) * view.spatial_merge_size**2
    tower = sum(weight.numel() for weight in view.vision_tower.parameters())
    layers = sum(weight.numel() for weight in view.layers.parameters())
    head = view.model.lm_head.weight.numel()
    tokens = [round(visual) + N_TEXT for visual in visual_per_layer]
    kv = sum(tokens) * _kv_bytes(view, element)
    vision = max(
        case.batch * _vision_flops(view, patches) / ceilings.flops_per_s, tower * element / ceilings.bytes_per_s
    )
    prefill = max(
        case.batch * (prefill_flops(view, tokens, 0) + 2 * head) / ceilings.flops_per_s,
        (layers + head) * element / ceilings.bytes_per_s,
    )
    decode = ((layers + head) * element + case.batch * kv) / ceilings.bytes_per_s
    found = {"vision": vision, "prefill": prefill, "first_token": vision + prefill}
    found["total"] = vision + prefill + (case.new_tokens - 1) * decode
    if case.new_tokens > 1:
        found["decode_per_token"] = decode
    return {phase: 1e3 * seconds for phase, seconds in found.items()}


def _kv_bytes(view: ModelView, element: int) -> int:
    """Of one token in one layer."""
    attention = view.attentions[0]
    return 2 * attention.k_proj.out_features * element


def _vision_flops(view: ModelView, patches: int) -> float:
    """Of one picture: two per weight and patch (a quarter of that in the merger), attention in windows and whole."""
    tower: Any = view.vision_tower
    merger = sum(weight.numel() for weight in tower.merger.parameters())
    weights = sum(weight.numel() for weight in tower.parameters()) - merger
    width = tower.blocks[0].attn.proj.in_features
    window = patches
    if view.vision_windows is not None:
        window = min(patches, (tower.window_size // tower.patch_size) ** 2)
    n_full = len(view.vision_block_indices)
    pairs = n_full * patches**2 + (view.n_vision_blocks - n_full) * patches * window
    return 2.0 * weights * patches + 2.0 * merger * patches / view.spatial_merge_size**2 + 4.0 * width * pairs
