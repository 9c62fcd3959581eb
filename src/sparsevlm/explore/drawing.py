"""The patches of a picture as a decoder layer leaves them, and what is said about an answer beside them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ..report_sample import SampleReport, StageReport
from ..visualization.overlay import DROPPED, KEPT, LEGEND, RECYCLED, rows_of, shade, token_states
from .answers import ANSWERING, DONE, FAILED, STOPPED, WAITING, Answer

_GAP = 8  # pixels between the views of a picture
_STATES = {
    WAITING: "waiting for its turn",
    ANSWERING: "answering …",
    DONE: "",
    STOPPED: "stopped: this is as far as it came",
}


def patches_behind(sample: SampleReport, layer: int) -> tuple[StageReport | None, np.ndarray]:
    """The last target layer up to one, and the state of every visual token behind it, (n_visual,) uint8."""
    stage, states = None, np.full(sample.n_visual, KEPT, dtype=np.uint8)
    for reached, left in zip(sample.stages, token_states(sample), strict=True):
        if reached.layer > layer:
            break
        stage, states = reached, left
    return stage, states


def draw_patches(
    picture: Image.Image, answer: Answer, layer: int, processor: Any = None
) -> tuple[Image.Image | None, str]:
    """Draw which patches are left behind a decoder layer; views of a picture in tiles stand one below the other.

    Parameters
    ----------
    picture : PIL image
    answer : Answer
    layer : int
        -1: before the decoder.
    processor : ProcessorMixin, optional
        Where it crops, fills up or stretches pictures, what the model saw is drawn.

    Returns
    -------
    drawing : PIL image, optional
        ``None`` where there is nothing to draw, or the picture does not fit the report.
    caption : str
    """
    if answer.report is None or not answer.report.samples:
        return None, ""
    sample = answer.report.samples[0]
    stage, states = patches_behind(sample, layer)
    try:
        rows = rows_of(sample, [picture], processor=processor)
    except ValueError as error:
        return None, f"{_counted(layer, stage, states)} The patches cannot be drawn: {error}"
    drawn = [Image.fromarray(shade(row.image, row.arranged(states))) for row in rows]
    return _stacked(drawn), _counted(layer, stage, states)


def numbers(answer: Answer) -> str:
    """HTML of what an answer took: tokens, bytes, times, path; or why there is none."""
    if answer.state == FAILED:
        return f'<p class="problem" role="alert">{escape(answer.message)}</p>'
    rows = []
    if answer.report is not None and answer.report.samples:
        rows += _of_report(answer)
    rows.append(("first token", _milliseconds(answer.first_token_ms)))
    rows.append(("whole answer", f"{_milliseconds(answer.total_ms)}, {answer.n_tokens} tokens"))
    if answer.report is not None:
        rows.append(("path", f"{answer.report.path}: {answer.report.path_reason}"))
    cells = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    notes = [_STATES[answer.state], *(_notes(answer) if answer.report is not None else [])]
    remarks = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return f"<table class='numbers'>{cells}</table>{remarks}"


def legend() -> str:
    """HTML of what the colours mean."""
    entries = [f"<span><i style='background:{colour}'></i>{escape(text)}</span>" for colour, text in LEGEND]
    return f"<p class='legend'>{''.join(entries)}</p>"


def _of_report(answer: Answer) -> list[tuple[str, str]]:
    report = answer.report
    assert report is not None
    sample, kv = report.samples[0], report.kv_bytes
    return [
        ("visual tokens in", f"{sample.n_visual}"),
        ("kept", f"{sample.average_in:.1f} averaged over the layers, {sample.final_tokens} at the end"),
        ("KV cache", f"{kv.sparse / 1e6:.2f} of {kv.dense / 1e6:.2f} MB ({kv.sparse:,.0f} of {kv.dense:,.0f} bytes)"),
    ]


def _notes(answer: Answer) -> list[str]:
    report = answer.report
    assert report is not None
    skipped = [f"nothing was pruned: {report.skipped_because}"] if report.skipped_because else []
    clamped = [sample.budget_clamped for sample in report.samples if sample.budget_clamped]
    return [*skipped, *clamped, *(note for note in (report.kv_note, report.text_note) if note)]


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} ms"


def _counted(layer: int, stage: StageReport | None, states: np.ndarray) -> str:
    kept, recycled, dropped = (int((states == state).sum()) for state in (KEPT, RECYCLED, DROPPED))
    place = f"Behind layer {layer}" if layer >= 0 else "Before the decoder"
    reason = ""
    if stage is not None and stage.layer == layer and stage.skipped_because:
        reason = f" Nothing was dropped here: {stage.skipped_because}."
    return f"{place}: {kept} kept, {recycled} recycled, {dropped} dropped of {states.size}.{reason}"


def _stacked(drawings: Sequence[Image.Image]) -> Image.Image:
    """Drawings one below the other on white."""
    if len(drawings) == 1:
        return drawings[0]
    height = sum(drawing.height for drawing in drawings) + _GAP * (len(drawings) - 1)
    page, top = Image.new("RGB", (max(drawing.width for drawing in drawings), height), "white"), 0
    for drawing in drawings:
        page.paste(drawing, (0, top))
        top += drawing.height + _GAP
    return page
