"""Who answers: the model as transformers runs it, and under this library."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import api
from ..config import SparseVLMConfig
from ..runtime.state import SparseVLMState

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to answer.

    Attributes
    ----------
    name : str
    keep : float
    model : Any
        Whose parts are watched.
    generate : callable
        ``generate(inputs, new_tokens)``.
    state : SparseVLMState or None
        Tells which path ran and what was kept.
    config : SparseVLMConfig or None
    """

    name: str
    keep: float
    model: Any
    generate: Callable[[Inputs, int], Tensor]
    state: SparseVLMState | None = None
    config: SparseVLMConfig | None = None


def shared_copy(model: Any) -> Any:
    """A second model of the same weights, so that one may be under this library and the other not."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_providers(model: Any, keeps: tuple[float, ...], *, static: bool, seed: int = 0) -> list[Provider]:
    """All providers that can run here.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration or Qwen2VLForConditionalGeneration
    keeps : tuple of float
        Budgets below 1.
    static : bool
        Whether transformers' compiled decoding is measured as well.
    """
    ours = shared_copy(model)
    state = api.apply_sparsevlm(ours)
    found = [Provider("hf-dense", 1.0, model, _plain(model))]
    if importlib.util.find_spec("flash_attn") is not None and model.device.type == "cuda":
        flash = shared_copy(model)
        flash.set_attn_implementation("flash_attention_2")
        found.append(Provider("hf-flash", 1.0, flash, _plain(flash)))
    if static:
        found.append(Provider("hf-static", 1.0, model, _plain(model, cache_implementation="static")))
    settings = [("ours-dense", 1.0, "span")]
    for keep in keeps:
        settings += [("ours", keep, "span"), ("random", keep, "random")]
    for name, keep, selector in settings:
        config = SparseVLMConfig(keep=keep, selector=selector, engine=True, seed=seed)
        found.append(Provider(name, keep, ours, _pruned(state, config), state, config))
    return found


def _options(new_tokens: int) -> dict[str, Any]:
    return {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}


def _plain(model: Any, **options: Any) -> Callable[[Inputs, int], Tensor]:
    def generate(inputs: Inputs, new_tokens: int) -> Tensor:
        found: Tensor = model.generate(**inputs, **_options(new_tokens), **options)
        return found

    return generate


def _pruned(state: SparseVLMState, config: SparseVLMConfig) -> Callable[[Inputs, int], Tensor]:
    changes = {"keep": config.keep, "selector": config.selector, "engine": True, "seed": config.seed}

    def generate(inputs: Inputs, new_tokens: int) -> Tensor:
        with torch.no_grad(), state.options(**changes):
            found: Tensor = state.view.model.generate(**inputs, **_options(new_tokens))
            return found

    return generate
