"""Which settings a model can run, found out before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import api
from ...inputs import load_skeleton
from ..settings import ALL, DENSE, EvalConfig, Setting, make_settings

_NO_SIZE = "downsample needs a budget that is a size: a fraction or a number of tokens, not adaptive"


def feasible_settings(
    config: EvalConfig, folder: Path, refused: Mapping[str, str]
) -> tuple[list[Setting], dict[str, str]]:
    """The settings that the model can run, and why not, by name, for the others.

    Parameters
    ----------
    config : EvalConfig
    folder : Path
        Of the checkpoint.
    refused : mapping of str to str
        Settings that are left out whatever the model can, by name, and why.

    Raises
    ------
    ValueError
        If the model cannot run a selector that was asked for by name, or if nothing is left to compare with dense.
    """
    model = load_skeleton(folder)
    reasons, left = dict(refused), []
    for setting in make_settings(config):
        if setting.name in refused:
            continue
        reason = _refusal(model, setting)
        if reason is None:
            left.append(setting)
            continue
        if config.selectors != (ALL,):
            raise ValueError(f"{setting.name} cannot run: {reason}")
        reasons[setting.name] = reason
    if left == [Setting(DENSE)] and not set(config.selectors) <= {DENSE}:
        raise ValueError(f"nothing is left to compare with dense: {next(iter(reasons.values()), _NO_SIZE)}.")
    return left, reasons


def _refusal(model: Any, setting: Setting) -> str | None:
    """Why a model cannot run a setting, or ``None``."""
    if setting.pruning is None:
        return None
    try:
        api.apply_sparsevlm(model, config=setting.pruning)
    except (ValueError, TypeError, NotImplementedError) as error:
        return str(error)
    api.remove_sparsevlm(model)
    return None
