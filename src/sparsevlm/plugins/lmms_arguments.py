"""Arguments of ``--model_args`` for ``--model sparsevlm``: names, types and defaults."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import SCHEDULES, SparseVLMConfig

DOWNSAMPLE = "downsample"
_DENSE = "dense"
_PRUNING = tuple(f.name for f in fields(SparseVLMConfig))


@dataclass(frozen=True)
class ModelArguments:
    """Parsed and checked arguments.

    Attributes
    ----------
    pretrained : str
        Folder, hub id, or ``"bundled"``.
    device, dtype, attn_implementation : str
        As in :func:`sparsevlm.inputs.load_model`.
    batch_size : int
        Requests per call of ``generate``.
    min_pixels, max_pixels : int or None
        Bounds on the pixels of an image or of a video's frame. ``None``: the checkpoint's own.
    n_visual : int or None
        Visual tokens that every image is resized to, as near as its aspect allows.
    max_num_frames : int
        Frames that are taken, evenly, from a video file.
    system_prompt : str or None
        Text, or a file with it, that replaces the system message. ``None``: the task's, or the chat template's.
    pruning : SparseVLMConfig or None
        ``None``: nothing is applied to the model.
    downsample : int, float or None
        Visual tokens that the images of a request are made smaller for, or a fraction of what they have.
    """

    pretrained: str
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    batch_size: int = 1
    min_pixels: int | None = None
    max_pixels: int | None = None
    n_visual: int | None = None
    max_num_frames: int = 32
    system_prompt: str | None = None
    pruning: SparseVLMConfig | None = field(default_factory=SparseVLMConfig)
    downsample: int | float | None = None


_OWN = tuple(f.name for f in fields(ModelArguments) if f.name not in ("pruning", "downsample"))
_TEXTS = ("pretrained", "device", "dtype", "attn_implementation", "system_prompt")


def parse_arguments(given: Mapping[str, Any]) -> ModelArguments:
    """Check every argument before anything is loaded.

    Parameters
    ----------
    given : mapping
        Values as lmms-eval parses them (``"0.25"`` is a float by then), as text, or as Python values.

    Raises
    ------
    TypeError
        If a name is unknown, or a value of the wrong kind.
    ValueError
        If a value is out of range, or two exclude each other.
    """
    if unknown := [name for name in given if name not in _OWN + _PRUNING]:
        raise TypeError(_unknown(unknown))
    if given.get("pretrained") is None:
        raise ValueError("pretrained is missing: a folder, a hub id such as Qwen/Qwen2.5-VL-7B-Instruct, or bundled.")
    values: dict[str, Any] = {}
    for name in _OWN:
        if (value := given.get(name)) is None or value == "":
            continue
        values[name] = str(value) if name in _TEXTS else _whole(name, value)
    least, most = values.get("min_pixels"), values.get("max_pixels")
    if "n_visual" in values and (least or most):
        raise ValueError("n_visual fixes the size of every image: leave min_pixels and max_pixels out.")
    if least is not None and most is not None and least > most:
        raise ValueError(f"min_pixels={least} is more than max_pixels={most}.")
    if given.get("selector") == DOWNSAMPLE:
        return ModelArguments(**values, pruning=None, downsample=_downsample(given))
    return ModelArguments(**values, pruning=_pruning(given))


def _pruning(given: Mapping[str, Any]) -> SparseVLMConfig | None:
    parsers: dict[str, Callable[[Any], Any]] = {"target_layers": _sequence, "schedule": _schedule, "keep": _budget}
    options = {name: parsers.get(name, _plain)(given[name]) for name in _PRUNING if name in given}
    is_dense = options.get("keep") in (_DENSE, 1.0)
    # Checked for a dense run as well, so that a misspelt option shows in the first run of a table.
    config = SparseVLMConfig(**{**options, "keep": 1.0} if is_dense else options)
    return None if is_dense else config


def _downsample(given: Mapping[str, Any]) -> int | float | None:
    """Budget of the images that are made smaller; ``None`` where all is kept."""
    if idle := sorted(set(given) & set(_PRUNING) - {"keep", "selector"}):
        raise ValueError(f"selector={DOWNSAMPLE} prunes nothing, so that {', '.join(idle)} would have no effect.")
    keep = _budget(given.get("keep"))
    if keep is None:
        raise ValueError(f"selector={DOWNSAMPLE} wants keep=: a fraction (0.25) or a number of tokens (64).")
    if keep in (_DENSE, 1.0):
        return None
    SparseVLMConfig(keep=keep)  # the same range
    budget: int | float = keep
    return budget


def _budget(value: Any) -> Any:
    """``keep``: tokens (int), a fraction (float), ``None`` for adaptive, or ``"dense"``."""
    value = _plain(value)
    if value == "adaptive":
        return None
    if isinstance(value, bool) or (not isinstance(value, (int, float)) and value not in (None, _DENSE)):
        raise ValueError(f"keep must be a fraction (0.25), a number of tokens (64), adaptive or dense, got {value!r}.")
    if value == 1 and isinstance(value, int):
        raise ValueError("keep=1 is a single visual token; for no pruning write keep=1.0 or keep=dense.")
    return value


def _schedule(value: Any) -> Any:
    return value if value in SCHEDULES else _sequence(value)


def _sequence(value: Any) -> Any:
    """``"2;6;10"`` or ``"[2,6,10]"``, one number, or a list as it is; ``None`` for the default."""
    if isinstance(value, str):
        pieces = [_plain(piece.strip()) for piece in re.split("[;,]", value.strip("[] "))]
        return None if pieces == [None] else pieces
    return [value] if isinstance(value, (int, float)) else value


def _plain(value: Any) -> Any:
    """The bool, number or ``None`` that a text stands for; anything else unchanged."""
    if not isinstance(value, str):
        return value
    if (word := value.lower()) in ("true", "false", "none", ""):
        return {"true": True, "false": False}.get(word)
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _whole(name: str, value: Any) -> int:
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        hint = "; there is no automatic batch size" if name == "batch_size" else ""
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}{hint}.")
    return number


def _unknown(names: list[str]) -> str:
    near = [match for name in names for match in difflib.get_close_matches(name, _OWN + _PRUNING, n=1)]
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return (
        f"unknown model argument {', '.join(names)}.{hint} Of the model: {', '.join(_OWN)}; "
        f"of the pruning: {', '.join(_PRUNING)}."
    )
