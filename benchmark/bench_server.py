"""Throughput of ``sparsevlm serve`` with one client and with several at once; a row in ``results/server.csv``.

``python -m benchmark.bench_server --clients 8`` starts a server of the bundled model, asks it, and prints the ratio.
"""

from __future__ import annotations

import argparse
import base64
import csv
import http.client
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark.server_rows import SERVER


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts a server, measures it and appends the row."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=48, help="of each of the two measurements")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--append-to", type=Path, default=SERVER)
    parser.add_argument("server", nargs="*", help="further options of sparsevlm serve, behind --")
    options = parser.parse_args(given)
    command = [sys.executable, "-m", "sparsevlm", "serve", "--model", options.model, "--port", "0", *options.server]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = _port(process)
        bodies = [_body(options.model, index, options.max_tokens) for index in range(8)]
        for n in (1, options.clients):
            measure(port, bodies, n, n)  # what is made once
        one = measure(port, bodies, 1, options.requests)
        several = measure(port, bodies, options.clients, options.requests)
    finally:
        process.terminate()
        process.wait(60)
    row = {
        "model": options.model,
        "clients": options.clients,
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        **{f"one_{name}": value for name, value in one.items()},
        **{f"several_{name}": value for name, value in several.items()},
        "ratio": round(several["requests_per_second"] / one["requests_per_second"], 2),
        **_origin(),
        "command": shlex.join(["python", "-m", "benchmark.bench_server", *given]),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    _append(options.append_to, row)
    print(json.dumps(row, indent=1))


def measure(port: int, bodies: Sequence[bytes], n_clients: int, n_requests: int) -> dict[str, float]:
    """Requests and new tokens per second, and the mean batch, of clients that ask one request after the other."""
    answers: list[dict[str, Any]] = []
    left = iter(range(n_requests))
    turn = threading.Lock()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while True:
            with turn:
                place = next(left, None)
            if place is None:
                connection.close()
                return
            body = bodies[place % len(bodies)]
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            if "error" in answer:
                raise RuntimeError(answer["error"]["message"])
            answers.append(answer)

    begin = time.perf_counter()
    threads = [threading.Thread(target=ask) for _ in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    if len(answers) != n_requests:
        raise RuntimeError(f"{len(answers)} of {n_requests} requests were answered.")
    n_tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    batch = sum(answer["sparsevlm"]["batch_size"] for answer in answers) / len(answers)
    return {
        "requests_per_second": round(n_requests / seconds, 3),
        "tokens_per_second": round(n_tokens / seconds, 2),
        "batch": round(batch, 2),
    }


def _port(process: subprocess.Popen[str]) -> int:
    """The port of a server that has just said where it is; from then on its log is read and dropped."""
    assert process.stderr is not None
    port = None
    for line in process.stderr:
        if line.startswith("{"):
            said = json.loads(line)
            if "url" in said:
                port = int(said["url"].split(":")[2].split("/")[0])
            if "startup complete" in said["message"] and port is not None:
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return port
    raise RuntimeError("the server has ended before it served.")


def _body(model: str, index: int, max_tokens: int) -> bytes:
    from sparsevlm.scenes import draw_scene

    file = io.BytesIO()
    draw_scene(index).image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "List all cards."}]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}).encode()


def _origin() -> dict[str, str]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "fastapi", "uvicorn"))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    return {"device": device, "threads": threads, "versions": versions, "commit": commit}


def _append(path: Path, row: dict[str, Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
