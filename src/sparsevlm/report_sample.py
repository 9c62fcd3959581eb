"""What the report of a request says of each sample, and of each of its target layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageReport:
    """One sample at one target layer.

    Attributes
    ----------
    layer : int
        Target layer; its output was pruned. ``-1``: before the decoder.
    n_in, n_kept, n_recycled : int
        Visual tokens before, kept as they were, and merged from dropped ones; ``n_kept + n_recycled`` went on.
    rank : int or None
        Rank of the rater attention, where the rank decided the count.
    raters : tuple of int
        Prompt positions of the text tokens that voted.
    kept, recycled : tuple of int
        Indices among the sample's visual tokens; a recycled one is the centre of its cluster.
    skipped_because : str or None
        Why nothing was dropped here.
    per_image : tuple of int
        Visual tokens of each image or video of the sample that went on, in prompt order; a recycled one counts for the
        image that holds its centre.
    """

    layer: int
    n_in: int
    n_kept: int
    n_recycled: int
    rank: int | None = None
    raters: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    recycled: tuple[int, ...] = ()
    skipped_because: str | None = None
    per_image: tuple[int, ...] = ()


@dataclass(frozen=True)
class SampleReport:
    """One sample of the batch.

    Attributes
    ----------
    n_visual, n_text : int
        Visual tokens of the sample and its other (unpadded) tokens.
    layer_tokens : tuple of int
        Visual tokens at each decoder layer's input.
    final_tokens : int
        Visual tokens that left the last layer; 0 where the prompt was not finished.
    visual_positions : tuple of int
        Prompt positions of the visual tokens, padding included.
    grids : tuple of (t, h, w)
        Merged grid of each image or video, in prompt order.
    budget : float or None
        Requested average of visual tokens over layer inputs.
    budget_clamped : str or None
        Why the budget, ``min_keep`` or the floors of its images could not hold for this sample, and what was done.
    stages : tuple of StageReport
    images : tuple of int
        Visual tokens of each image or video, in prompt order.
    views : tuple of tuple of (rows, columns, height, width)
        By image, the views of the picture that its tokens are, one behind the other: ``rows`` times ``columns`` tiles,
        each of ``height`` times ``width`` tokens; 0 columns: ``rows`` tiles whose arrangement is not known. Empty for
        an image that is a single grid; empty as a whole where all are.
    pictures : tuple of (width, height, digest)
        The pictures and frames that it is of, where they were told by :meth:`Report.of_pictures`.
    """

    n_visual: int
    n_text: int
    layer_tokens: tuple[int, ...]
    final_tokens: int
    visual_positions: tuple[int, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    budget: float | None = None
    budget_clamped: str | None = None
    stages: tuple[StageReport, ...] = ()
    images: tuple[int, ...] = ()
    views: tuple[tuple[tuple[int, int, int, int], ...], ...] = ()
    pictures: tuple[tuple[int, int, str], ...] = ()

    @property
    def average_in(self) -> float:
        """Visual tokens averaged over layer inputs: what is really computed."""
        return sum(self.layer_tokens) / len(self.layer_tokens)

    @property
    def average_out(self) -> float:
        """Visual tokens averaged over layer outputs: the count of the paper's tables."""
        return (sum(self.layer_tokens[1:]) + self.final_tokens) / len(self.layer_tokens)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SampleReport:
        """Rebuild one from its plain values, those of older releases as well."""
        data = {"views": [], "pictures": [], **data}  # reports of older releases do not say it
        values = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        stages = []
        for stage in data["stages"]:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stage.items()}
            stages.append(StageReport(**plain))
        values["stages"] = tuple(stages)
        values["grids"] = tuple(tuple(grid) for grid in data["grids"])
        values["views"] = tuple(tuple(tuple(view) for view in image) for image in data["views"])
        values["pictures"] = tuple(tuple(picture) for picture in data["pictures"])
        for name in ("layer_tokens", "visual_positions", "images"):
            values[name] = tuple(data[name])
        return cls(**values)
