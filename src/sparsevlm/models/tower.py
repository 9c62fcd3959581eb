"""Vision towers as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerBlock:
    """One block of a :class:`PackedTower`, its modules by role.

    Attributes
    ----------
    module : nn.Module
        The whole block.
    attention, mlp : nn.Module
        Whole parts; the MLP runs as it is where it is not gated.
    attention_norm, mlp_norm : nn.Module
        RMS norms, or ``nn.LayerNorm``.
    qkv, output : nn.Linear
    n_heads : int
    scaling : float
    is_full : bool
        Whether all patches of an image (or frame) see each other, not only those of a window.
    gate, up, down : nn.Linear or None
    """

    module: Any
    attention: Any
    mlp: Any
    attention_norm: Any
    mlp_norm: Any
    qkv: Any
    output: Any
    n_heads: int
    scaling: float
    is_full: bool
    gate: Any = None
    up: Any = None
    down: Any = None


@dataclass(frozen=True)
class PackedTower:
    """A vision tower that the engine can run: over the packed patches of all images, with rotary positions.

    Attributes
    ----------
    projection : nn.Module
        Embeds a patch; a convolution whose kernel is its stride.
    rotary : nn.Module
        ``rotary(like, positions)`` gives cosines and sines.
    blocks : tuple of TowerBlock
    merger : nn.Module
        From patches to visual tokens.
    side : int
        Patches per side that form one visual token.
    window : int or None
        Visual tokens per side of a window; ``None``: no block has windows.
    position_table : nn.Embedding or None
        Learned positions of a square of patches, row by row, interpolated to the size of each image, its corners on
        the image's; ``None``: there are none.
    late_mergers : tuple of (int, nn.Module)
        Blocks, ascending, whose output becomes features that the decoder adds behind its first layers, and what makes
        these of it.
    """

    projection: Any
    rotary: Any
    blocks: tuple[TowerBlock, ...]
    merger: Any
    side: int
    window: int | None = None
    position_table: Any = None
    late_mergers: tuple[tuple[int, Any], ...] = ()


@dataclass(frozen=True)
class CapturedModule:
    """A module between pixels and visual tokens that the engine records as it is, a program for each shape of inputs.

    What it does depends on the shapes of its inputs, and on integers that the host knows, alone.

    Attributes
    ----------
    module : nn.Module
    in_tiles : bool
        Whether the first dimension of all inputs and outputs counts images, or tiles, that do not see each other.
    """

    module: Any
    in_tiles: bool


@dataclass(frozen=True)
class Vision:
    """The vision tower of a model.

    Attributes
    ----------
    module : nn.Module
    readable : tuple of (int, nn.Module)
        Index and attention module of each block in which all patches of an image (or frame) see each other and whose
        output is used, ascending; it looks its function up as those of the decoder do.
    n_blocks : int
        Number of blocks whose output is used.
    patches_per_token : int
        Patches that form one visual token.
    n_prefix : int
        Tokens of the tower before the patches of each image, such as a class token.
    program : PackedTower or None
        What the engine has to know of it; ``None``: its own modules run.
    unreadable : str
        Why ``readable`` is empty, where that is not for want of blocks with full attention.
    blocks : tuple of nn.Module
        All blocks, of which the output of the first ``n_blocks`` is used; empty: they are not known.
    projector : nn.Module or None
        What makes visual tokens of its output, where that is not part of it.
    captured : tuple of CapturedModule
        Of a tower whose own modules run: those of them, and of what follows, that the engine records.
    """

    module: Any
    readable: tuple[tuple[int, Any], ...]
    n_blocks: int
    patches_per_token: int = 1
    n_prefix: int = 0
    program: PackedTower | None = None
    unreadable: str = ""
    blocks: tuple[Any, ...] = ()
    projector: Any = None
    captured: tuple[CapturedModule, ...] = ()

    @property
    def read_blocks(self) -> tuple[tuple[int, Any], tuple[int, Any]]:
        """Of ``readable``, which selectors read: the one nearest to the middle of the tower (of two as near, the
        earlier) and the last."""
        return min(self.readable, key=lambda block: abs(2 * block[0] - self.n_blocks)), self.readable[-1]
