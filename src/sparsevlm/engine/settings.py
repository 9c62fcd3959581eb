"""Spares ``generate`` a default configuration that it builds on every call to look for settings in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from transformers import GenerationConfig

# Of a model's configuration: which settings of generation it holds; where the second is there, in milliseconds.
_CHECK, _OLD = "_get_generation_parameters", "has_no_defaults_at_init"


def plain_generation_config(
    config: Any, plain: Callable[..., Any], generation_config: Any, options: Mapping[str, Any]
) -> Any:
    """``plain(generation_config, **options)`` of transformers, faster where the configuration holds no such setting.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model.
    plain : callable
        ``_prepare_generation_config`` of the model.
    generation_config : GenerationConfig or None
    options : mapping
        Of the call.
    """
    if generation_config is not None or not hasattr(config, _OLD) or _CHECK in vars(config) or _may_hold(config):
        return plain(generation_config, **options)
    vars(config)[_CHECK] = dict  # there are none
    try:
        return plain(generation_config, **options)
    finally:
        del vars(config)[_CHECK]


def _may_hold(config: Any) -> bool:
    """Whether a setting of generation stands in the configuration that does not belong there."""
    own = _keys(type(config))  # type: ignore[arg-type]
    return any(getattr(config, key, None) is not None for key in _settings() if key not in own)


@cache
def _settings() -> tuple[str, ...]:
    return tuple(key for key in GenerationConfig._get_default_generation_params() if key != "use_cache")


@cache
def _keys(kind: Any) -> frozenset[str]:
    return frozenset() if kind.has_no_defaults_at_init else frozenset(kind().to_dict())
