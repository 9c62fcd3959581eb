"""Many requests of changing shapes, some of them faulty: memory stays where it is."""

from __future__ import annotations

import ctypes
import gc
import random
import sys

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from live_server import asked, data_url, image_part, in_threads, request_bytes

from sparsevlm.scenes import draw_scene

N_ROUNDS, N_THREADS = 9, 4  # of a window
MOST_MIB = 2.0  # that a window may add, once what grows at first has grown


def held():
    """MiB that the process holds, and objects of Python's."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free in the allocator's own lists is no leak
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024, len(gc.get_objects())


def request(rng):
    """Any number of small images of any size, a text of any length, and sometimes a fault."""
    parts = []
    for _ in range(rng.choice([0, 1, 1, 2])):
        image = draw_scene(rng.randrange(10**6)).image.resize((rng.randrange(40, 300), rng.randrange(40, 300)))
        parts.append(image_part(data_url(image, "JPEG")))
    parts.append({"type": "text", "text": "word " * rng.randrange(1, 60)})
    if rng.random() < 0.1:
        parts.append(image_part("data:image/png;base64,AAAA"))
    more = {"sparsevlm": {"keep": rng.choice([0.25, 0.5, 64])}} if rng.random() < 0.3 else {}
    return asked(parts, max_tokens=rng.randrange(1, 6), stream=rng.random() < 0.5, **more)


def ask(live, rng):
    body = request(rng)
    if rng.random() < 0.1:
        live.raw(request_bytes(body)).close()
    else:
        live.send("POST", "/v1/chat/completions", body)


def window(live, rng):
    for _ in range(N_ROUNDS):
        with in_threads([lambda: ask(live, rng)] * N_THREADS) as outcomes:
            pass
        assert outcomes == [None] * N_THREADS
    live.check_idle()
    return held()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(900)
def test_memory_stays_where_it_is(start):
    live, rng = start(), random.Random(0)
    for _ in range(2):  # what is made once, and the largest shapes
        window(live, rng)
    windows = [window(live, rng) for _ in range(4)]
    print([f"{mib:.1f} MiB, {n} objects" for mib, n in windows])
    first, last = windows[0], windows[-1]
    assert (last[0] - first[0]) / (len(windows) - 1) < MOST_MIB, windows
    assert last[1] - first[1] < 500, windows
    assert live.metric("requests_total", path="/v1/chat/completions", status="200") > 100
