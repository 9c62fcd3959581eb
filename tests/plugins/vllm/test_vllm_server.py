"""vLLM's own server with the plugin: pruned requests, their count of tokens, and what a wrong one is told."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm.config")  # tests/plugins/vllm by itself would do for "vllm"

from reference import NEW_TOKENS, Prompt

from sparsevlm.plugins.vllm.options import Options

pytestmark = pytest.mark.timeout(900)
ENGINE_OPTIONS = {"keep": 0.5, "min_keep": 3}
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--block-size", "32", "--seed", "0"),
    *(
        "--skip-mm-profiling",
        "--served-model-name",
        "tiny",
        "--return-tokens-as-token-ids",
        "--trust-request-mm-kwargs",
    ),
    *("--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--hf-overrides", json.dumps({"sparsevlm": ENGINE_OPTIONS})),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory, environment, reference):
    """Address of a server."""
    folder, _ = reference("qwen2_5_vl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *OPTIONS]
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
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, prompt: Prompt):
    """Answer of the server: status and content."""
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
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
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
    status, answer = ask(server, prompt)
    assert status == 200, answer
    n_prompt, new = reference("qwen2_5_vl")[1].answer(prompt, Options.of_engine(ENGINE_OPTIONS))
    assert answer["usage"]["prompt_tokens"] == n_prompt
    tokens = [int(one["token"].removeprefix("token_id:")) for one in answer["choices"][0]["logprobs"]["content"]]
    assert tokens == new


def test_a_wrong_request_is_told_and_the_next_one_is_served(server):
    status, answer = ask(server, Prompt(images=((4, 9, 1),), options={"keep": 1.5}))
    assert status == 400
    assert "keep as a fraction must be in (0, 1], got 1.5" in json.dumps(answer)
    assert ask(server, PROMPTS["engine's"])[0] == 200
