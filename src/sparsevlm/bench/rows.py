"""Rows of the benchmark's CSV file."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models import ModelAdapter
from ..selection.selectors import default_of
from .cases import Case, PictureCase
from .providers import Setting
from .roofline import Roofline, roofline_bounds
from .rounds import Measurement

COLUMNS = (
    *("case", "provider", "path", "selector", "schedule", "recycle", "dtype", "batch", "n_visual", "n_text"),
    *("new_tokens", "keep", "phase", "metric", "p50", "p20", "p80", "floor", "gpu", "torch", "triton", "transformers"),
    *("commit", "timestamp", "model", "command", "note", "vision_keep", "cudnn", "fusions"),
)
Row = dict[str, str]


def rows_of(
    case: Case | PictureCase, request: Case, setting: Setting, measured: Measurement, adapter: ModelAdapter,
    roofline: Roofline, shared: Row,
) -> list[Row]:  # fmt: skip
    """Returns the rows of one setting in one case, in :data:`COLUMNS`; a single row with a note if no time counts.

    Parameters
    ----------
    case : Case or PictureCase
    request : Case
        The same as inputs of the model.
    setting : Setting
    measured : Measurement
    adapter : ModelAdapter
    roofline : Roofline
    shared : dict
        Columns that all rows of a case share.
    """
    shared = {**dict.fromkeys(COLUMNS, ""), **shared, **setting_columns(setting), "note": measured.note}
    shared |= {"case": case.name, "batch": str(case.batch), "new_tokens": str(case.new_tokens)}
    shared |= {"n_visual": str(request.n_visual), "n_text": str(request.n_text)}
    if measured.note:
        return [{**shared, "phase": "total", "metric": "ms"}]
    shared |= {"path": measured.path, "note": measured.remark}
    bounds = bounds_of(request, setting, measured.layer_tokens, adapter, roofline)
    rows = []
    for phase in measured.times[0]:
        values = [times[phase] for times in measured.times]
        rows.append({**shared, "phase": phase, "metric": "ms", **spread(values), "floor": cell(bounds.get(phase))})
        if phase == "total":
            speeds = [1e3 * case.batch * case.new_tokens / value for value in values]
            rows.append({**shared, "phase": phase, "metric": "tokens_per_s", **spread(speeds)})
    if measured.peak_bytes:
        rows.append({**shared, "phase": "total", "metric": "bytes", **spread([measured.peak_bytes])})
    return rows


def setting_columns(setting: Setting) -> Row:
    """Returns the columns of a setting."""
    columns = {"provider": setting.name, "keep": setting.label}
    if (config := setting.config) is not None:
        columns |= {"selector": config.selector or default_of(config), "schedule": str(config.schedule or "default")}
        columns |= {"recycle": str(config.recycle), "vision_keep": str(config.vision_keep)}
    return columns


def bounds_of(
    request: Case, setting: Setting, layer_tokens: Sequence[int], adapter: ModelAdapter, roofline: Roofline
) -> dict[str, float]:
    """Returns the roofline bounds of a request, in milliseconds per phase.

    Parameters
    ----------
    request : Case
    setting : Setting
    layer_tokens : sequence of int
        Visual tokens at the input of each decoder layer; empty: all.
    adapter : ModelAdapter
    roofline : Roofline
    """
    vision_keep = 1.0 if setting.config is None else setting.config.vision_keep
    tokens = layer_tokens or (request.n_visual,) * adapter.n_layers
    return roofline_bounds(adapter, request, tokens, roofline, vision_keep)


def spread(values: Sequence[float]) -> Row:
    """Returns the median and the 20 and 80 percentiles as columns."""
    return {f"p{q}": cell(float(np.percentile(values, q))) for q in (50, 20, 80)}


def cell(value: float | None) -> str:
    """Formats a number with six digits; ``None`` and NaN as an empty cell."""
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def environment(model: Any) -> Row:
    """Returns the columns of dtype, device, versions, time and transformers' own fusions."""
    fusions = [name for name, options in (getattr(model.config, "fusion_config", None) or {}).items() if options]
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        **device_and_versions(model.device),
        "cudnn": str(torch.backends.cudnn.version() or "none"),
        "fusions": " ".join(fusions) or "none",
    }


def device_and_versions(device: torch.device) -> Row:
    """Returns the columns of device, versions and time."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def check_columns(file: Path, columns: Sequence[str]) -> None:
    """Checks that rows can be added to a file, before there are any.

    Raises
    ------
    ValueError
        If it has other columns.
    """
    if not file.exists():
        return
    with file.open(newline="", encoding="utf-8") as existing:
        if (heads := next(csv.reader(existing), [])) != list(columns):
            raise ValueError(f"{file} has other columns ({', '.join(heads)}); name another file.")


def append_rows(file: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV file of the same columns, which is made if there is none.

    Raises
    ------
    ValueError
        If the file has other columns.
    """
    heads = list(rows[0])
    check_columns(file, heads)
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, heads, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
