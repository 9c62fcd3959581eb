"""``sparsevlm explore``: the page in the browser."""

from __future__ import annotations

import logging
import webbrowser
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from ..bundled import BUNDLED
from .options import Debug, Device, Dtype, dtype_of
from .run import NOT_MEANINGFUL
from .terminal import progress, quiet_transformers, reports_errors

logger = logging.getLogger(__name__)
_HERE = ("127.0.0.1", "localhost", "::1")
_EXAMPLE = 8  # seed of the scene that is there at the start


@reports_errors
def explore(
    *,
    model: Annotated[
        str, typer.Option("--model", help="Folder, hub id, or 'bundled' for the small model of this package.")
    ] = BUNDLED,
    dtype: Dtype = None,
    device: Device = "auto",
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen at; 0.0.0.0: whoever reaches this machine may use the model."),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option("--port", help="Port to listen at.", min=1, max=65535, show_default="the first free from 7860"),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    warmup: Annotated[
        bool,
        typer.Option("--warmup/--no-warmup", help="On a GPU, record what requests need ahead, for up to a minute."),
    ] = True,
    debug: Debug = False,
) -> None:
    """Serve a page: a picture, a question, the dense and the pruned answers side by side with their patches."""
    if find_spec("gradio") is None:
        raise ImportError(
            'the page needs gradio, which the extra explore brings: run `pip install ".[explore]"` in the source tree, '
            'or `pip install "WHEEL[explore]"` with the path of a wheel built from it.'
        )
    answerer = _answerer(model, dtype, device, wants_warmup=warmup)
    from ..explore.page import build_page
    from ..explore.question import Question
    from ..explore.serve import start
    from ..scenes import draw_scene

    scene = draw_scene(_EXAMPLE)
    with progress("asking once, so that no time is that of a first call"):
        answerer.warm_up(Question(scene.image, scene.questions[0].text, 2))
    page = build_page(answerer, scene, NOT_MEANINGFUL if model == BUNDLED else "")
    address = start(page, host, port)
    typer.echo(f"the page is at {address} (Ctrl-C ends it)")
    if host not in _HERE:
        typer.echo("whoever reaches this address may use the model; there is no password.", err=True)
    if browser:
        webbrowser.open(address)
    page.block_thread()


def _answerer(model: str, dtype: str | None, device: str, *, wants_warmup: bool) -> Any:
    with progress(f"loading {model}"):
        from .. import apply_sparsevlm
        from ..explore.answers import Answerer
        from ..inputs import load_model, load_processor, pick_device

        quiet_transformers()
        target = pick_device(device)
        loaded = load_model(model, dtype=dtype_of(model, target, dtype), device=target)
        processor = load_processor(model)
        state = apply_sparsevlm(loaded, processor=processor)
    if wants_warmup and target != "cpu":
        with progress("warming up"):
            try:
                state.warmup()
            except NotImplementedError as error:
                logger.warning("sparsevlm: no warm-up: %s", error)
    return Answerer(loaded, processor, state)
