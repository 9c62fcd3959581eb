"""Pictures of a report: over the image, which patches were kept, recycled and dropped at each target layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..inputs import as_rgb, identified
from ..report import Report
from ..report_sample import SampleReport, StageReport
from .fitting import as_seen, has_shape
from .headings import heading
from .page import Page, Panel

# An image, or the frames of a video.
Visual = Image.Image | Sequence[Image.Image]

DROPPED, RECYCLED, KEPT = 0, 1, 2
_TINT = np.array([245, 158, 11], dtype=np.float32)
_SHADE = np.array([30, 33, 41], dtype=np.float32)
_LONG_SIDE = 480
_PANELS_PER_LINE = 4
# Inches, by the number of panels in a line.
_PANEL_WIDTHS = {1: 4.6, 2: 3.8, 3: 3.0, 4: 2.5, 5: 1.9}
LEGEND = (
    ("#ffffff", "kept"),
    ("#f59e0b", "recycled: other dropped tokens merged into this one"),
    ("#383c47", "dropped"),
)


@dataclass(frozen=True)
class Row:
    """One image, or one frame of a video, with the part of a sample's tokens that covers it.

    Attributes
    ----------
    image : PIL image
    sample : SampleReport
    first : int
        Index of its first token among the sample's visual tokens.
    height, width : int
        Its grid in tokens.
    label : str
        What to write above it; empty for none.
    tiles : tuple of int
        Rows and columns of tiles into which the grid is cut; its tokens come tile by tile.
    """

    image: Image.Image
    sample: SampleReport
    first: int
    height: int
    width: int
    label: str = ""
    tiles: tuple[int, int] = (1, 1)

    def arranged(self, states: np.ndarray) -> np.ndarray:
        """Values of a sample's visual tokens as this grid, (height, width)."""
        own = states[self.first : self.first + self.height * self.width]
        rows, columns = self.tiles
        cells = own.reshape(rows, columns, self.height // rows, self.width // columns)
        return cells.transpose(0, 2, 1, 3).reshape(self.height, self.width)


def draw_report(
    report: Report,
    visuals: Sequence[Visual],
    *,
    sample: int = 0,
    title: str = "",
    max_frames: int = 4,
    processor: Any = None,
) -> Figure:
    """Draw the original and one panel per change, by target layer, for every image of a sample.

    Of an image in tiles, every view has a line of its own: the whole picture, and all tiles put together.

    Parameters
    ----------
    report : Report
    visuals : sequence of PIL images, or of lists of frames
        The sample's images and videos, in prompt order.
    sample : int
        Which sample of the batch.
    title : str
        Written above, such as question and answer; beneath it, or in its place, stands what ran.
    max_frames : int
        Of a video, at most this many temporal steps are shown, evenly spaced.
    processor : ProcessorMixin, optional
        That of the request: of pictures that it crops, fills up or stretches, what the model saw is drawn.

    Raises
    ------
    IndexError
        If there is no such sample.
    ValueError
        If the images do not fit the grids of the report, or are others than those that it says it is of.
    """
    if not report.samples:
        why = report.failed or report.skipped_because or "no request was made"
        raise ValueError(f"the report holds no samples to draw ({why}).")
    if not 0 <= sample < len(report.samples):
        raise IndexError(f"the report has {len(report.samples)} samples, numbered from 0; there is no sample {sample}.")
    chosen = report.samples[sample]
    if not chosen.grids and not chosen.views:
        raise ValueError(f"sample {sample} of the report has no images to draw.")
    rows = rows_of(chosen, visuals, max_frames=max_frames, processor=processor)
    _check_pictures(chosen, visuals)
    above = heading([report], sample)
    notes = [] if report.failed is None else [f"The request failed: {report.failed}."]
    notes.extend([f"Nothing was pruned: {report.skipped_because}."] if report.skipped_because else [])
    notes.extend([chosen.budget_clamped] if chosen.budget_clamped else [])
    return draw_rows(rows, title=title or above, subtitle=above if title else "", note=" ".join(notes))


def _check_pictures(sample: SampleReport, visuals: Sequence[Visual]) -> None:
    """Refuse other pictures than a report says it is of."""
    if not sample.pictures:
        return
    found = identified(visuals)
    if len(found) != len(sample.pictures):
        raise ValueError(
            f"the report was made with {len(sample.pictures)} pictures or frames, and {len(found)} were given: give "
            "those of that request."
        )
    for number, (given, known) in enumerate(zip(found, sample.pictures, strict=True), 1):
        if given != known:
            raise ValueError(
                f"picture {number} ({given[0]}x{given[1]} pixels, digest {given[2]}) is not the one that the report "
                f"was made with ({known[0]}x{known[1]} pixels, digest {known[2]}): give the pictures of that request."
            )


def draw_rows(rows: Sequence[Row], *, title: str = "", subtitle: str = "", note: str = "") -> Figure:
    """Draw one line of panels (or a few, where there are many target layers) per row."""
    panels = [_panels(row) for row in rows]
    most = max(map(len, panels))
    columns = min(most, _PANELS_PER_LINE if len(rows) == 1 else 2 * _PANELS_PER_LINE)
    width = _PANEL_WIDTHS.get(columns, _PANEL_WIDTHS[max(_PANEL_WIDTHS)])
    page = Page(columns * width)
    page.write(title, size=11)
    page.write(subtitle, size=9.5)
    for row, cells in zip(rows, panels, strict=True):
        page.write(row.label, size=9.5)
        height = width * min(max(row.height / row.width, 0.1), 1.8)
        for start in range(0, len(cells), columns):
            page.place(cells[start : start + columns], width, height)
    return page.figure(LEGEND, note)


def save_picture(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, making its folder where that is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rendered = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    rendered.convert("RGB").save(path, format="PNG", optimize=True)
    return path


def token_states(sample: SampleReport) -> list[np.ndarray]:
    """For every stage, the state of each visual token: ``DROPPED``, ``RECYCLED`` or ``KEPT``; shape (n_visual,)."""
    current = np.full(sample.n_visual, KEPT, dtype=np.uint8)
    states = []
    for stage in sample.stages:
        if stage.kept or stage.recycled:
            current = np.full(sample.n_visual, DROPPED, dtype=np.uint8)
            current[list(stage.kept)] = KEPT
            current[list(stage.recycled)] = RECYCLED
        states.append(current)
    return states


def shade(image: Image.Image, states: np.ndarray) -> np.ndarray:
    """Paint the states over an image.

    Parameters
    ----------
    image : PIL image
    states : uint8 array, shape (height, width)
        State of each token.

    Returns
    -------
    uint8 array, shape (height * cell, width * cell, 3)
        Kept tokens as they are, recycled ones tinted, dropped ones grey and dark.
    """
    cell = max(4, round(_LONG_SIDE / max(states.shape)))
    size = (states.shape[1] * cell, states.shape[0] * cell)
    pixels = np.asarray(as_rgb(image).resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    grown = states.repeat(cell, axis=0).repeat(cell, axis=1)
    grey = pixels.mean(axis=2, keepdims=True)
    painted = np.where((grown == DROPPED)[..., None], _SHADE + 0.22 * grey, pixels)
    tinted = 0.5 * pixels + 0.5 * _TINT
    painted = np.where((grown == RECYCLED)[..., None], tinted, painted)
    painted[_edges(grown, KEPT)] = 255.0
    painted[_edges(grown, RECYCLED)] = _TINT
    return painted.clip(0, 255).astype(np.uint8)


def _edges(grown: np.ndarray, state: int) -> np.ndarray:
    """Pixels of a state that touch another one."""
    inside = np.pad(grown == state, 1, constant_values=True)
    middle = inside[1:-1, 1:-1]
    return middle & ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:])


def rows_of(
    sample: SampleReport, visuals: Sequence[Visual], *, max_frames: int = 4, processor: Any = None
) -> list[Row]:
    """What :func:`draw_report` draws of a sample: one row per image, view or frame.

    Raises
    ------
    ValueError
        If the images do not fit the report.
    """
    n_images = max(len(sample.grids), len(sample.views))
    if len(visuals) != n_images and sum(map(_n_frames, visuals)) == n_images:
        visuals = [frame for visual in visuals for frame in _frames(visual)]  # frames that are images to the model
    if len(visuals) != n_images:
        raise ValueError(f"the report's sample has {n_images} images or videos, but {len(visuals)} were given.")
    sizes = sample.images or tuple(math.prod(grid) for grid in sample.grids)
    rows, first = list[Row](), 0
    for number, (visual, size) in enumerate(zip(visuals, sizes, strict=True), 1):
        views = sample.views[number - 1] if sample.views else ()
        grid = (1, *views[0][2:]) if views else sample.grids[number - 1]
        n_tokens = sum(n_rows * max(1, n_columns) * h * w for n_rows, n_columns, h, w in views) or math.prod(grid)
        if n_tokens != size:
            raise ValueError(f"image {number} has separators among its visual tokens, which were dropped like others.")
        if len(views) > 1 and isinstance(visual, Image.Image):
            rows += _view_rows(visual, sample, first, views, f"image {number}" if len(visuals) > 1 else "")
        else:
            rows += _grid_rows(visual, sample, first, grid, number, len(visuals) > 1, max_frames, processor)
        first += size
    return rows


def _view_rows(
    image: Image.Image, sample: SampleReport, first: int, views: Sequence[tuple[int, int, int, int]], name: str
) -> list[Row]:
    """One row per view of a picture."""
    found = []
    for n_rows, n_columns, height, width in views:
        tiles = (n_rows, n_columns) if n_columns else nearest_arrangement(n_rows, image.width / image.height)
        kind = "whole picture" if tiles == (1, 1) else f"{tiles[0]} x {tiles[1]} tiles"
        label = ", ".join(filter(None, (name, kind)))
        found.append(Row(image, sample, first, tiles[0] * height, tiles[1] * width, label, tiles))
        first += tiles[0] * tiles[1] * height * width
    return found


def nearest_arrangement(n_tiles: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of a number of tiles whose aspect is nearest to that of a picture, which is how such are cut."""
    pairs = [(n_tiles // columns, columns) for columns in range(1, n_tiles + 1) if n_tiles % columns == 0]
    return min(pairs, key=lambda pair: abs(pair[1] / pair[0] - aspect))


def _grid_rows(
    visual: Visual,
    sample: SampleReport,
    first: int,
    grid: tuple[int, int, int],
    number: int,
    is_one_of_several: bool,
    max_frames: int,
    processor: Any,
) -> list[Row]:
    """One row per frame of a picture or video that is a single grid."""
    (steps, height, width), frames, rows = grid, _frames(visual), []
    per_step = max(1, math.ceil(len(frames) / steps))
    if math.ceil(len(frames) / per_step) != steps or per_step > 2:
        raise ValueError(f"visual {number} has {len(frames)} frames, but the report's grid has {steps} steps.")
    if processor is not None:
        part = processor.image_processor if isinstance(visual, Image.Image) else processor.video_processor
        frames = [as_seen(part, frame, height, width) for frame in frames]
    if not has_shape(frames[0], height, width):
        raise ValueError(
            f"visual {number} ({frames[0].width}x{frames[0].height} pixels) does not fit the report: its "
            f"{steps * height * width} visual tokens form a grid of {width}x{height}. Is it the picture that the "
            "report was made with? If the model's processor crops or stretches pictures, pass it as processor "
            "(--model of the command)."
        )
    for step in _spread(steps, max_frames):
        label = f"image {number}" if isinstance(visual, Image.Image) else f"frame {step * per_step + 1}"
        label = label if is_one_of_several or steps > 1 else ""
        rows.append(Row(frames[step * per_step], sample, first + step * height * width, height, width, label))
    return rows


def _frames(visual: Visual) -> list[Image.Image]:
    return [visual] if isinstance(visual, Image.Image) else list(visual)


def _n_frames(visual: Visual) -> int:
    return len(_frames(visual))


def _spread(steps: int, limit: int) -> list[int]:
    shown = min(steps, max(1, limit))
    return sorted({round(index * (steps - 1) / max(shown - 1, 1)) for index in range(shown)})


def _panels(row: Row) -> list[Panel]:
    """The original, then one panel per target layer at which the sample changes."""
    size = row.height * row.width
    before = np.full(row.sample.n_visual, KEPT, dtype=np.uint8)
    cells = [Panel("original", f"{size} visual tokens", shade(row.image, row.arranged(before)))]
    unchanged: list[list[StageReport]] = [[]]  # behind each panel
    for stage, states in zip(row.sample.stages, token_states(row.sample), strict=True):
        if np.array_equal(states, before):
            unchanged[-1].append(stage)
            continue
        part, before = row.arranged(states), states
        cells.append(Panel(_name(stage), _counts(part), shade(row.image, part)))
        unchanged.append([])
    return [cell._replace(counts=cell.counts + _unchanged(own)) for cell, own in zip(cells, unchanged, strict=True)]


def _name(stage: StageReport) -> str:
    return f"layer {stage.layer}" if stage.layer >= 0 else "before the decoder"


def _unchanged(stages: Sequence[StageReport]) -> str:
    """Target layers at which a panel stays as it is, and why at the first of them."""
    if not stages:
        return ""
    last = f" to {stages[-1].layer}" if len(stages) > 1 else ""
    reason = f": {stages[0].skipped_because}" if stages[0].skipped_because else ""
    return f"; {_name(stages[0])}{last} unchanged{reason}"


def _counts(part: np.ndarray) -> str:
    counts = f"{int((part == KEPT).sum())} kept"
    if recycled := int((part == RECYCLED).sum()):
        counts += f", {recycled} recycled"
    return f"{counts} of {part.size}"
