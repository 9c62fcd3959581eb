"""A server under requests of changing shapes, some of them faulty: prints what it holds after each window of them.

In the last windows it leaks.
"""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path

from live_server import LiveServer, asked, data_url, image_part, in_threads, request_bytes

from sparsevlm.scenes import draw_scene
from sparsevlm.server.memory import bound_memory

N_WINDOWS, N_LEAKY, N_ROUNDS, N_THREADS = 36, 4, 9, 4
LEAK = 1 << 19  # bytes of each request in the last windows


def held():
    """MiB that the process holds, and objects of Python's."""
    gc.collect()
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmRSS")]
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


def leak(live):
    """Let every request keep some memory from now on; not as objects that Python's collector counts."""
    kept, prepare = [], live.service._prompts.prepare

    def leaky(*args):
        kept.append(bytes(LEAK).replace(b"\0", b"\1"))
        return prepare(*args)

    live.service._prompts.prepare = leaky


def main():
    bound_memory()  # before torch is imported, as the command does
    from sparsevlm import apply_sparsevlm
    from sparsevlm.bundled import bundled_path
    from sparsevlm.inputs import load_model, load_processor

    model, processor = load_model(bundled_path()), load_processor(bundled_path())
    state, rng = apply_sparsevlm(model, keep=0.25, processor=processor), random.Random(0)
    with LiveServer(state, processor) as live:
        for place in range(N_WINDOWS + N_LEAKY):
            if place == N_WINDOWS:
                leak(live)
            mib, n_objects = window(live, rng)
            n_answers = live.metric("requests_total", path="/v1/chat/completions", status="200")
            said = {"mib": mib, "objects": n_objects, "answers": n_answers, "leaky": place >= N_WINDOWS}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
