"""Clients that vanish, faults of the worker, and the end of the server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

import torch  # noqa: E402
from live_server import about, asked, in_threads, request_bytes, wait_until  # noqa: E402

LONG = {"max_tokens": 1000}


def test_a_client_that_vanishes_stops_its_generation(start, endless):
    live = start(max_batch=1)
    stream = live.ask(stream=True, **LONG)
    next(iter(stream))
    assert live.service.worker.running
    begin = time.monotonic()
    stream.close()
    live.check_idle()
    assert time.monotonic() - begin < 5  # of the 20 seconds that its tokens would take
    whole = live.raw(request_bytes(asked(**LONG)))
    wait_until(lambda: live.service.worker.running)
    waiting = live.raw(request_bytes(asked(**LONG)))
    wait_until(lambda: len(live.service.queue) == 1)
    waiting.close()
    wait_until(lambda: live.service.n_in_flight == 1)
    whole.close()
    live.check_idle()
    assert live.metric("requests_total", path="/v1/chat/completions", status="499") == 2


def test_one_of_a_batch_that_vanishes_leaves_the_others(start, endless):
    live = start(batch_wait=60.0)
    vanishes = []
    ask = [lambda: live.ask(max_tokens=40), lambda: vanishes.append(live.raw(request_bytes(asked(max_tokens=1000))))]
    with in_threads(ask) as answers:
        with live.service.queue.preparing():
            wait_until(lambda: len(live.service.queue) == 2)
        wait_until(lambda: any(ticket.first_token for ticket in live.service.worker.running))
        vanishes[0].close()
    assert answers[0].usage.completion_tokens == 40
    assert answers[0].sparsevlm["batch_size"] == 2
    live.check_idle()


def test_an_error_of_the_model_is_that_of_its_batch_alone(start, monkeypatch):
    live = start(max_batch=1)
    generate = live.service.worker._generate

    def fail(rows):
        raise RuntimeError("out of tune, with a secret")

    monkeypatch.setattr(live.service.worker, "_generate", fail)
    with pytest.raises(openai.InternalServerError) as caught:
        live.ask()
    assert caught.value.status_code == 500
    assert "secret" not in str(caught.value)
    with pytest.raises(openai.InternalServerError):
        live.ask(stream=True)  # before its first token: with the status, not in the stream
    monkeypatch.setattr(live.service.worker, "_generate", generate)
    assert live.ask().choices[0].message.content == "354"


def test_an_error_that_nobody_foresaw_is_answered_as_all_others_are(start, monkeypatch):
    live = start()

    def fail(*args):
        raise RuntimeError("out of tune, with a secret")

    with monkeypatch.context() as patch:
        patch.setattr(live.service, "_ticket", fail)
        status, error = live.post(asked())
    assert (status, error["code"]) == (500, "internal_error")
    assert "secret" not in error["message"]
    assert live.ask().choices[0].message.content == "354"


def test_an_error_in_the_middle_of_a_stream(start, monkeypatch):
    live = start()
    from sparsevlm.server.worker import Row

    push = Row.push

    def fail_later(self, token):
        push(self, token)
        if self.n_tokens == 3:
            raise RuntimeError("broken")

    monkeypatch.setattr(Row, "push", fail_later)
    pieces = []
    stream = live.ask(about(8, text="List all cards."), stream=True)
    with pytest.raises(openai.APIError, match="failed to generate"):
        pieces.extend(chunk for chunk in stream)
    assert pieces
    monkeypatch.setattr(Row, "push", push)
    assert live.ask().choices[0].message.content == "354"


def test_a_device_without_memory(start, monkeypatch):
    live = start()

    def fail(rows):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(live.service.worker, "_generate", fail)
    status, error = live.post(asked())
    assert (status, error["code"]) == (503, "out_of_memory")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_started_anew(start, monkeypatch):
    live = start()
    worker = live.service.worker

    def die(batch):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_serve", die)
        assert live.post(asked())[0] == 500  # what it had taken
    wait_until(lambda: worker.is_alive)
    assert worker.n_started == 2
    assert live.metric("worker_restarts_total") == 1
    assert live.ask().choices[0].message.content == "354"
    assert live.send("GET", "/health")[0] == 200
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_serve", die)
        statuses = [live.post(asked())[0] for _ in range(4)]
        wait_until(lambda: not worker.is_alive)
        assert set(statuses) <= {500, 503}
    status, _, said = live.send("GET", "/health")
    assert (status, said["reason"]) == (503, "the generating thread has died")
    assert live.post(asked())[0] == 503


def test_on_a_cpu_a_thread_generates_some_batches_and_another_follows(start, monkeypatch):
    """What torch's attention keeps for each length ends with its thread."""
    monkeypatch.setattr("sparsevlm.server.worker._MOST_BATCHES", 2)
    n_before = _n_generating()
    worker, threads = (live := start()).service.worker, []
    serve = worker._serve

    def seen(batch):
        threads.append(threading.current_thread())
        serve(batch)

    monkeypatch.setattr(worker, "_serve", seen)
    assert {live.ask().choices[0].message.content for _ in range(5)} == {"354"}
    first, second, third, fourth, fifth = threads
    assert first is second is not third
    assert third is fourth is not fifth
    wait_until(lambda: not third.is_alive())
    assert _n_generating() == n_before + 1
    assert worker.n_started == 1
    assert live.metric("worker_restarts_total") == 0
    live.__exit__()
    assert not worker.is_alive


