"""Which position each slot of a cache layer stands for, where layers hold different tokens."""

from __future__ import annotations

import torch
from torch import Tensor

PAD_SLOT = -1


class SlotTable:
    """Absolute position of every slot of the cache layers of one stage, shared by them.

    Tokens that arrive later are contiguous, so they are only counted.

    Parameters
    ----------
    positions : Tensor of shape (batch, n_slots), int64
        Absolute position per slot, ascending; dead slots hold -1 and stand on the left.
    length : int
        Logical length of the sequence that these slots stand for, dropped tokens included.
    tail : int
        Number of slots at the end that are contiguous in every sample.
    has_padding : bool
        Whether any slot is dead.
    """

    def __init__(self, positions: Tensor, length: int, tail: int, has_padding: bool):
        self.positions = positions
        self.has_padding = has_padding
        self._base = length
        self._tail = tail
        self._appended = 0

    @property
    def appended(self) -> int:
        """Tokens that came after the table was made."""
        return self._appended

    @property
    def length(self) -> int:
        """Logical length of the sequence, dropped tokens included."""
        return self.logical_length(self._appended)

    @property
    def n_dropped(self) -> int:
        """Logical length less the number of slots, however many tokens came or were cropped."""
        return self._base - self.positions.shape[1]

    def append(self, count: int) -> None:
        """Count ``count`` more tokens at the end."""
        self._appended += count

    def logical_length(self, appended: int) -> int:
        """Logical length when ``appended`` tokens had come."""
        return self._base + appended

    def slots(self, appended: int, width: int | None = None) -> Tensor:
        """Position of every slot once ``appended`` tokens have come, padded with dead ones on the right to ``width``.

        Returns
        -------
        Tensor of shape (batch, n_slots) or (batch, width), int64
        """
        table = self.positions
        if appended:
            new = torch.arange(self._base, self._base + appended, device=table.device)
            table = torch.cat([table, new.expand(table.shape[0], -1)], dim=1)
        if width is not None and width > table.shape[1]:
            table = torch.nn.functional.pad(table, (0, width - table.shape[1]), value=PAD_SLOT)
        return table

    def check_crop(self, count: int) -> None:
        """Refuse to crop into the pruned part, where a number of slots says nothing about positions.

        Raises
        ------
        ValueError
        """
        if count > self._tail + self._appended:
            raise ValueError(
                f"cannot crop {count} tokens off a pruned cache: only the last {self._tail + self._appended} are text "
                "after the last visual token. Start again with a new cache."
            )

    def crop(self, count: int) -> None:
        """Forget the last ``count`` slots."""
        self.check_crop(count)
        from_appended = min(count, self._appended)
        self._appended -= from_appended
        if rest := count - from_appended:
            self.positions = self.positions[:, :-rest]
            self._base -= rest
            self._tail -= rest

    def index(self, batch_idx: Tensor) -> None:
        """Reorder or select samples."""
        self.positions = self.positions[batch_idx.to(self.positions.device)]

    def repeat(self, repeats: int) -> None:
        """Repeat every sample ``repeats`` times."""
        self.positions = self.positions.repeat_interleave(repeats, dim=0)


def next_table(
    before: SlotTable | None,
    appended: int,
    rows: Tensor,
    past_len: int,
    q_len: int,
    tail: int,
    has_padding: bool,
    first: int = 0,
) -> SlotTable:
    """Table of layers that have dropped something of a pass: what they held before, then the rows that are left.

    Parameters
    ----------
    before : SlotTable or None
        Theirs when the pass began; ``None``: they held everything from ``first`` on.
    appended : int
        Tokens that it had counted then.
    rows : Tensor of shape (batch, n_rows), int64
        Position within the pass of every row that is left; -1 for fillers, on the left.
    past_len, q_len : int
        Logical length of the cache before the pass, and of the pass.
    tail : int
        Rows at the end that are contiguous in every sample.
    has_padding : bool
        Whether any row is a filler.
    first : int
        Position of the first token that they held; above 0 where a window has left out those before.
    """
    absolute = torch.where(rows == PAD_SLOT, PAD_SLOT, rows + past_len)
    if before is not None:
        old = before.slots(appended).to(rows.device)
    else:
        old = torch.arange(first, past_len, device=rows.device).expand(rows.shape[0], -1)
    has_padding = has_padding or (before is not None and before.has_padding)
    return SlotTable(torch.cat([old, absolute], dim=1), past_len + q_len, tail, has_padding)
