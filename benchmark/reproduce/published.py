"""Published averages that fit a checkpoint and a budget, and how far our ranking agrees with them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.e2e_rows import StoredRow
from benchmark.reproduce.plan import PAPER, Setting
from benchmark.validity import Comparison
from sparsevlm.config import PRESETS

_TOLERANCE = 0.005  # in the share of the tokens
_LEAST_SHARED = 3
_PAPERS_OWN = "sparsevlm"  # as published rows name it


@dataclass(frozen=True)
class Ours:
    """A setting with the average that it retains, and the share of the visual tokens that its budget names."""

    setting: Setting
    share: float
    retained: float


def share_of(setting: Setting, n_visual: int) -> float:
    """Share of the visual tokens that the budget of a setting names; 1 for dense."""
    if not setting.keep:
        return 1.0
    if setting.keep in PRESETS:
        return int(setting.keep.rpartition("-")[2]) / 576
    return float(setting.keep) if "." in setting.keep else int(setting.keep) / n_visual


def fitting(published: Sequence[StoredRow], model: str) -> list[StoredRow]:
    """Rows of a checkpoint: those whose name of it is a part of the model's."""
    name = _letters(model)
    return [row for row in published if _letters(row["checkpoint"]) in name]


def published_of(rows: Sequence[StoredRow], ours: Ours) -> list[StoredRow]:
    """Rows of the same selector and budget; those of the paper's method beside all variants of it."""
    names = {ours.setting.selector} | ({_PAPERS_OWN} if ours.setting.selector == PAPER else set())
    return [row for row in rows if row["selector"] in names and abs(_share(row) - ours.share) <= _TOLERANCE]


def comparisons(rows: Sequence[StoredRow], ours: Sequence[Ours]) -> list[Comparison]:
    """Sets each published table and budget beside ours, where three methods or more are in both.

    Of several variants of the paper's method that with the paper's settings counts, then that with its raters.
    """
    tables: dict[tuple[str, float], list[StoredRow]] = {}
    for row in rows:
        tables.setdefault((row["source"], _share(row)), []).append(row)
    found = []
    for (source, share), members in tables.items():
        both: dict[str, tuple[float, float]] = {}
        keep = ""
        for row in members:
            fits = [one for one in ours if not math.isnan(one.retained) and row in published_of([row], one)]
            if fits:
                best = min(fits, key=lambda one: (one.setting.keep not in PRESETS, one.setting.selector != PAPER))
                both[row["selector"]] = (float(row["retained"]), best.retained)
                keep = best.setting.keep
        if len(both) >= _LEAST_SHARED:
            first = members[0]
            theirs, mine = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
            place = (source, first["url"], first["read_in"], first["checkpoint"])
            found.append(Comparison(*place, share=share, keep=keep, published=theirs, ours=mine))
    return found


def _share(row: StoredRow) -> float:
    return float(row["kept"]) / float(row["n_visual"])


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
