"""Providers: ``generate`` as transformers runs it and under this library, over the same weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import api
from ..config import SparseVLMConfig
from ..kernels.skinny_linear import MOST_ROWS, check_float8
from ..selection.context import VISION_NEEDS, SelectorTraits
from ..selection.selectors import DEFAULT, SELECTORS, make_selector
from ..state import SparseVLMState
from ..warmup import WarmupReport
from .cases import AnyCase, Case

Inputs = dict[str, Tensor]
PAPER = "sparsevlm"
# Of requests of mixed shapes and of pictures.
_MAIN = ("hf-dense", "ours-dense", "ours", "ours-default", "ours-engine", f"ours-{PAPER}")
_OPTIONS = ("keep", "selector", "seed", "vision_keep", "weights")
_FLOAT8 = "fp8"  # weights that decode steps read


@dataclass(frozen=True)
class Setting:
    """What is measured: its name, its budget and the options of this library.

    Attributes
    ----------
    name : str
    keep : float or None
        ``None``: adaptive.
    config : SparseVLMConfig or None
        Options, where this library runs.
    """

    name: str
    keep: float | None
    config: SparseVLMConfig | None

    @property
    def label(self) -> str:
        """Budget as it stands in the rows."""
        return "adaptive" if self.keep is None else str(self.keep)


@dataclass(frozen=True)
class Provider(Setting):
    """One way to run ``generate`` in this process.

    Attributes
    ----------
    model : Any
    generate : callable
        ``generate(inputs, new_tokens, **options)``, with more options of ``generate``; with ``engine=`` as well where
        there is a ``state``.
    state : SparseVLMState or None
        Has the report of the last call, where this library runs.
    compiles : bool
        Whether every new shape is compiled first, which takes half a minute.
    """

    model: Any
    generate: Callable[..., Tensor]
    state: SparseVLMState | None = None
    compiles: bool = False

    @property
    def is_optional(self) -> bool:
        """True if a failure becomes a row: packages and compilers of others may not run here."""
        return self.compiles or self.name == "hf-flash"

    @property
    def wants_engine(self) -> bool:
        """True if this library runs, and the engine with it: by its option, or where that is unset on a GPU."""
        if self.config is None:
            return False
        return self.model.device.type == "cuda" if self.config.engine is None else self.config.engine

    @property
    def may_run_on_hooks(self) -> bool:
        """True if times count that the engine has not made: where it is not wanted, of models that it cannot run, and
        of selectors that look into a tower that it does not run."""
        if not self.wants_engine or self.config is None or self.state is None:
            return True
        adapter = self.state.adapter
        if adapter.decoder.block is None:
            return True
        return adapter.vision.program is None and bool(
            SelectorTraits.of(make_selector(self.config)).needs & VISION_NEEDS
        )

    def warmup(self, new_tokens: int) -> WarmupReport:
        """Run this library's warm-up, which is given no request: the ladder of capacities."""
        assert self.state is not None
        assert self.config is not None
        with self.state.options(**{name: getattr(self.config, name) for name in _OPTIONS}, engine=self.config.engine):
            return self.state.warmup(max_new_tokens=new_tokens)

    def supports(self, case: AnyCase) -> bool:
        """True if a case is measured: compiled decoding only with one sample that decodes, float8 weights only where
        they are read, of mixed shapes and pictures the main providers and the paper's method, if it was asked for."""
        if not isinstance(case, Case):
            return self.name in _MAIN
        if self.config is not None and self.config.weights == _FLOAT8:
            return case.batch <= MOST_ROWS and case.new_tokens > 1
        return not self.compiles or (case.batch == 1 and case.new_tokens > 1)


def reset(providers: Iterable[Provider]) -> None:
    """Free programs, graphs and compiled code of earlier calls."""
    providers = list(providers)
    states = {id(provider.state): provider.state for provider in providers if provider.state is not None}
    for state in states.values():
        state.detach()
        state.attach()
    if any(provider.compiles for provider in providers):
        torch.compiler.reset()


