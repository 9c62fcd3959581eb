"""Load on vLLM's own server, dense and with the plugin, on one device, with random weights of a published shape.

``python -m benchmark.bench_vllm_load`` starts vLLM's OpenAI server once without the plugin's options and once with
them, and lets 1, 8 and 32 clients ask it, each one streamed request after the other with a new picture. Rows are
appended to ``results/vllm_load.csv`` as soon as they are measured: requests and new tokens a second, time until the
first token, prompt tokens as ``usage`` counts them, and, in a time of its own, what the choice of tokens takes inside
the engine. ``--frames 8`` asks about videos, beside which ``--own-rates`` sets vLLM's own pruning of videos.
``--shape tiny`` tries it out on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmark.commands import command_of
from benchmark.timed import RESULTS
from benchmark.vllm_clients import N_LETTERS, Load, Request, load
from benchmark.vllm_server import Server, takes_request_options
from benchmark.vllm_setup import (
    Setting,
    model_config,
    n_kept,
    origin_columns,
    percentiles,
    pruning_settings,
    setting_columns,
)
from sparsevlm.bench.checkpoint import write_checkpoint_files
from sparsevlm.bench.rows import Row, append_rows, cell, check_columns
from sparsevlm.bench.shapes import shape_label
from sparsevlm.selection.selectors import DEFAULT

COLUMNS = (
    *("case", "provider", "selector", "keep", "clients", "frames", "n_visual", "n_kept", "n_text", "new_tokens"),
    *("phase", "metric", "p50", "p20", "p80", "p99", "n", "model", "dtype", "gpu", "torch", "triton", "transformers"),
    *("vllm", "commit", "command", "timestamp", "note"),
)
OWN = "vllm-video-pruning"
_START = 100.0  # seconds that a server of the 7b shape takes to be ready
_MOST_OF_A_START = 300.0


@dataclass(frozen=True)
class Engine:
    """A server to start, and what its requests ask for.

    Attributes
    ----------
    options : tuple of str
        Of its command line.
    settings : tuple of (dict or None)
    rate : float, optional
        Of vLLM's own pruning of videos.
    """

    options: tuple[str, ...]
    settings: tuple[Setting, ...]
    rate: float | None = None

    def columns(self, setting: Setting) -> Row:
        """Columns that name a setting."""
        columns = setting_columns(setting)
        return columns if self.rate is None else {**columns, "provider": OWN, "keep": cell(1 - self.rate)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and appends the rows one by one."""
    given = parse(arguments)
    check_columns(given.append_to, COLUMNS)
    command = command_of("bench_vllm_load", sys.argv[1:] if arguments is None else arguments)
    origin = origin_columns(shape_label(given.shape), command)  # its time is that of all rows of a run
    print(f"about {estimate(given) / 60:.1f} minutes, {given.minutes:g} at most", flush=True)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_checkpoint_files(model_config(given.shape), folder)
        n_text = text_tokens(folder, request_of(given))
        for engine in engines(given):
            for found in measured(given, engine, folder, n_text, end):
                row = {**dict.fromkeys(COLUMNS, ""), **found, **origin}
                append_rows(given.append_to, [row])
                shown = ("case", "provider", "selector", "keep", "phase", "metric", "p50", "p99", "n", "note")
                print(*(row[name] or "-" for name in shown), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    name = "python -m benchmark.bench_vllm_load"
    parser = argparse.ArgumentParser(prog=name, description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", default="7b", help="7b, 3b, or tiny to try the script out")
    parser.add_argument("--selectors", default=f"{DEFAULT},mmtok")
    parser.add_argument("--keep", default="0.5,0.25", help="fractions")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--visual", type=int, default=1024, help="visual tokens of a picture, or of two frames")
    parser.add_argument("--frames", type=int, default=1, help="of a video, an even number; 1: pictures")
    parser.add_argument("--own-rates", default="", help="of vLLM's own pruning of videos, on a GPU; a server each")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="that are counted, of each number of clients")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds before these")
    parser.add_argument("--choice-seconds", type=float, default=3.0, help="in which the choice is timed; 0: not at all")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing more is begun")
    parser.add_argument("--server", default="", help="more options of vLLM's server, as one string")
    parser.add_argument("--append-to", type=Path, default=RESULTS / "vllm_load.csv")
    given = parser.parse_args(arguments)
    if given.frames != 1 and given.frames % 2:
        parser.error(f"--frames {given.frames}: two frames share their tokens, so give 1 or an even number")
    if given.own_rates and given.frames == 1:
        parser.error("--own-rates is for videos: give --frames as well")
    return given


def request_of(given: argparse.Namespace) -> Request:
    """What all requests share."""
    side = round(given.visual**0.5)
    return Request(side, given.visual // side, given.frames, given.new_tokens)


def visual_tokens(request: Request) -> int:
    """Visual tokens of a request, before any is dropped."""
    return request.rows * request.columns * max(1, request.frames // 2)


def text_tokens(folder: Path, request: Request) -> int:
    """All tokens of a prompt but the visual ones."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = "image" if request.frames == 1 else "video"
    content = [{"type": "text", "text": "x" * N_LETTERS}, {"type": kind}]
    messages = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(prompt).input_ids) - 1


def engines(given: argparse.Namespace) -> Iterator[Engine]:
    """Servers to start one after the other."""
    n_visual = visual_tokens(request_of(given))
    visual = {"image": int(given.frames == 1), "video": int(given.frames > 1)}
    shared = ["--limit-mm-per-prompt", json.dumps(visual), "--max-model-len", str(max(8192, 2 * n_visual))]
    shared += ["--gpu-memory-utilization", "0.85"] if torch.cuda.is_available() else []
    shared += shlex.split(given.server)
    yield Engine(tuple(shared), (None,))
    pruning = ["--hf-overrides", json.dumps({"sparsevlm": {}}), *takes_request_options()]
    yield Engine((*shared, *pruning), tuple(pruning_settings(given.keep, given.selectors)))
    for rate in filter(None, given.own_rates.split(",")):
        yield Engine((*shared, "--video-pruning-rate", rate), (None,), float(rate))


def estimate(given: argparse.Namespace) -> float:
    """Seconds that all takes on an H100."""
    n_clients = len(given.clients.split(","))
    n_own = len(list(filter(None, given.own_rates.split(","))))
    settings = pruning_settings(given.keep, given.selectors)
    loads = n_clients * (1 + len(settings) + n_own) * (given.warmup + given.seconds)
    return (2 + n_own) * _START + loads + n_clients * (len(settings) - 1) * given.choice_seconds


def measured(given: argparse.Namespace, engine: Engine, folder: Path, n_text: int, end: float) -> Iterator[Row]:
    """Rows of one server; what fails, or is not reached before the end, has a note in the place of figures."""
    request, numbers = request_of(given), itertools.count()
    phases = [(setting, int(n)) for setting in engine.settings for n in given.clients.split(",")]
    failure = ""
    with tempfile.TemporaryDirectory() as place:
        server = Server(folder, Path(place), engine.options, min(_MOST_OF_A_START, end - time.monotonic()))
        try:
            with server:
                while phases and time.monotonic() < end:
                    yield from _phase(given, engine, server, request, *phases[0], n_text, numbers)
                    del phases[0]
        except RuntimeError as error:  # of the start
            failure = str(error)
    for setting, clients in phases:
        columns = columns_of(engine, setting, clients, request, n_text)
        yield _note(columns, failure or f"not reached in {given.minutes:g} minutes")


def _phase(
    given: argparse.Namespace, engine: Engine, server: Server, request: Request, setting: Setting, clients: int,
    n_text: int, numbers: itertools.count[int],
) -> Iterator[Row]:  # fmt: skip
    columns = columns_of(engine, setting, clients, request, n_text)
    asked = (server.address, request, setting, numbers, clients)
    try:
        yield from load_rows(columns, load(*asked, given.warmup, given.seconds))
        if setting is not None and setting["keep"] < 1 and given.choice_seconds:
            with server.timed_choices():
                found = load(*asked, 0.0, given.choice_seconds)
            yield from choice_rows(columns, server.choices(), found.seconds)
    except RuntimeError as error:
        server.show_log()
        yield _note(columns, f"failed: {error}"[:200])


def columns_of(engine: Engine, setting: Setting, clients: int, request: Request, n_text: int) -> Row:
    """Columns that all rows of a measurement share."""
    n_visual = visual_tokens(request)
    what = "" if request.frames == 1 else f", {request.frames} frames"
    return {
        "case": f"{clients} clients, {n_visual} visual{what}", **engine.columns(setting), "clients": str(clients),
        "frames": str(request.frames), "n_visual": str(n_visual),
        "n_kept": str(n_kept(n_visual, setting)) if engine.rate is None else "", "n_text": str(n_text),
        "new_tokens": str(request.new_tokens),
    }  # fmt: skip


def load_rows(columns: Row, found: Load) -> list[Row]:
    """Rows of what clients have seen.

    Raises
    ------
    RuntimeError
        If prompts were not as long as they should have been, by the server's count.
    """
    if not found.total:
        return [_note(columns, f"no request was answered in {found.seconds:.0f} s")]
    prompts = set(found.prompt_tokens)
    if columns["n_kept"] and prompts != {int(columns["n_kept"]) + int(columns["n_text"])}:
        raise RuntimeError(
            f"prompts of {prompts} tokens, not of {columns['n_kept']} visual and {columns['n_text']} others"
        )
    n = str(len(found.total))
    rates = {"requests_per_s": found.rate, "new_tokens_per_s": found.rate * sum(found.new_tokens) / len(found.total)}
    rows = [{**columns, "phase": "load", "metric": name, "p50": cell(value), "n": n} for name, value in rates.items()]
    for phase, values in (("first_token", found.first_token), ("total", found.total)):
        rows.append({**columns, "phase": phase, "metric": "ms", **percentiles(values)})
    return [*rows, {**columns, "phase": "prompt", "metric": "tokens", **percentiles(found.prompt_tokens)}]


def choice_rows(columns: Row, choices: Sequence[tuple[float, int]], seconds: float) -> list[Row]:
    """Rows of what the choice has taken inside the engine: of each request, and its share of the time."""
    if not choices:
        return [_note({**columns, "phase": "choice_per_request"}, f"no choice was made in {seconds:.0f} s")]
    each = [milliseconds / n_images for milliseconds, n_images in choices for _ in range(n_images)]
    share = cell(sum(milliseconds for milliseconds, _ in choices) / 1e3 / seconds)
    return [
        {**columns, "phase": "choice_per_request", "metric": "ms", **percentiles(each)},
        {**columns, "phase": "choice", "metric": "share_of_time", "p50": share, "n": str(len(choices))},
    ]


def _note(columns: Row, note: str) -> Row:
    return {"phase": "load", "metric": "requests_per_s", **columns, "note": note}


if __name__ == "__main__":
    main()
