"""Feasible settings of a model, checked on its skeleton before weights are read."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ... import api
from ...inputs import load_processor, load_skeleton
from ...inputs.downsample import Downsampler
from ...models import adapter_for
from ..settings import ALL, DENSE, DOWNSAMPLE, EvalConfig, Setting, make_settings

_NO_SIZE = "downsample needs a budget that is a size: a fraction or a number of tokens, not adaptive"


def feasible_settings(config: EvalConfig, folder: Path) -> tuple[list[Setting], dict[str, str]]:
    """Splits the settings into those that the model can run and the reasons against the others, by name.

    Parameters
    ----------
    config : EvalConfig
    folder : Path
        Of the checkpoint.

    Raises
    ------
    ValueError
        If the model cannot run a selector that was asked for by name, or if nothing is left to compare with dense.
    """
    model = load_skeleton(folder)
    reasons: dict[str, str] = {}
    feasible = []
    not_smaller = lru_cache(maxsize=None)(lambda: _reason_against_smaller_images(model, folder))
    for setting in make_settings(config):
        reason = not_smaller() if setting.selector == DOWNSAMPLE else _unsupported_reason(model, setting)
        if reason is None:
            feasible.append(setting)
            continue
        if config.selectors != (ALL,):
            raise ValueError(f"{setting.name} cannot run: {reason}")
        reasons[setting.name] = reason
    if feasible == [Setting(DENSE)] and not set(config.selectors) <= {DENSE}:
        raise ValueError(f"nothing is left to compare with dense: {next(iter(reasons.values()), _NO_SIZE)}.")
    return feasible, reasons


def _reason_against_smaller_images(model: Any, folder: Path) -> str | None:
    """Reason why smaller images do not become fewer tokens, or ``None``."""
    return Downsampler(adapter_for(model), load_processor(folder)).unsupported_reason()


def _unsupported_reason(model: Any, setting: Setting) -> str | None:
    """Reason why a model cannot run a setting, or ``None``."""
    if setting.pruning is None:
        return None
    try:
        api.apply_sparsevlm(model, config=setting.pruning)
    except (ValueError, TypeError, NotImplementedError) as error:
        return str(error)
    api.remove_sparsevlm(model)
    return None
