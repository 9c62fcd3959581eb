"""``sparsevlm serve``: an OpenAI-compatible server."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundled import BUNDLED
from .options import KEEP_HELP, Debug, Device, Selector, parse_keep, parse_layers
from .run import NOT_MEANINGFUL
from .terminal import progress, quiet_transformers, reports_errors

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")
_MEBIBYTE = 1 << 20
_LIMITS = "Limits"
_PRUNING = "Pruning, of requests that name none"


@reports_errors
def serve(
    *,
    model: Annotated[
        str, typer.Option("--model", help="Folder, hub id, or 'bundled' for the small model of this package.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Under which requests name the model.", show_default="as --model")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="SPARSEVLM_API_KEY",
            show_envvar=True,
            help="That requests must bring; others see it "
            "in the list of processes unless it is given by the environment.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, float16 or bfloat16.")] = "auto",
    device: Device = "auto",
    attn: Annotated[str, typer.Option("--attn", help="sdpa, eager or flash_attention_2.")] = "sdpa",
    warmup: Annotated[
        bool, typer.Option("--warmup", help="On a GPU: compile and record for images of all sizes before serving.")
    ] = False,
    keep: Annotated[
        str | None, typer.Option("--keep", help=KEEP_HELP, show_default="adaptive", rich_help_panel=_PRUNING)
    ] = None,
    selector: Selector = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="paper-192, paper-128 or paper-64.", rich_help_panel=_PRUNING)
    ] = None,
    target_layers: Annotated[
        str | None,
        typer.Option(
            "--target-layers", help="Such as 2,6,10.", show_default="every 4th from 2", rich_help_panel=_PRUNING
        ),
    ] = None,
    min_keep: Annotated[
        int, typer.Option("--min-keep", help="Never fewer visual tokens than this.", rich_help_panel=_PRUNING)
    ] = 32,
    min_keep_per_image: Annotated[
        int,
        typer.Option("--min-keep-per-image", help="Never fewer of each of several images.", rich_help_panel=_PRUNING),
    ] = 4,
    vision_keep: Annotated[
        float,
        typer.Option(
            "--vision-keep",
            help="Share of the visual tokens that the tower computes, on the engine.",
            rich_help_panel=_PRUNING,
        ),
    ] = 1.0,
    image_cache: Annotated[
        int, typer.Option("--image-cache", help="MiB of encoded images that the engine keeps; 0: none.")
    ] = 512,
    image_root: Annotated[
        Path | None, typer.Option("--image-root", help="Folder under which requests may name images.")
    ] = None,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch images of http(s) addresses of the public network.")
    ] = False,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Requests of one batch.", rich_help_panel=_LIMITS)] = 8,
    max_batch_tokens: Annotated[
        int, typer.Option("--max-batch-tokens", help="Prompt tokens of one batch.", rich_help_panel=_LIMITS)
    ] = 32768,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", help="Requests that wait; further ones get 429.", rich_help_panel=_LIMITS)
    ] = 64,
    batch_wait: Annotated[
        float,
        typer.Option(
            "--batch-wait", help="Seconds that a batch waits for requests being prepared.", rich_help_panel=_LIMITS
        ),
    ] = 0.05,
    max_body: Annotated[
        float, typer.Option("--max-body", help="MiB of a request's body.", rich_help_panel=_LIMITS)
    ] = 32,
    max_images: Annotated[int, typer.Option("--max-images", help="Images of a request.", rich_help_panel=_LIMITS)] = 16,
    max_image_bytes: Annotated[
        float, typer.Option("--max-image-bytes", help="MiB of an image's file.", rich_help_panel=_LIMITS)
    ] = 16,
    max_image_pixels: Annotated[
        int,
        typer.Option("--max-image-pixels", help="Of an image; four times that of a request.", rich_help_panel=_LIMITS),
    ] = 1 << 25,
    max_prompt_tokens: Annotated[
        int, typer.Option("--max-prompt-tokens", help="Of a request, visual ones included.", rich_help_panel=_LIMITS)
    ] = 8192,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Of an answer.", rich_help_panel=_LIMITS)
    ] = 1024,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", help="Seconds of a request in all.", rich_help_panel=_LIMITS)
    ] = 300.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option("--shutdown-timeout", help="Seconds that requests have after SIGTERM.", rich_help_panel=_LIMITS),
    ] = 30.0,
    debug: Debug = False,
) -> None:
    """Serve a model with pruned visual tokens, by the protocol of OpenAI's chat completions."""
    if missing := [one for one in _NEEDS if find_spec(one) is None]:
        raise ImportError(
            f'the server needs {", ".join(missing)}, which the extra server brings: run `pip install ".[server]"` in '
            'the source tree, or `pip install "WHEEL[server]"` with the path of a wheel built from it.'
        )
    from ..server.memory import bound_memory

    bound_memory()  # before torch is imported
    from ..config import SparseVLMConfig
    from ..server import ServerSettings

    settings = ServerSettings(
        name or model, host, port, api_key, allow_remote_images, image_root, int(max_body * _MEBIBYTE), max_images,
        int(max_image_bytes * _MEBIBYTE), max_image_pixels, max_prompt_tokens, max_new_tokens, max_batch,
        max_batch_tokens, max_waiting, batch_wait, request_timeout, shutdown_timeout, image_cache * _MEBIBYTE,
    )  # fmt: skip
    config = SparseVLMConfig(
        keep=parse_keep(keep), selector=selector, preset=preset, target_layers=parse_layers(target_layers),
        min_keep=min_keep, min_keep_per_image=min_keep_per_image, vision_keep=vision_keep,
        image_cache=settings.image_cache,
    )  # fmt: skip
    state, processor = _load(model, dtype, device, attn, config)
    if model == BUNDLED:
        typer.echo(NOT_MEANINGFUL, err=True)
    if warmup:
        with progress("warming up"):
            state.warmup(max_new_tokens=max_new_tokens)
    from ..server.app import create_app
    from ..server.logs import log_json
    from ..server.run import serve as run

    log_json(logging.DEBUG if debug else logging.INFO)
    run(create_app(state, processor, settings))


def _load(model: str, dtype: str, device: str, attn: str, config: Any) -> tuple[Any, Any]:
    """The pruned model and its processor."""
    with progress(f"loading {model}"):
        from .. import apply_sparsevlm
        from ..inputs import load_model, load_processor

        quiet_transformers()
        loaded = load_model(model, dtype=dtype, device=device, attn_implementation=attn)
        processor = load_processor(model)
        return apply_sparsevlm(loaded, config=config, processor=processor), processor
