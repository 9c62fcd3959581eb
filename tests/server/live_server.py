"""A server in a thread of the tests, and what asks it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time

from sparsevlm.scenes import draw_scene

MODEL = "bundled"
QUESTION = "Read the number on the blue card."


class LiveServer:
    """Runs from ``with`` to its end."""

    def __init__(self, state, processor, remote=None, **settings):
        from sparsevlm.server import ServerSettings
        from sparsevlm.server.app import create_app
        from sparsevlm.server.run import Server, listen

        self.settings = ServerSettings(MODEL, **{"port": 0, "shutdown_timeout": 5.0, **settings})
        self.app = create_app(state, processor, self.settings, remote)
        self.service, self.server = self.app.service, Server(self.app)
        self._socket = listen(self.settings)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *exc):
        self.service.drain()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def client(self, **options):
        """OpenAI's own."""
        import openai

        options = {"api_key": "none", "max_retries": 0, "timeout": 250, **options}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **options)

    def ask(self, content=None, **more):
        return self.client().chat.completions.create(**asked(content, **more))

    def send(self, method, path, body=None, headers=()):
        """Status, headers and body of an answer, JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=250)
        try:
            headers = {"content-type": "application/json", **dict(headers)}
            body = json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            read = answer.read()
            is_json = answer.headers.get("content-type") == "application/json"
            return answer.status, answer.headers, json.loads(read) if is_json else read
        finally:
            connection.close()

    def post(self, body, **headers):
        """Status and error of an answer to a body."""
        status, _, said = self.send("POST", "/v1/chat/completions", body, headers)
        assert set(said) == {"error"} or status == 200
        if status != 200:
            assert set(said["error"]) == {"message", "type", "param", "code"}
        return status, said.get("error") or said

    def raw(self, content):
        """An open socket to which these bytes were written."""
        one = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        one.sendall(content)
        return one

    def metric(self, name, **labels):
        return self.service.metrics.registry.get_sample_value(f"sparsevlm_{name}", labels or None) or 0.0

    def together(self, works):
        """Outcomes of functions that ask for one request each: a batch that is not full is taken when all wait."""
        with in_threads(works) as outcomes, self.service.queue.preparing():
            wait_until(lambda: len(self.service.queue) == len(works) or self.service.worker.running, 200)
        return outcomes

    def check_idle(self):
        """Nothing is left of any request, and the next one is answered."""
        wait_until(lambda: not self.service.n_in_flight and not self.service.worker.running)
        assert len(self.service.queue) == 0
        assert self.service.queue._n_preparing == 0
        assert self.send("GET", "/health")[0] == 200


def wait_until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def scene_url(index, kind="PNG"):
    return data_url(draw_scene(index).image, kind)


def data_url(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return bytes_url(file.getvalue(), kind.lower())


def bytes_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def about(*indices, text=QUESTION):
    """Content of a message about scenes."""
    return [*(image_part(scene_url(index)) for index in indices), {"type": "text", "text": text}]


def asked(content=None, **more):
    """The body of a request."""
    content = about(8) if content is None else content
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}


def request_bytes(body):
    """A whole request, as it is written to a socket."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


@contextlib.contextmanager
def in_threads(works):
    """Run functions at once; the value is the list of their outcomes once the block has ended."""
    outcomes = [None] * len(works)

    def run(place):
        try:
            outcomes[place] = works[place]()
        except Exception as error:
            outcomes[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    yield outcomes
    for thread in threads:
        thread.join(250)
