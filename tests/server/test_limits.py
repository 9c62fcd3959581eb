"""Limits of bodies, of time and of numbers, and the key."""

from __future__ import annotations

import json
import logging
import time

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from live_server import MODEL, about, asked, in_threads, request_bytes, wait_until  # noqa: E402

from sparsevlm.server import ServerSettings  # noqa: E402


def answer_of(connection):
    """Status and body of what a raw connection is answered."""
    read = b""
    while piece := connection.recv(1 << 16):
        read += piece
        head, _, body = read.partition(b"\r\n\r\n")
        if b"content-length" in head and len(body) >= int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]):
            break
    return int(read.split()[1]), json.loads(body)


def test_a_body_that_is_too_large(start):
    live = start(max_body_bytes=100_000)
    body = json.dumps(asked("x" * 120_000))
    status, error = live.post(body)
    assert (status, error["code"]) == (413, "body_too_large")

    def pieces():
        yield from (body[start : start + 10_000].encode() for start in range(0, len(body), 10_000))

    assert live.post(pieces())[0] == 413  # of which no length was announced
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    waits = live.raw(head + b"content-length: 99999999999\r\nexpect: 100-continue\r\n\r\n")
    assert answer_of(waits)[0] == 413  # and nothing was sent
    assert live.raw(head + b"content-length: 99999999999999999999999\r\n\r\n").recv(20).startswith(b"HTTP/1.1 ")
    assert live.post(asked("x"))[0] == 200


def test_a_body_that_does_not_come(start):
    live = start(request_timeout=1.0)
    whole = request_bytes(asked())
    slow = live.raw(whole[:-10])
    status, body = answer_of(slow)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "body" in body["error"]["message"]
    gone = live.raw(whole[:-10])
    wait_until(lambda: live.service.n_in_flight)
    gone.close()
    live.check_idle()


def test_an_answer_that_takes_too_long(start, endless):
    live = start(request_timeout=5.0, max_batch=1)
    with in_threads([lambda: live.post(asked(max_tokens=1000)), lambda: live.post(asked(max_tokens=1000))]) as answers:
        pass
    assert [status for status, _ in answers] == [408, 408]
    assert any("before its answer" in error["message"] for _, error in answers)
    stream = live.ask(max_tokens=1000, stream=True)
    with pytest.raises(openai.APIError, match="time of this request"):
        list(stream)
    live.check_idle()


def test_more_requests_than_are_taken(start, endless):
    live = start(max_batch=1, max_waiting=1)
    streams = [live.ask(max_tokens=60, stream=True)]
    with in_threads([lambda: live.ask(max_tokens=1)]):
        wait_until(lambda: live.service.n_in_flight == 2)
        status, headers, said = live.send("POST", "/v1/chat/completions", asked())
        assert (status, headers["retry-after"], said["error"]["code"]) == (429, "1", "too_many_requests")
        assert live.metric("queue_length") == 1
        assert live.send("GET", "/health")[0] == 200
        streams[0].close()
    live.check_idle()
    assert live.post(asked(max_tokens=1))[0] == 200


def test_batches_have_bounds(start):
    for bound in ({"max_batch": 2}, {"max_batch_tokens": 600}):
        live = start(batch_wait=60.0, **bound)
        answers = live.together([live.ask] * 3)
        assert sorted(answer.sparsevlm["batch_size"] for answer in answers) == [1, 2, 2]


def test_limits_of_tokens(start):
    live = start(max_prompt_tokens=300, max_new_tokens=5)
    assert live.ask(about(8, text="List all cards."), max_tokens=openai.omit).usage.completion_tokens == 5
    status, error = live.post(asked(max_tokens=6))
    assert (status, error["param"]) == (400, "max_completion_tokens")
    status, error = live.post(asked(about(8, 9)))
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "tokens, and this server takes up to 300" in error["message"]


def test_a_prompt_longer_than_the_model_takes(start, loaded, monkeypatch):
    config = loaded[0].adapter.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", 280)
    live = start()
    status, error = live.post(asked(max_tokens=20))
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "the model takes 280 in all" in error["message"]
    answer = live.ask(about(8, text="List all cards."), max_tokens=openai.omit)
    assert answer.usage.total_tokens <= 280


def test_a_key(start):
    live = start(api_key="a-secret")
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "Bearer"}, {"authorization": "a-secret"},
                    {"authorization": "Bearer a-secret2"}, {"authorization": "Basic a-secret"}):  # fmt: skip
        for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/nowhere"):
            status, answered, said = live.send("GET", path, headers=headers)
            assert (status, answered["www-authenticate"]) == (401, "Bearer")
            assert said["error"]["code"] == "invalid_api_key"
    assert live.send("GET", "/health")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        live.ask()
    answer = live.client(api_key="a-secret").chat.completions.create(**asked())
    assert answer.choices[0].message.content == "354"


def test_the_log_holds_no_contents_and_no_key(start, caplog):
    from sparsevlm.server.logs import JsonLines

    live = start(api_key="a-secret")
    with caplog.at_level(logging.DEBUG, "sparsevlm.server"):
        client = live.client(api_key="a-secret")
        client.chat.completions.create(**asked(), extra_headers={"x-request-id": "mine"})
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                **asked([{"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}}])
            )
        live.check_idle()
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (line["status"], line["prompt_tokens"], line["visual_tokens"], line["level"]) == (200, 274, 256, "info")
    assert [line["error"] for line in lines if line.get("status") == 400] == ["invalid_image"]
    drawn = ("request_id", "time", "seconds")  # whose digits may be those of the answer
    text = json.dumps([{name: value for name, value in line.items() if name not in drawn} for line in lines])
    for secret in ("a-secret", "blue card", "354", "base64", "AAAA"):
        assert secret not in text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"port": 70000}, "port must be at most 65535"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_images": 1.5}, "max_images must be a whole number"),
        ({"request_timeout": 0}, "request_timeout must be a finite number above 0"),
        ({"batch_wait": -1}, "batch_wait must be a finite number above 0"),
        ({"api_key": ""}, "api_key must be a text"),
        ({"api_key": "ä"}, "api_key must be a text"),
        ({"image_root": "/nowhere"}, "image_root /nowhere is no folder"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises((ValueError, TypeError), match=says):
        ServerSettings(MODEL, **settings)


def test_a_key_is_not_shown():
    assert "a-secret" not in repr(ServerSettings(MODEL, api_key="a-secret"))


def test_a_port_that_is_taken(start):
    from sparsevlm.server.run import listen

    live = start()
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {live.port}"):
        listen(ServerSettings(MODEL, port=live.port))


def test_the_event_loop_is_free_while_requests_are_read(live):
    """Large bodies and long texts are read by other threads."""
    large = json.dumps(asked("x y " * 120_000))
    lists = b'{"messages": [' + b"[]," * 10_000_000 + b"[]]}"
    with in_threads([lambda: live.post(large)] * 4 + [lambda: live.post(lists)] * 2) as answers:
        slowest = 0.0
        while None in answers:
            begin = time.monotonic()
            assert live.send("GET", "/health")[0] == 200
            slowest = max(slowest, time.monotonic() - begin)
    assert {status for status, _ in answers} == {400}
    assert slowest < 2.0
