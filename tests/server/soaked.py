"""A server under requests of changing shapes, some of them faulty: prints what it holds after each window of them."""

from __future__ import annotations

import ctypes
import gc
import json
import random

from live_server import LiveServer, asked, data_url, image_part, in_threads, request_bytes

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

N_WINDOWS, N_ROUNDS, N_THREADS = 5, 9, 4


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


def main():
    model, processor = load_model(bundled_path()), load_processor(bundled_path())
    state, rng = apply_sparsevlm(model, keep=0.25, processor=processor), random.Random(0)
    with LiveServer(state, processor) as live:
        for _ in range(N_WINDOWS):
            mib, n_objects = window(live, rng)
            n_answers = live.metric("requests_total", path="/v1/chat/completions", status="200")
            print(json.dumps({"mib": mib, "objects": n_objects, "answers": n_answers}), flush=True)


if __name__ == "__main__":
    main()
