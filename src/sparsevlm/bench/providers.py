"""Providers: ``generate`` as transformers runs it and under this library, over the same weights."""

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
from ..state import SparseVLMState
from .cases import Case

Inputs = dict[str, Tensor]
# With more, the captured graphs of the budgets would evict each other from round to round.
MAX_BUDGETS = 3


@dataclass(frozen=True)
class Provider:
    """One way to run ``generate``, with its name and budget.

    Attributes
    ----------
    name : str
    keep : float
    model : Any
    generate : callable
        ``generate(inputs, new_tokens, **options)``, with more options of ``generate``; with ``engine=False`` as well
        where there is a ``state``.
    state : SparseVLMState or None
        Has the report of the last call, where this library runs.
    config : SparseVLMConfig or None
    compiles : bool
        Whether every new shape is compiled first, which takes half a minute.
    """

    name: str
    keep: float
    model: Any
    generate: Callable[..., Tensor]
    state: SparseVLMState | None = None
    config: SparseVLMConfig | None = None
    compiles: bool = False

    @property
    def is_optional(self) -> bool:
        """True if a failure becomes a row: packages and compilers of others may not run here."""
        return self.compiles or self.name == "hf-flash"

    def supports(self, case: Case) -> bool:
        """True if a case is measured: compiled decoding only with one sample that decodes."""
        return not self.compiles or (case.batch == 1 and case.new_tokens > 1)

    def reset(self) -> None:
        """Frees programs, graphs and compiled code of earlier calls."""
        if self.state is not None:
            self.state.detach()
            self.state.attach()
        if self.compiles:
            torch.compiler.reset()


def shared_copy(model: Any) -> Any:
    """Copies a model but for its weights, so that this library can be applied to one of the two."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_providers(
    model: Any, keeps: tuple[float, ...], *, static: bool, seed: int = 0, vision_keep: float = 1.0
) -> list[Provider]:
    """Makes all providers that can run on this machine.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration or Qwen2VLForConditionalGeneration
    keeps : tuple of float
        Budgets below 1.
    static : bool
        Whether transformers' compiled decoding is measured as well.
    seed : int
    vision_keep : float
        Share of the visual tokens that the tower computes in ``"ours-vision"``, which is there if it is below 1.

    Raises
    ------
    ValueError
        If there are more than three budgets.
    """
    if len(keeps) > MAX_BUDGETS:
        raise ValueError(f"at most {MAX_BUDGETS} budgets are measured at a time, got {len(keeps)}: start another run.")
    ours = shared_copy(model)
    state = api.apply_sparsevlm(ours)
    providers = [Provider("hf-dense", 1.0, model, _dense_generate(model))]
    if importlib.util.find_spec("flash_attn") is not None and model.device.type == "cuda":
        flash = shared_copy(model)
        flash.set_attn_implementation("flash_attention_2")
        providers.append(Provider("hf-flash", 1.0, flash, _dense_generate(flash)))
    if static:
        generate = _dense_generate(model, cache_implementation="static")
        providers.append(Provider("hf-static", 1.0, model, generate, compiles=True))
    settings = [("ours-dense", 1.0, "span", 1.0)]
    for keep in keeps:
        settings += [("ours", keep, "span", 1.0), ("random", keep, "random", 1.0)]
        if vision_keep < 1.0:
            settings.append(("ours-vision", keep, "span", vision_keep))
    for name, keep, selector, tower_keep in settings:
        config = SparseVLMConfig(keep=keep, selector=selector, engine=True, seed=seed, vision_keep=tower_keep)
        providers.append(Provider(name, keep, ours, _pruned_generate(state, config), state, config))
    return providers


def _exact_length(new_tokens: int) -> dict[str, Any]:
    return {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}


def _dense_generate(model: Any, **fixed: Any) -> Callable[..., Tensor]:
    def generate(inputs: Inputs, new_tokens: int, **options: Any) -> Tensor:
        output: Tensor = model.generate(**inputs, **_exact_length(new_tokens), **fixed, **options)
        return output

    return generate


def _pruned_generate(state: SparseVLMState, config: SparseVLMConfig) -> Callable[..., Tensor]:
    changes = {name: getattr(config, name) for name in ("keep", "selector", "seed", "vision_keep")}

    def generate(inputs: Inputs, new_tokens: int, engine: bool = True, **options: Any) -> Tensor:
        with state.options(**changes, engine=engine):
            output: Tensor = state.adapter.model.generate(**inputs, **_exact_length(new_tokens), **options)
            return output

    return generate
