"""The server of the page: on this machine alone unless told otherwise, and nothing of it from elsewhere."""

from __future__ import annotations

from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .question import MAX_BYTES

# What the browser may load: from this server alone. gradio's own scripts and styles are inline in part.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'; "
    "base-uri 'self'; form-action 'self'"
)
_CSS = """
.numbers { border-collapse: collapse; width: 100%; font-size: 0.9em; }
.numbers tr, .numbers th, .numbers td { border: 0 !important; }
.numbers th, .numbers td { padding: 2px 12px 2px 0 !important; text-align: left; vertical-align: top; }
.numbers th { font-weight: 600; white-space: nowrap; }
.legend span { margin-right: 1.5em; }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: 0.4em; border: 1px solid #6b7280; }
.problem { border-left: 4px solid #b91c1c; padding: 4px 10px; }
"""
# gradio's sliders tell of a pointer that is lifted, not of keys and of numbers that are typed.
_SCRIPT = """
() => document.addEventListener("change", (event) => {
    const slider = event.target.closest("#keep");
    if (slider !== null) {
        const range = slider.querySelector("input[type=range]");
        range.dispatchEvent(new PointerEvent("pointerup", {bubbles: true}));
    }
})
"""


class _Headers:
    """Middleware that adds the policy to every answer of the server."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def start(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serve a page from a thread of its own, without share links, analytics and files from other hosts.

    Parameters
    ----------
    page : gradio.Blocks
    host : str
        Address to listen at.
    port : int, optional
        The first free one from 7860 on where omitted.

    Returns
    -------
    str
        Address of the page.

    Raises
    ------
    OSError
        If the port is taken, or the host is none of this machine.
    """
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_BYTES,
            footer_links=[],
            theme=gr.themes.Default(**fonts),
            css=_CSS,
            js=_SCRIPT,
            app_kwargs={"middleware": [Middleware(_Headers)]},
        )
    except OSError as error:
        wanted = "7860 to 7959" if port is None else str(port)
        raise OSError(
            f"the page cannot be served at {host}, port {wanted}: taken, or no address of this machine. Name another "
            "--port or --host."
        ) from error
    return str(address)
