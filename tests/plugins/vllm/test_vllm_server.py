"""vLLM's own server with the plugin, by one engine and by two: answers, tokens, and what a wrong request is told."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm.config")  # tests/plugins/vllm by itself would do for "vllm"

from benchmark.vllm_server import takes_request_options
from reference import NEW_TOKENS, Prompt

from sparsevlm.plugins.vllm.options import Options

pytestmark = pytest.mark.timeout(900)
ENGINE_OPTIONS = {"keep": 0.5, "min_keep": 3}
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--block-size", "32", "--seed", "0"),
    *("--skip-mm-profiling", "--served-model-name", "tiny", "--return-tokens-as-token-ids", *takes_request_options()),
    *("--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--hf-overrides", json.dumps({"sparsevlm": ENGINE_OPTIONS})),
)


@pytest.fixture(scope="module", params=[1, 2], ids=["one engine", "data parallel"])
def server(request, tmp_path_factory, environment, reference):
    """Address of a server, and how many engines it has."""
    folder, _ = reference("qwen2_5_vl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *OPTIONS]
    command += ["--data-parallel-size", str(request.param)] if request.param > 1 else []
    with log.open("w") as lines:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=lines,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 600
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield address, request.param
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, prompt: Prompt, engine: int = 0):
    """Answer of one of the server's engines: status and content."""
    parts = []
    for picture in prompt.pictures():
        written = io.BytesIO()
        picture.save(written, "PNG")
        url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    body = {
        "model": "tiny", "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "logprobs": True,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": prompt.text}]}],
    }  # fmt: skip
    if prompt.options:
        body["mm_processor_kwargs"] = {"sparsevlm": prompt.options}
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(engine)}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


PROMPTS = {
    "engine's": Prompt(images=((4, 9, 1),)),
    "request's": Prompt(images=((4, 9, 1),), options={"keep": 0.25, "selector": "mmtok"}),
    "all": Prompt(images=((4, 9, 1), (3, 5, 3)), options={"keep": 1.0}),
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_answers_are_those_of_the_transformers_path(prompt, server, reference):
    address, n_engines = server
    n_prompt, new = reference("qwen2_5_vl")[1].answer(prompt, Options.of_engine(ENGINE_OPTIONS))
    for engine in range(n_engines):
        status, answer = ask(address, prompt, engine)
        assert status == 200, answer
        assert answer["usage"]["prompt_tokens"] == n_prompt
        tokens = [int(one["token"].removeprefix("token_id:")) for one in answer["choices"][0]["logprobs"]["content"]]
        assert tokens == new


def test_a_wrong_request_is_told_and_the_next_one_is_served(server):
    address, _ = server
    status, answer = ask(address, Prompt(images=((4, 9, 1),), options={"keep": 1.5}))
    assert status == 400
    assert "keep as a fraction must be in (0, 1], got 1.5" in json.dumps(answer)
    assert ask(address, PROMPTS["engine's"])[0] == 200


def test_all_engines_have_answered(server):
    address, n_engines = server
    for engine in range(n_engines):
        assert ask(address, PROMPTS["engine's"], engine)[0] == 200
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        counts = answer.read().decode()
    answered = re.findall(r'^vllm:request_success_total\{engine="(\d+)",.*\} ([1-9].*)$', counts, flags=re.MULTILINE)
    assert {engine for engine, _ in answered} == {str(engine) for engine in range(n_engines)}, counts
