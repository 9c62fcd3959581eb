"""Roofline bounds: the least time of a phase, from measured peaks of the device and the work of the phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import SLIDING, BlankImage, ModelAdapter
from ..request.costs import kv_numbers, prefill_flops
from .cases import Case
from .workload import images_of

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

    That of a vision tower is the time to read its weights where its family describes no blocks of it, or has no images
    that are made in code.

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
    weights = weights_of(adapter)
    tower, layers, head = weights["vision"], weights["layers"], weights["head"]
    image_flops = sum(_vision_flops(adapter, image, vision_keep) for image in images_of(adapter, case))
    tokens = [round(visual) + case.n_text for visual in visual_per_layer]
    kv = _cache_bytes(adapter, tokens, element)
    vision = max(case.batch * image_flops / roofline.flops_per_s, tower * element / roofline.bytes_per_s)
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


def dense_bounds(adapter: ModelAdapter, request: Case, roofline: Roofline) -> dict[str, float]:
    """Roofline bounds of a request of which nothing is dropped, in milliseconds per phase."""
    return roofline_bounds(adapter, request, [request.n_visual] * adapter.n_layers, roofline)


def vision_modules(adapter: ModelAdapter) -> tuple[nn.Module, ...]:
    """Vision tower, and the module that projects its output where that is not part of it."""
    return tuple(part for part in (adapter.vision.module, adapter.vision.projector) if part is not None)


def weights_of(adapter: ModelAdapter) -> dict[str, int]:
    """Numbers of weights that are read: of ``vision``, ``layers`` and ``head`` all, of ``embeddings`` some rows.

    Blocks of the vision tower whose output nothing uses are left out, and embeddings that are the head's weights.
    """
    vision, embeddings, head = adapter.vision, adapter.decoder.embed.weight, adapter.decoder.head.weight
    return {
        "vision": _count(*vision_modules(adapter)) - _count(*vision.blocks[vision.n_blocks :]),
        "layers": _count(*adapter.decoder.layers),
        "head": head.numel(),
        "embeddings": 0 if embeddings is head else embeddings.numel(),
    }


def _count(*modules: nn.Module) -> int:
    return sum(weight.numel() for module in modules for weight in module.parameters())


def _cache_bytes(adapter: ModelAdapter, tokens: Sequence[int], element: int) -> int:
    """Bytes of a sample's keys and values that a decode step reads, of a sliding window no more than that holds."""
    kinds, config = adapter.decoder.layer_types, adapter.decoder.module.config
    read = (min(n, config.sliding_window) if kind == SLIDING else n for n, kind in zip(tokens, kinds, strict=True))
    return element * sum(n * numbers for n, numbers in zip(read, kv_numbers(adapter), strict=True))


def _vision_flops(adapter: ModelAdapter, image: BlankImage, keep: float) -> float:
    """FLOPs of one image: two per weight, for each patch in the blocks and for each visual token behind them, and
    attention in windows or among all patches of a tile; 0 where the family does not describe the tower's blocks."""
    vision, program = adapter.vision, adapter.vision.program
    if not vision.blocks:
        return 0.0
    blocks = vision.blocks[: vision.n_blocks]
    tokens = round(keep * image.n_patches / vision.patches_per_token)
    patches = tokens * vision.patches_per_token
    rows = patches + image.n_tiles * vision.n_prefix
    in_tile = rows / image.n_tiles
    n_windowed = 0 if program is None else sum(not block.is_full for block in program.blocks)
    in_window = in_tile if program is None or program.window is None else (program.window * program.side) ** 2
    seen = (len(blocks) - n_windowed) * in_tile + n_windowed * min(in_tile, in_window)
    embeds = sum(_products(part, nn.Conv2d, nn.Conv3d) for part in vision_modules(adapter))
    projects = sum(_products(part, nn.Linear) for part in vision_modules(adapter))
    projects -= sum(_products(block, nn.Linear) for block in vision.blocks)
    computes = sum(_products(block, nn.Linear) for block in blocks)
    width = next(module for module in blocks[0].modules() if isinstance(module, nn.Linear)).in_features
    return 2.0 * (embeds * patches + computes * rows + projects * tokens) + 4.0 * width * rows * seen


def _products(part: nn.Module, *kinds: type[nn.Module]) -> int:
    """Weights of the matrix products of a part, by the kinds of its modules."""
    found: list[Any] = [module for module in part.modules() if isinstance(module, kinds)]
    return sum(module.weight.numel() for module in found)