def _n_generating():
    return sum(one.name == "sparsevlm-generate" for one in threading.enumerate())


def test_a_model_that_does_not_answer_is_noticed(start, monkeypatch):
    live, hang = start(request_timeout=1.0), threading.Event()
    monkeypatch.setattr(live.service.worker, "_generate", lambda rows: hang.wait(20))
    assert live.post(asked())[0] == 408
    wait_until(lambda: live.send("GET", "/health")[0] == 503)
    assert live.send("GET", "/health")[2]["reason"] == "the model does not answer"
    hang.set()


class Process:
    """``sparsevlm serve`` as a process of its own."""

    def __init__(self, *options):
        command = [sys.executable, "-u", "-m", "sparsevlm", "serve", "--model", "bundled", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(re.search(r":(\d+)/", self.line("url")["url"])[1])

    def line(self, field):
        """The first line of the log with a field."""
        begin = time.monotonic()
        while True:
            read = [json.loads(line) for line in list(self.lines) if line.startswith(b"{")]
            if found := [line for line in read if field in line]:
                return found[0]
            assert time.monotonic() - begin < 200, self.lines
            assert self.process.poll() is None, self.lines
            time.sleep(0.1)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def client(self):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=250)

    def ask(self, **more):
        return self.client().chat.completions.create(**asked(about(8, text="List all cards."), **more))


@pytest.fixture
def process():
    started = []

    def start(*options):
        started.append(Process(*options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait(30)


def test_a_server_under_load_ends_what_it_has_begun(process):
    server = process("--max-batch", "2", "--shutdown-timeout", "200")
    stream = iter(server.ask(max_tokens=24, stream=True))
    next(stream)
    with in_threads([lambda: server.ask(max_tokens=8)] * 3) as answers:
        wait_for_requests(server, 4)
        server.process.send_signal(signal.SIGTERM)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said.startswith("blue 354")
    for answer in answers:
        assert answer.choices[0].message.content.startswith("blue 354"), answer
    assert server.process.wait(120) == 0
    assert not [line for line in server.lines if b'"exception"' in line]


def wait_for_requests(server, n):
    """Until so many requests are being served or were."""
    import http.client

    def served():
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        found = re.findall(r"^sparsevlm_(?:queue_length|running_requests) ([\d.]+)$", text, re.M)
        done = re.findall(r'^sparsevlm_requests_total\{path="/v1/chat/completions".* ([\d.]+)$', text, re.M)
        return sum(map(float, [*found, *done])) >= n

    wait_until(served)


def test_new_requests_are_refused_while_a_server_ends(start, endless):
    live = start(shutdown_timeout=200.0)
    stream = live.ask(max_tokens=50, stream=True)
    next(iter(stream))
    live.service.drain()
    status, headers, said = live.send("POST", "/v1/chat/completions", asked())
    assert (status, said["error"]["code"]) == (503, "shutting_down")
    assert headers["retry-after"]
    assert live.send("GET", "/health")[0] == 503
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_what_does_not_end_in_time_is_told(start, endless):
    live = start(shutdown_timeout=1.0, max_batch=1)
    with in_threads([lambda: live.post(asked(**LONG)), lambda: live.post(asked(**LONG))]) as answers:
        wait_until(lambda: live.service.n_in_flight == 2 and len(live.service.queue) == 1)
        begin = time.monotonic()
        live.service.drain()
    assert [(status, error["code"]) for status, error in answers] == [(503, "shutting_down")] * 2
    wait_until(lambda: not live._thread.is_alive())
    assert time.monotonic() - begin < 8


def test_the_command_takes_a_key_from_the_environment(process, monkeypatch):
    monkeypatch.setenv("SPARSEVLM_API_KEY", "from-outside")
    server = process("--name", "mine", "--keep", "0.5")
    with pytest.raises(openai.AuthenticationError):
        server.client().models.list()
    client = server.client().with_options(api_key="from-outside")
    assert [model.id for model in client.models.list()] == ["mine"]
    answer = client.chat.completions.create(**{**asked(), "model": "mine"})
    assert answer.sparsevlm["visual_tokens_kept"] == pytest.approx(128, abs=2)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert not [line for line in server.lines if b"from-outside" in line]