def shared_copy(model: Any) -> Any:
    """Copies a model but for its weights, so that this library can be applied to one of the two."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def chosen_selectors(names: Iterable[str]) -> tuple[str, ...]:
    """Selectors by their names; ``all`` stands for all but the default, which other providers have.

    Raises
    ------
    ValueError
        If there is no such selector; the message lists those that exist.
    """
    found: dict[str, None] = {}
    for name in names:
        if name != "all" and name not in SELECTORS:
            raise ValueError(f"there is no selector {name!r}; there are all, {', '.join(sorted(SELECTORS))}.")
        found |= dict.fromkeys([one for one in SELECTORS if one != DEFAULT] if name == "all" else [name])
    return tuple(found)


def make_providers(
    model: Any, keeps: tuple[float, ...], *, static: bool, seed: int = 0, vision_keep: float = 1.0,
    selectors: Iterable[str] = (), fp8: bool = False,
) -> list[Provider]:  # fmt: skip
    """Makes all providers that can run on this machine.

    Those of this library run as a call with their options does on the model's device: on a GPU on the engine, elsewhere
    on hooks. There the engine has a provider of its own, ``"ours-engine"``, and runs what nothing else can, float8
    weights and a part of the tower.

    Parameters
    ----------
    model : PreTrainedModel
        Of a supported family.
    keeps : tuple of float
        Budgets below 1.
    static : bool
        Whether transformers' compiled decoding is measured as well.
    seed : int
    vision_keep : float
        Share of the visual tokens that the tower computes in ``"ours-vision"``, which is there if it is below 1 and the
        engine runs the tower.
    selectors : iterable of str
        Names of those that have a provider each.
    fp8 : bool
        Whether decode steps that read float8 copies of the weights are measured, in ``"ours-fp8"``.

    Raises
    ------
    NotImplementedError
        If the device does not read float8.
    ValueError
        If there is no such selector.
    """
    if fp8:
        check_float8(model.device)
    names = chosen_selectors(selectors)
    ours = shared_copy(model)
    state = api.apply_sparsevlm(ours)
    providers = [Provider("hf-dense", 1.0, None, model, _dense_generate(model))]
    if importlib.util.find_spec("flash_attn") is not None and model.device.type == "cuda":
        flash = shared_copy(model)
        flash.set_attn_implementation("flash_attention_2")
        providers.append(Provider("hf-flash", 1.0, None, flash, _dense_generate(flash)))
    if static:
        generate = _dense_generate(model, cache_implementation="static")
        providers.append(Provider("hf-static", 1.0, None, model, generate, compiles=True))
    settings: list[tuple[str, dict[str, Any]]] = [("ours-default", {}), ("ours-dense", {"keep": 1.0})]
    for keep in keeps:
        settings.append(("ours", {"keep": keep}))
        if model.device.type != "cuda" and state.adapter.decoder.block is not None:
            settings.append(("ours-engine", {"keep": keep, "engine": True}))
        if vision_keep < 1.0 and state.adapter.vision.program is not None:
            settings.append(("ours-vision", {"keep": keep, "vision_keep": vision_keep, "engine": True}))
        if fp8:
            settings.append((f"ours-{_FLOAT8}", {"keep": keep, "weights": _FLOAT8, "engine": True}))
        settings += [(f"ours-{name}", {"keep": keep, "selector": name}) for name in names]
    for name, changes in settings:
        config = state.config.replace(**changes, **({"seed": seed} if changes else {}))  # the default call sets nothing
        providers.append(Provider(name, config.keep, config, ours, _pruned_generate(state, config), state))
    return providers


def _exact_length(new_tokens: int) -> dict[str, Any]:
    return {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}


def _dense_generate(model: Any, **fixed: Any) -> Callable[..., Tensor]:
    def generate(inputs: Inputs, new_tokens: int, **options: Any) -> Tensor:
        output: Tensor = model.generate(**inputs, **_exact_length(new_tokens), **fixed, **options)
        return output

    return generate


def _pruned_generate(state: SparseVLMState, config: SparseVLMConfig) -> Callable[..., Tensor]:
    changes = {name: getattr(config, name) for name in _OPTIONS}

    def generate(inputs: Inputs, new_tokens: int, **options: Any) -> Tensor:
        with state.options(**changes, engine=options.pop("engine", config.engine)):
            output: Tensor = state.adapter.model.generate(**inputs, **_exact_length(new_tokens), **options)
            return output

    return generate
