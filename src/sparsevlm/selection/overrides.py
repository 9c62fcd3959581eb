"""Options that a selector sets by itself: how variants of one method become names of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import SparseVLMConfig

# What a method decides for itself; how many tokens are kept, and where, stays the user's.
OVERRIDABLE = ("raters", "heads", "recycle", "merge", "tau", "theta")


def effective_config(config: SparseVLMConfig, selector: Any) -> SparseVLMConfig:
    """The options in force under a selector: ``config`` with what ``selector.overrides`` sets.

    The stored options of a model stay as they are, so that the next selector starts from what the user chose.

    Parameters
    ----------
    config : SparseVLMConfig
    selector : Selector
        Its optional attribute ``overrides`` maps names out of :data:`OVERRIDABLE` to values.

    Raises
    ------
    ValueError
        If an override is none of :data:`OVERRIDABLE`, or contradicts an option that differs from its default.
    """
    overrides: dict[str, Any] = dict(getattr(selector, "overrides", None) or {})
    if not overrides:
        return config
    name = getattr(selector, "name", None) or type(selector).__name__
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
