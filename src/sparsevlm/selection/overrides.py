"""Options under a selector: those that it sets by itself, and those that it leaves without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ..config import SparseVLMConfig
from .context import SelectorTraits

# What a method decides for itself; how many tokens are kept, and where, stays the user's.
OVERRIDABLE = ("raters", "heads", "recycle", "merge", "tau", "theta")
# Options that only some selectors or budgets read.
_OF_SOME = (*OVERRIDABLE, "schedule", "rank_lambda", "rank_tolerance", "seed", "vision_keep", "image_cache")


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


def unused_options(config: SparseVLMConfig, traits: SelectorTraits, given: Collection[str]) -> list[str]:
    """Options that were given and change nothing under a selector.

    Parameters
    ----------
    config : SparseVLMConfig
    traits : SelectorTraits
        Of the selector in force.
    given : collection of str
        Names of options that the user wrote down; those that have their default value are not told.

    Returns
    -------
    list of str
        Empty for a selector that was given as an object: nobody knows which options it reads.
    """
    if config.selector is not None and not isinstance(config.selector, str):
        return []
    listed = config.schedule is not None and not isinstance(config.schedule, str)
    read = set(traits.reads) | ({"seed"} if traits.draws else set())
    if config.keep is not None or listed:
        read |= {"schedule"}
    elif not traits.adaptive:
        read |= {"rank_lambda", "rank_tolerance", "raters", "heads"}
    if "rater_attention" in traits.needs:
        read |= {"raters", "heads"}
    if config.engine is not False:
        read |= {"vision_keep", "image_cache"}
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return [name for name in _OF_SOME if name in given and name not in read and getattr(config, name) != defaults[name]]
