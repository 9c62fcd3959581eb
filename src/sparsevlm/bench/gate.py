"""No time counts before the answers agree: the engine against the model's own modules, on the case that is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .providers import Inputs, Provider

# Relative error of the first token's logits, whose sums run in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_LEAST_SHARED = 0.95


def check(providers: list[Provider], inputs: Inputs) -> None:
    """Compare the engine dense with the model, and what it keeps with what the plain path keeps.

    Raises
    ------
    RuntimeError
        If they differ by more than rounding.
    """
    by_name = {(provider.name, provider.keep): provider for provider in providers}
    plain, ours = by_name["hf-dense", 1.0], by_name["ours-dense", 1.0]
    wanted = _first_logits(plain.model, lambda: plain.generate(inputs, 1))
    found = _first_logits(ours.model, lambda: ours.generate(inputs, 1))
    error = float((found - wanted).norm() / wanted.norm())
    if not error <= _TOLERANCE[plain.model.dtype]:
        raise RuntimeError(f"the engine's logits differ from the model's by {error:.2g} (relative): nothing was timed.")
    for provider in providers:
        if provider.name == "ours":
            _check_kept(provider, inputs)


def _check_kept(provider: Provider, inputs: Inputs) -> None:
    assert provider.state is not None
    provider.generate(inputs, 1)
    found = provider.state.report.samples
    assert provider.config is not None
    with provider.state.options(keep=provider.keep, selector=provider.config.selector, engine=False):
        provider.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    for mine, plain in zip(found, provider.state.report.samples, strict=True):
        if mine.layer_tokens != plain.layer_tokens:
            raise RuntimeError(f"the engine keeps {mine.layer_tokens} tokens, the plain path {plain.layer_tokens}.")
        kept, wanted = set(mine.stages[0].kept), set(plain.stages[0].kept)
        if len(kept & wanted) < _LEAST_SHARED * len(wanted):
            raise RuntimeError(
                f"of {len(wanted)} tokens that the plain path keeps, the engine keeps {len(kept & wanted)}: "
                "nothing was timed."
            )


def _first_logits(model: Any, call: Callable[[], Any]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[:, -1].float()))
    try:
        call()
    finally:
        handle.remove()
    return seen[0]
