"""``sparsevlm run``: any checkpoint, any picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundled import BUNDLED
from .busy import BusyWatch
from .options import KEEP_HELP, Debug, Device, Dtype, Selector, dtype_of, parse_keep, parse_layers, prepare_file
from .terminal import progress, quiet_transformers, reports_errors
from .visuals import Frame, Images, Video, check_not_overwritten, read_visuals

NOT_MEANINGFUL = (
    "The bundled model knows nothing but the generated scenes of `sparsevlm demo`: "
    "on any other picture its answer is not meaningful, only the pruning is."
)


@reports_errors
def run(
    *,
    model: Annotated[
        str, typer.Option("--model", help="Folder, hub id, 'bundled' for the small model of this package, or 'smol'.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="Question or instruction.")],
    image: Images = None,
    frame: Frame = None,
    video: Video = None,
    fps: Annotated[float, typer.Option("--fps", help="Frames per second of the video.", min=0.01)] = 2.0,
    keep: Annotated[str | None, typer.Option("--keep", help=KEEP_HELP, show_default="adaptive")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="paper-192, paper-128 or paper-64; with the paper's selector.")
    ] = None,
    target_layers: Annotated[
        str | None, typer.Option("--target-layers", help="Such as 2,6,10.", show_default="every 4th from 2")
    ] = None,
    min_keep: Annotated[int, typer.Option("--min-keep", help="Never fewer visual tokens than this.")] = 32,
    min_keep_per_image: Annotated[
        int, typer.Option("--min-keep-per-image", help="Never fewer of each of several images than this.")
    ] = 4,
    tau: Annotated[float, typer.Option("--tau", help="Share of the dropped tokens that is recycled.")] = 0.5,
    theta: Annotated[float, typer.Option("--theta", help="Clusters per recycled token.")] = 0.5,
    selector: Selector = None,
    turns: Annotated[
        str, typer.Option("--turns", help="For questions that follow: first, refresh, or agnostic (question-free).")
    ] = "first",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    dtype: Dtype = None,
    device: Device = "auto",
    attn: Annotated[str, typer.Option("--attn", help="sdpa, eager or flash_attention_2.")] = "sdpa",
    compare: Annotated[bool, typer.Option("--compare", help="Answer without pruning as well.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report to this JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw what was kept into this PNG.")] = None,
    debug: Debug = False,
) -> None:
    """Answer a question about pictures with pruned visual tokens."""
    if bool(image) == (video is not None):
        raise ValueError("give either --image FILE (once per image) or --video FOLDER.")
    busy = BusyWatch()
    from ..config import SparseVLMConfig

    config = SparseVLMConfig(
        target_layers=parse_layers(target_layers),
        min_keep=min_keep,
        min_keep_per_image=min_keep_per_image,
        tau=tau,
        theta=theta,
        keep=parse_keep(keep),
        selector=selector,
        preset=preset,
        turns=turns,
    )
    report, picture = prepare_file(report, ".json"), prepare_file(picture, ".png")
    check_not_overwritten(picture, "--picture", [*(image or ()), video])
    images, frames = read_visuals(image, video, frame)
    loaded, processor = _load(model, dtype, device, attn)
    from ..inputs import identified
    from .asking import build_inputs

    inputs = build_inputs(processor, prompt, images=images, frames=frames, fps=fps)
    answers, found = _answers(loaded, processor, inputs, config, max_new_tokens=max_new_tokens, compare=compare)
    visuals = [*images, *([frames] if frames else [])]
    found = found.of_pictures(identified(visuals))
    busy.warn(str(loaded.device))
    if model == BUNDLED:
        typer.echo(NOT_MEANINGFUL, err=True)
    typer.echo(f"model {model}, device {loaded.device}, dtype {str(loaded.dtype).removeprefix('torch.')}")
    for name, answer in answers.items():
        typer.echo(f"{name} ({answer.total_ms:.0f} ms, {answer.n_tokens} tokens): {answer.text}")
    typer.echo(f"\n{found}")
    if report is not None:
        found.to_json(report)
        typer.echo(f"wrote {report}")
    if picture is not None:
        _draw(found, visuals, prompt, answers, picture, processor)
        typer.echo(f"wrote {picture}")


def _load(model: str, dtype: str | None, device: str, attn: str) -> tuple[Any, Any]:
    with progress(f"loading {model}"):
        from ..inputs import load_model, load_processor, pick_device

        quiet_transformers()
        dtype = dtype_of(model, pick_device(device), dtype)
        loaded = load_model(model, dtype=dtype, device=device, attn_implementation=attn)
        return loaded, load_processor(model)


def _answers(
    model: Any, processor: Any, inputs: Any, config: Any, *, max_new_tokens: int, compare: bool
) -> tuple[dict[str, Any], Any]:
    """The answers by name, and the report of the pruned request."""
    from .. import apply_sparsevlm
    from .asking import ask

    answers = {}
    # Applied before anything runs, so that a budget or a layer that cannot be is refused at once.
    with apply_sparsevlm(model, config=config, processor=processor) as state:
        if compare:
            with progress("warming up"):
                ask(model, processor, inputs, 1)
        with progress("generating, pruned", max_new_tokens) as advance:
            sparse = ask(model, processor, inputs, max_new_tokens, advance)
        found = state.report
    if compare:
        with progress("generating, dense", max_new_tokens) as advance:
            answers["dense"] = ask(model, processor, inputs, max_new_tokens, advance)
    return {**answers, "pruned": sparse}, found


def _draw(found: Any, visuals: list[Any], prompt: str, answers: dict[str, Any], picture: Path, processor: Any) -> None:
    from ..visualization import draw_report, save_picture

    said = "\n".join(f"{name}: {answer.text}" for name, answer in answers.items())
    save_picture(draw_report(found, visuals, title=f"{prompt}\n{said}", processor=processor), picture)
