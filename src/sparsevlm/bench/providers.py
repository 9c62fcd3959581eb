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
from ..state import SparseVLMState
from .cases import Case

Inputs = dict[str, Tensor]
# The engine keeps eight programs of a kind, of which a budget takes two: with more they would drive each other out.
MOST_BUDGETS = 3


@dataclass(frozen=True)
class Provider:
    """One way to answer.

    Attributes
    ----------
    name : str
    keep : float
    model : Any
    generate : callable
        ``generate(inputs, new_tokens, **options)``, with more options of ``generate``; with ``engine=False`` as well
        where there is a ``state``.
    state : SparseVLMState or None
        Tells which path ran, what was kept and how long it took.
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
        """Whether its failure is a row: what others install and compile may not run here."""
        return self.compiles or self.name == "hf-flash"

    def answers(self, case: Case) -> bool:
        """Whether it is measured on a case: compiled decoding only where one sample decodes."""
        return not self.compiles or (case.batch == 1 and case.new_tokens > 1)

    def forget(self) -> None:
        """Free what it holds of earlier calls: programs, graphs, compiled code."""
        if self.state is not None:
            self.state.detach()
            self.state.attach()
        if self.compiles:
            torch.compiler.reset()


def shared_copy(model: Any) -> Any:
    """A second model of the same weights, so that one may be under this library and the other not."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_providers(
    model: Any, keeps: tuple[float, ...], *, static: bool, seed: int = 0, vision_keep: float = 1.0
) -> list[Provider]:
    """All providers that can run here.

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
    if len(keeps) > MOST_BUDGETS:
        raise ValueError(f"at most {MOST_BUDGETS} budgets are measured at a time, got {len(keeps)}: start another run.")
    ours = shared_copy(model)
    state = api.apply_sparsevlm(ours)
    found = [Provider("hf-dense", 1.0, model, _plain(model))]
    if importlib.util.find_spec("flash_attn") is not None and model.device.type == "cuda":
        flash = shared_copy(model)
        flash.set_attn_implementation("flash_attention_2")
        found.append(Provider("hf-flash", 1.0, flash, _plain(flash)))
    if static:
        generate = _plain(model, cache_implementation="static")
        found.append(Provider("hf-static", 1.0, model, generate, compiles=True))
    settings = [("ours-dense", 1.0, "span", 1.0)]
    for keep in keeps:
        settings += [("ours", keep, "span", 1.0), ("random", keep, "random", 1.0)]
        if vision_keep < 1.0:
            settings.append(("ours-vision", keep, "span", vision_keep))
    for name, keep, selector, share in settings:
        config = SparseVLMConfig(keep=keep, selector=selector, engine=True, seed=seed, vision_keep=share)
        found.append(Provider(name, keep, ours, _pruned(state, config), state, config))
    return found


def _length(new_tokens: int) -> dict[str, Any]:
    return {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}


def _plain(model: Any, **own: Any) -> Callable[..., Tensor]:
    def generate(inputs: Inputs, new_tokens: int, **options: Any) -> Tensor:
        found: Tensor = model.generate(**inputs, **_length(new_tokens), **own, **options)
        return found

    return generate


def _pruned(state: SparseVLMState, config: SparseVLMConfig) -> Callable[..., Tensor]:
    changes = {name: getattr(config, name) for name in ("keep", "selector", "seed", "vision_keep")}

    def generate(inputs: Inputs, new_tokens: int, engine: bool = True, **options: Any) -> Tensor:
        with state.options(**changes, engine=engine):
            found: Tensor = state.adapter.model.generate(**inputs, **_length(new_tokens), **options)
            return found

    return generate
