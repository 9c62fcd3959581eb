"""Rows of the benchmark's CSV file."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models import adapter_for
from .cases import N_TEXT, Case
from .providers import Provider
from .roofline import Roofline, roofline_bounds
from .rounds import Measurement

COLUMNS = (
    *("case", "provider", "path", "selector", "schedule", "recycle", "dtype", "batch", "n_visual", "n_text"),
    *("new_tokens", "keep", "phase", "metric", "p50", "p20", "p80", "floor", "gpu", "torch", "triton", "transformers"),
    *("commit", "timestamp", "model", "command", "note", "vision_keep"),
)
Row = dict[str, str]


def rows_of(case: Case, provider: Provider, measured: Measurement, roofline: Roofline, shared: Row) -> list[Row]:
    """Returns the rows of one provider in one case, in :data:`COLUMNS`; a single row with a note if no time counts.

    Parameters
    ----------
    case : Case
    provider : Provider
    measured : Measurement
    roofline : Roofline
    shared : dict
        Columns that all rows of a case share.
    """
    shared = {**dict.fromkeys(COLUMNS, ""), **shared, **{name: str(value) for name, value in asdict(case).items()}}
    shared |= {"case": case.name, "n_text": str(N_TEXT), "note": measured.note}
    shared |= {"provider": provider.name, "keep": str(provider.keep)}
    if provider.config is not None:
        shared |= {"selector": str(provider.config.selector), "schedule": str(provider.config.schedule or "default")}
        shared |= {"recycle": str(provider.config.recycle), "vision_keep": str(provider.config.vision_keep)}
    if measured.note:
        return [{**shared, "phase": "total", "metric": "ms"}]
    adapter = adapter_for(provider.model)
    shared["path"] = measured.path
    vision_keep = 1.0 if provider.config is None else provider.config.vision_keep
    bounds = roofline_bounds(
        adapter, case, measured.layer_tokens or (case.n_visual,) * adapter.n_layers, roofline, vision_keep
    )
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


def spread(values: Sequence[float]) -> Row:
    """Returns the median and the 20 and 80 percentiles as columns."""
    return {f"p{q}": cell(float(np.percentile(values, q))) for q in (50, 20, 80)}


def cell(value: float | None) -> str:
    """Formats a number with six digits; ``None`` and NaN as an empty cell."""
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def environment(model: Any) -> Row:
    """Returns the columns of dtype, device, versions and time."""
    return {"dtype": str(model.dtype).removeprefix("torch."), **device_and_versions(model.device)}


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
        writer = csv.DictWriter(out, heads)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
