"""Text as it grows, batches of prompts, and the queue."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import torch

from sparsevlm.inputs.turns import process, render_turn
from sparsevlm.scenes import draw_scene
from sparsevlm.server import ServerSettings
from sparsevlm.server.batching import Event, Queue, Ticket
from sparsevlm.server.exchange import Exchange
from sparsevlm.server.merging import merged
from sparsevlm.server.options import Pruning, Sampling, sampling_of
from sparsevlm.server.prompts import Prepared
from sparsevlm.server.protocol import ChatRequest, Chunks
from sparsevlm.server.text import Detokenizer, StopScanner


class ByteTokenizer:
    """A token is a byte, 256 is special; a text loses its first space, as in tokenizers of sentences."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(one for one in ids if one < 256).decode("utf-8", "replace").removeprefix(" ")


@pytest.mark.parametrize("text", ["plain words  with  spaces", "über naïve", "日本語", "a👍🏽b", "", " lead"])
def test_pieces_of_a_text_are_the_text(text):
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.push(token) for token in [*text.encode(), 256]] + [detokenizer.end()]
    assert "".join(pieces) == text.removeprefix(" ")
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_are_not_waited_for():
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.push(0x80) for _ in range(100)]
    assert len("".join(pieces)) >= 80
    cut = Detokenizer(ByteTokenizer())
    assert [cut.push(0xE6), cut.end()] == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("stops", "text", "out"),
    [
        (["END"], "abcENDdef", "abc"),
        (["END"], "abcEN", "abcEN"),
        (["b", "ab"], "xxab", "xx"),
        (["aab"], "aaab", "a"),
        (["zz", "c"], "abczz", "ab"),
        ([], "abc", "abc"),
        (["abc"], "abc", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_stop_text_ends_a_text(stops, text, out, size):
    scanner, said = StopScanner(stops), ""
    for start in range(0, len(text), size):
        said += scanner.push(text[start : start + size])
        assert out.startswith(said)
    assert said + scanner.end() == out
    assert scanner.found == (out != text)


def test_a_merged_batch_is_that_of_the_processor(loaded):
    _, processor = loaded
    prompts, images = [], []
    for text, scenes in (("Short.", [8]), ("A much longer question about it all.", [9, 10]), ("Some words.", [11])):
        content = [*({"type": "image"} for _ in scenes), {"type": "text", "text": text}]
        prompts.append(render_turn(processor, [{"role": "user", "content": content}]))
        images.append([draw_scene(scene).image for scene in scenes])
    whole = process(processor, prompts, images)
    parts = [process(processor, [prompt], [own]) for prompt, own in zip(prompts, images, strict=True)]
    batch = merged(parts, processor.tokenizer.pad_token_id)
    assert set(batch) == set(whole)
    for name, value in whole.items():
        assert torch.equal(batch[name], value), name


def ticket(loop, n_prompt=10, keep=0.5, is_alone=False, **inputs):
    inputs = {"input_ids": torch.zeros(1, n_prompt, dtype=torch.long), **inputs}
    prepared = Prepared(inputs, n_prompt, 0, 5)
    return Ticket(prepared, Pruning({"keep": keep}, "span"), Sampling(0.0), (), loop, is_alone)


@pytest.fixture
def loop():
    one = asyncio.new_event_loop()
    yield one
    one.close()


def test_the_queue_gives_out_what_fits_together(loop):
    queue = Queue(ServerSettings("m", max_batch=3, max_batch_tokens=40))
    one, other = ticket(loop), ticket(loop, keep=0.25)
    long, small = ticket(loop, n_prompt=100), ticket(loop, n_prompt=12)
    alone = [ticket(loop, is_alone=True) for _ in range(2)]
    wide = [ticket(loop, pixels=torch.zeros(2, width)) for width in (3, 3, 4)]
    more = [ticket(loop) for _ in range(3)]
    for item in (one, other, long, small, *alone, *wide, *more):
        queue.put(item)
    more[1].is_cancelled = True
    batches = []
    while len(queue):
        batches.append(queue.take())
    assert batches == [
        [one, small, more[0]], [other], [long], [alone[0]], [alone[1]], wide[:2], wide[2:], [more[2]]
    ]  # fmt: skip
    assert queue.close() == []
    assert queue.take() == []


def test_a_batch_waits_for_requests_that_are_being_prepared(loop):
    queue, is_preparing = Queue(ServerSettings("m", batch_wait=20.0)), threading.Event()
    first, second = ticket(loop), ticket(loop)
    begin = time.monotonic()
    queue.put(first)
    assert queue.take() == [first]  # none is

    def late():
        with queue.preparing():
            is_preparing.set()
            time.sleep(0.3)
            queue.put(second)

    thread = threading.Thread(target=late)
    thread.start()
    is_preparing.wait()
    queue.put(first)
    assert queue.take() == [first, second]
    assert time.monotonic() - begin < 10
    thread.join()


def test_what_a_request_leaves_out_is_the_checkpoints():
    class Own:
        do_sample, temperature, top_p, top_k = True, 0.7, 0.8, 20

    class Greedy:
        do_sample, temperature, top_p, top_k = False, None, None, None

    def sampling(config, **given):
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **given}
        return sampling_of(ChatRequest.model_validate(body), config)

    assert sampling(Own) == Sampling(0.7, 0.8, 20)
    assert sampling(Own, temperature=0) == Sampling(0.0)
    assert sampling(Own, temperature=1.5, top_p=0.5, seed=3) == Sampling(1.5, 0.5, 20, 3)
    assert sampling(Greedy, seed=3) == Sampling(0.0)
    assert sampling(Greedy, temperature=1.0) == Sampling(1.0, 1.0, 0)


def test_a_developer_speaks_as_the_system():
    body = {"model": "m", "messages": [{"role": role, "content": "x"} for role in ("developer", "user")]}
    assert [one.role for one in ChatRequest.model_validate(body).messages] == ["system", "user"]


def test_a_client_that_does_not_read_holds_its_place_no_longer_than_its_time(loop):
    """What is sent waits for the client without end."""

    async def stream():
        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.sleep(1000)

        async def receive():
            await asyncio.sleep(1000)

        record = {}
        exchange = Exchange(receive, time.monotonic() + 0.2, asyncio.Event(), record)
        chunks = Chunks("id", 0, "m", includes_usage=False)
        end = await exchange.stream(send, ticket(asyncio.get_running_loop()), Event("text"), chunks)
        exchange.close()
        return end, record

    begin = time.monotonic()
    assert loop.run_until_complete(stream()) == (None, {"error": "request_timeout"})
    assert time.monotonic() - begin < 20
