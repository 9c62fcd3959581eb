"""Options under a selector: those that it sets by itself, and those that it leaves without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import SparseVLMConfig
from .context import SelectorTraits

# What a method decides for itself; how many tokens are kept, and where, stays the user's.
OVERRIDABLE = ("raters", "heads", "recycle", "merge", "tau", "theta")


def effective_config(config: SparseVLMConfig, selector: Any) -> SparseVLMConfig:
    """The options in force under a selector: ``config`` with what ``selector.overrides`` sets.

    The stored options of a model stay as they are, so that the next selector starts from what the user chose. An option
    that has its default value counts as not chosen, even where the user wrote it down: ``selector="sparsevlm-v2"`` does
    not recycle with ``recycle=True`` either.

    Parameters
    ----------
    config : SparseVLMConfig
    selector : Selector
        Its optional attribute ``overrides`` maps names out of :data:`OVERRIDABLE` to values.

    Raises
    ------
    TypeError
        If ``overrides`` is no mapping of names.
    ValueError
        If an override is none of :data:`OVERRIDABLE`, or contradicts an option that differs from its default.
    """
    overrides = getattr(selector, "overrides", {})
    name = getattr(selector, "name", None) or type(selector).__name__
    if not isinstance(overrides, Mapping) or not all(isinstance(option, str) for option in overrides):
        raise TypeError(f"selector {name!r}: overrides must map names of options to values, got {overrides!r}.")
    if not overrides:
        return config
    if unknown := sorted(set(overrides) - set(OVERRIDABLE)):
        raise ValueError(
            f"selector {name!r} overrides {', '.join(unknown)}; a selector may set {', '.join(OVERRIDABLE)}."
        )
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for option, value in overrides.items():
        given = getattr(config, option)
        if given not in (defaults[option], value):
            raise ValueError(
                f"selector {name!r} sets {option}={value!r}, but {option}={given!r} was asked for: leave {option} "
                "unset, or choose another selector."
            )
    return config.replace(**overrides)


def idle_options(config: SparseVLMConfig, traits: SelectorTraits) -> list[str]:
    """Options that were changed from their defaults and change nothing under a selector.

    Parameters
    ----------
    config : SparseVLMConfig
        As the user chose it. Of a selector that is given as an object nobody knows which options it reads.
    traits : SelectorTraits
        Of the selector in force.

    Returns
    -------
    list of str
    """
    adaptive = config.keep is None and (config.schedule is None or isinstance(config.schedule, str))
    idle: list[str] = []
    if not adaptive:
        idle += ["rank_lambda", "rank_tolerance"]
        if "rater_attention" not in traits.needs:
            idle += ["raters", "heads"]
    if not traits.recycles and config.preset is None:
        idle += ["tau", "theta"]
    if not isinstance(config.selector, str):
        return []
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return [name for name in idle if getattr(config, name) != defaults[name]]
