"""State of one pass through the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from .cache import SlotTable
from .probe import AttentionProbe
from .request import Request
from .step import Readout


@dataclass
class Forward:
    """State of one pass through the decoder; gone when the pass ends.

    Attributes
    ----------
    request : Request or None
        Set while this pass may prune.
    visual_masks : dict
        Of shape (batch, q_len), bool: which tokens are visual, per kind (image, video) that the pass brings.
    appended : dict
        Tokens that each table of the cache had counted when the pass began: its first layer moves it along early.
    tables : dict
        Slot table of this pass's current stage by the table that the layers had before.
    memo : dict
        Masks and rotary tables that the layers of a stage share.
    rows_dead : bool
        Whether ``request.rows`` holds fillers.
    probe : AttentionProbe or None
        Of the target layer that was the last to be read.
    readout : Readout
        What was read at the target layer that has just run, and in the vision tower.
    """

    cache: Cache | None
    request: Request | None = None
    visual_masks: dict[str, Tensor] = field(default_factory=dict)
    appended: dict[SlotTable, int] = field(default_factory=dict)
    tables: dict[SlotTable | None, SlotTable] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    rows_dead: bool = False
    probe: AttentionProbe | None = None
    readout: Readout = field(default_factory=Readout)

    def note_tables(self) -> None:
        """Remember how far every table of the cache has come."""
        for layer in () if self.cache is None else self.cache.layers:
            table = getattr(layer, "table", None)
            if table is not None:
                self.appended[table] = table.appended

    def table_of(self, layer_idx: int) -> SlotTable | None:
        """Slot table of a cache layer, if it has one."""
        if self.cache is None or layer_idx >= len(self.cache.layers):
            return None
        return getattr(self.cache.layers[layer_idx], "table", None)

    def forget_layer(self) -> None:
        """Drop what was read at the target layer that has just run."""
        self.readout = Readout(vision=self.readout.vision)

    def begin_stage(self, *, has_dead: bool) -> None:
        """Forget what the layers before a cut shared; ``has_dead``: the rows that are left hold fillers."""
        self.tables.clear()
        self.memo.clear()
        self.rows_dead = has_dead

    def disarm(self) -> None:
        """End the reading of a layer that has run, or failed."""
        if self.probe is not None:
            self.probe.disarm()
            self.probe = None
