"""Images and videos that options name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="Image file; may be given several times.", show_default=False),
]
Video = Annotated[
    str | None,
    typer.Option(
        "--video",
        metavar="FOLDER|FILE",
        help="Folder with one picture per frame, or an animated GIF, WebP or PNG, or a TIFF of several pages.",
        show_default=False,
    ),
]
Frame = Annotated[
    int | None,
    typer.Option(
        "--frame",
        help="Which frame or page of the --image files, from 0.",
        min=0,
        show_default="the first, and a warning",
    ),
]


def read_visuals(images: Sequence[str] | None, video: str | None, frame: int | None) -> tuple[list[Any], list[Any]]:
    """Decode what ``--image``, ``--video`` and ``--frame`` name.

    Returns
    -------
    images, frames : list of PIL images

    Raises
    ------
    ValueError
        If ``--frame`` comes with a video, an image has sides that no model takes, or as the loaders.
    FileNotFoundError, PermissionError
        As the loaders.
    """
    from ..inputs.media import check_aspect_ratio, load_frames, load_image
    from ..inputs.sources import shortened

    if frame is not None and video is not None:
        raise ValueError("--frame picks a frame of an --image file; --video takes all frames.")
    found = []
    for source in images or ():
        found.append(load_image(source, frame=frame))
        check_aspect_ratio(found[-1].size, shortened(source))
    frames = load_frames(video) if video is not None else []
    if frames and video is not None:
        check_aspect_ratio(frames[0].size, shortened(video))
    return found, frames


def check_not_overwritten(out: Path | None, option: str, sources: Sequence[str | None]) -> None:
    """Raise ``ValueError`` where a file to be written is an image that is read, or would be a frame of the video.

    Raises
    ------
    ValueError
        Then, and if a source is an address on the network.
    """
    from ..inputs.sources import resolve

    for source in map(resolve, filter(None, sources)):
        if out is None or isinstance(source, bytes) or not os.path.exists(source):
            continue
        if os.path.samefile(source, out.parent if os.path.isdir(source) or not out.exists() else out):
            raise ValueError(f"{option} {out} would overwrite what is read, {source}; name another file.")
