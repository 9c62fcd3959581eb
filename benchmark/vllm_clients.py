"""Clients of vLLM's server that each ask one request after the other, always with a new picture or video.

A request is timed by vLLM's own ``vllm.benchmarks``, whose ``vllm bench serve`` sends a fixed number of requests and
stores nothing of a run that is cut off; here it is the time that is fixed.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from benchmark.vllm_server import NAME
from benchmark.vllm_setup import SIDE, Setting

N_LETTERS = 40  # of a question, each a token
_COARSE = 14  # pixels of a picture for one that is drawn
_QUALITY = 90
_MOST_OF_THE_FIRST = 60.0  # seconds
Content = tuple[str, dict[str, Any]]  # a question, and the picture or video that it is about
_Answered = tuple[float, float, Any]  # since when a client was free to ask, when it had the answer, and that


@dataclass(frozen=True)
class Request:
    """What all requests of a measurement share.

    Attributes
    ----------
    rows, columns : int
        Of a picture, in visual tokens.
    frames : int
        Of a video; one: a picture.
    new_tokens : int
    """

    rows: int
    columns: int
    frames: int
    new_tokens: int

    def content(self, number: int) -> Content:
        """A question and what it is about, both drawn by the number of the request.

        Pictures are smooth noise, whose JPEG is about as large as a photo's.
        """
        generator = np.random.default_rng(number)
        shape = (self.frames, self.rows * SIDE // _COARSE, self.columns * SIDE // _COARSE, 3)
        written = [_jpeg(one) for one in generator.integers(0, 256, shape, dtype=np.uint8)]
        kind = "image" if self.frames == 1 else "video"
        url = f"data:{kind}/jpeg;base64,{','.join(written)}"
        question = bytes(generator.integers(ord("a"), ord("z") + 1, N_LETTERS, dtype=np.uint8)).decode()
        return question, {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


@dataclass(frozen=True)
class Load:
    """What clients have seen in a time.

    Attributes
    ----------
    seconds : float
    rate : float
        Requests a second: those that a client has had answered by the time that they took it, summed over the clients.
        Counted by the clock they would come in waves, as clients that begin together go on together.
    first_token, total : list of float
        Milliseconds of the requests that were answered in it.
    prompt_tokens, new_tokens : list of int
        Of these, as the server's ``usage`` says.
    """

    seconds: float
    rate: float
    first_token: list[float]
    total: list[float]
    prompt_tokens: list[int]
    new_tokens: list[int]


def load(
    address: str, request: Request, setting: Setting, numbers: itertools.count[int], clients: int, warmup: float,
    seconds: float,
) -> Load:  # fmt: skip
    """Ask a server for a time, and leave what is not answered by then.

    Parameters
    ----------
    address : str
    request : Request
    setting : dict, optional
        Options of the plugin.
    numbers : iterator of int
        Of requests, each of which is made once.
    clients : int
    warmup, seconds : float
        Requests that are answered in the first are not counted, nor is one before it. Without a warm-up there is none.

    Raises
    ------
    RuntimeError
        If a request fails.
    """
    return asyncio.run(_load(address, request, setting, numbers, clients, warmup, seconds))


async def _load(
    address: str, request: Request, setting: Setting, numbers: itertools.count[int], clients: int, warmup: float,
    seconds: float,
) -> Load:  # fmt: skip
    import aiohttp

    answers: list[list[_Answered]] = [[] for _ in range(clients)]
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
        ask = _asking(session, address, request, setting)
        if warmup:
            await _first_answer(ask, request.content(next(numbers)))
        begin = time.perf_counter() + warmup
        tasks = [asyncio.create_task(_client(ask, request, numbers, one)) for one in answers]
        failed, _ = await asyncio.wait(tasks, timeout=warmup + seconds, return_when=asyncio.FIRST_EXCEPTION)
        end = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in failed:
        task.result()
    of_clients = [[one for one in answered if begin <= one[1] <= end] for answered in answers]
    counted = [answer for of_client in of_clients for _, _, answer in of_client]
    return Load(
        end - begin,
        sum(len(one) / sum(until - since for since, until, _ in one) for one in of_clients if one),
        [1e3 * one.ttft for one in counted],
        [1e3 * one.latency for one in counted],
        [one.prompt_len for one in counted],
        [one.output_tokens for one in counted],
    )


def _asking(session: Any, address: str, request: Request, setting: Setting) -> Callable[[Content], Awaitable[Any]]:
    """Asks one request, by vLLM's own function.

    Raises
    ------
    RuntimeError
        If it fails.
    """
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_chat_completions

    options: dict[str, Any] = {"temperature": 0.0}
    if setting is not None:
        options["mm_processor_kwargs"] = {"sparsevlm": setting}

    async def ask(content: Content) -> Any:
        question, visual = content
        asked = RequestFuncInput(
            prompt=question, multi_modal_content=visual, api_url=f"{address}/v1/chat/completions", prompt_len=0,
            output_len=request.new_tokens, model=NAME, ignore_eos=True, extra_body=options,
        )  # fmt: skip
        answer = await async_request_openai_chat_completions(asked, session)
        if not answer.success:
            raise RuntimeError(f"a request failed: {answer.error.strip().splitlines()[-1]}")
        return answer

    return ask


async def _first_answer(ask: Callable[[Content], Awaitable[Any]], content: Content) -> None:
    """Kernels are compiled in it, which may take longer than a warm-up."""
    try:
        await asyncio.wait_for(ask(content), _MOST_OF_THE_FIRST)
    except asyncio.TimeoutError:
        raise RuntimeError(f"the first request was not answered in {_MOST_OF_THE_FIRST:.0f} s") from None


async def _client(
    ask: Callable[[Content], Awaitable[Any]], request: Request, numbers: itertools.count[int],
    answers: list[_Answered],
) -> None:  # fmt: skip
    """Asks without end; the next request is drawn while one is answered."""
    following = asyncio.create_task(asyncio.to_thread(request.content, next(numbers)))
    until = time.perf_counter()
    while True:
        content = await following
        following = asyncio.create_task(asyncio.to_thread(request.content, next(numbers)))
        answer = await ask(content)
        since, until = until, time.perf_counter()
        answers.append((since, until, answer))


def _jpeg(coarse: Any) -> str:
    height, width = (_COARSE * side for side in coarse.shape[:2])
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
