"""``sparsevlm visualize``: a picture from a saved report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, prepare_file
from .terminal import reports_errors, show_warning
from .visuals import Frame, Images, Video, check_not_overwritten, read_visuals


@reports_errors
def visualize(
    *,
    report: Annotated[Path, typer.Argument(help="Report that --report (or the demo) wrote.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="PNG to write.", show_default=False)],
    image: Images = None,
    frame: Frame = None,
    video: Video = None,
    sample: Annotated[int, typer.Option("--sample", help="Which sample of the batch, from 0.")] = 0,
    title: Annotated[str, typer.Option("--title", help="Text above the picture, with what ran beneath it.")] = "",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Folder or hub id of the report's model, where its processor crops or stretches pictures."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw from a saved report which patches were kept, recycled and dropped."""
    if not image and video is None:
        raise ValueError("give the pictures of the request: --image FILE (once per image) or --video FOLDER.")
    out = prepare_file(out, ".png") or out
    check_not_overwritten(out, "--out", [*(image or ()), video])
    from ..inputs import load_processor
    from ..inputs.decoding import check_is_file
    from ..report import Report
    from ..visualization import draw_report, save_picture

    images, frames = read_visuals(image, video, frame)
    visuals: list[Any] = [*images, *([frames] if frames else [])]
    check_is_file(report, f"report {report}", noun="a report", wanted="the JSON file that --report wrote")
    processor = None if model is None else load_processor(model)
    found = Report.from_json(report)
    save_picture(draw_report(found, visuals, sample=sample, title=title, processor=processor), out)
    if not found.samples[sample].pictures:
        show_warning(
            f"{report} does not say of which pictures it is, so that any of their size would have been drawn on. "
            "Reports of sparsevlm run and demo do; in Python record it before it is written: "
            "report.of_pictures(sparsevlm.inputs.identified([image])).to_json(path), with sample= for others than the "
            "first of a batch."
        )
    typer.echo(f"wrote {out}")
