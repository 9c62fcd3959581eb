"""Requests, rows and table of the benchmark of vLLM's server, without vLLM."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import sys
import time
import types

import pytest
import torch
from PIL import Image

from benchmark import bench_vllm_load as bench
from benchmark import vllm_clients, vllm_load_rows, vllm_setup, vllm_timed_choice
from sparsevlm.bench.checkpoint import write_checkpoint_files
from sparsevlm.plugins.vllm import choice

SMALL = ["--shape", "tiny", "--visual", "64", "--selectors", "mmtok", "--keep", "0.5", "--clients", "1,8"]
SETTING = {"keep": 0.5, "selector": "mmtok"}
PRUNED = bench.Engine((), (SETTING,))
REQUEST = vllm_clients.Request(8, 8, 1, 16)


@pytest.fixture(autouse=True)
def of_any_version(monkeypatch):
    monkeypatch.setattr(bench, "takes_request_options", lambda: ["--trusts"])
    monkeypatch.setattr(vllm_setup, "vllm_version", lambda: "9.9")


def test_by_default_it_takes_less_than_nine_minutes():
    assert 5 * 60 < bench.estimate(bench.parse([])) < 9 * 60


def test_servers_differ_in_the_options_of_the_plugin_alone():
    dense, pruned = bench.engines(bench.parse([*SMALL, "--server", "--max-num-seqs 4"]))
    assert dense.options[-2:] == ("--max-num-seqs", "4")
    assert pruned.options == (*dense.options, "--hf-overrides", '{"sparsevlm": {}}', "--trusts")
    assert (dense.settings, pruned.settings) == ((None,), ({"keep": 1.0, "selector": "grid"}, SETTING))
    given = bench.parse([*SMALL, "--frames", "4", "--own-rates", "0.5"])
    *_, own = bench.engines(given)
    assert own.options == (*next(bench.engines(given)).options, "--video-pruning-rate", "0.5")
    assert own.columns(None) == {"provider": bench.OWN, "selector": "", "keep": "0.5"}


@pytest.mark.parametrize(("wrong", "told"), [(["--frames", "3"], "even number"), (["--own-rates", "0.5"], "--frames")])
def test_wrong_options(wrong, told, capsys):
    with pytest.raises(SystemExit):
        bench.parse([*SMALL, *wrong])
    assert told in capsys.readouterr().err


def pictures(request, number):
    question, part = request.content(number)
    kind, data = next((kind, part[kind]["url"]) for kind in ("image_url", "video_url") if kind in part)
    head, *written = data.split(",")
    return question, kind, head, [Image.open(io.BytesIO(base64.b64decode(one))) for one in written]


def test_every_request_is_a_new_one():
    question, kind, head, (picture,) = pictures(REQUEST, 1)
    assert (kind, head, picture.size, len(question)) == ("image_url", "data:image/jpeg;base64", (224, 224), 40)
    assert REQUEST.content(1) == REQUEST.content(1)
    other, _, _, (other_picture,) = pictures(REQUEST, 2)
    assert question != other
    assert picture.tobytes() != other_picture.tobytes()
    _, kind, head, frames = pictures(vllm_clients.Request(4, 6, 4, 16), 1)
    assert (kind, head, [one.size for one in frames]) == ("video_url", "data:video/jpeg;base64", [(168, 112)] * 4)
    assert len({one.tobytes() for one in frames}) == 4


def test_tokens_of_a_prompt(tmp_path):
    write_checkpoint_files(bench.model_config("tiny"), tmp_path)
    n_text = bench.text_tokens(tmp_path, REQUEST)
    # <|im_start|> and user, line, vision start and end, <|im_end|>, line, <|im_start|>, assistant, line
    assert n_text == 40 + 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1
    video = vllm_clients.Request(8, 8, 6, 16)
    assert bench.text_tokens(tmp_path, video) == n_text
    assert (bench.visual_tokens(REQUEST), bench.visual_tokens(video)) == (64, 192)


def columns(setting=SETTING, clients=8, engine=PRUNED):
    return bench.columns_of(engine, setting, clients, REQUEST, 60)


def by_metric(rows):
    assert set().union(*rows) <= set(bench.COLUMNS)
    return {(row["phase"], row["metric"]): row for row in rows}


def test_rows_tell_throughput_and_percentiles():
    first = [float(i) for i in range(1, 101)]
    found = vllm_clients.Load(4.0, 25.0, first, [200.0] * 100, [92] * 100, [16] * 100)
    rows = by_metric(bench.load_rows(columns(), found))
    assert rows["load", "requests_per_s"]["p50"] == "25"
    assert rows["load", "new_tokens_per_s"]["p50"] == "400"
    assert float(rows["first_token", "ms"]["p50"]) == 50.5
    assert float(rows["first_token", "ms"]["p99"]) > 99
    assert rows["prompt", "tokens"]["p50"] == "92"
    assert {(row["n"], row["n_kept"], row["provider"]) for row in rows.values()} == {("100", "32", "vllm-sparsevlm")}


def test_prompts_of_other_lengths_are_an_error():
    found = vllm_clients.Load(4.0, 1.0, [1.0], [2.0], [124], [16])
    with pytest.raises(RuntimeError, match=r"prompts of \{124\} tokens, not of 32 visual and 60 others"):
        bench.load_rows(columns(), found)
    own = bench.Engine((), (None,), 0.75)  # of which the server alone knows how many there are
    assert len(bench.load_rows(columns(None, engine=own), found)) == 5


def test_without_answers_there_is_a_row_with_the_reason():
    (row,) = bench.load_rows(columns(), vllm_clients.Load(4.0, 0.0, [], [], [], []))
    assert row["note"] == "no request was answered in 4 s"
    (row,) = bench.choice_rows(columns(), [], 3.0)
    assert (row["phase"], row["note"]) == ("choice_per_request", "no choice was made in 3 s")


def test_a_choice_for_several_images_is_shared_by_them():
    rows = by_metric(bench.choice_rows(columns(), [(12.0, 3), (8.0, 1)], 0.5))
    each = rows["choice_per_request", "ms"]
    assert (each["p50"], each["n"]) == ("4", "4")
    assert rows["choice", "share_of_time"]["p50"] == "0.04"


class FakeServer:
    """A server that is there at once, or is not."""

    address, reason, shown = "http://nowhere", "", []

    def __init__(self, *given):
        self.switched = 0

    def __enter__(self):
        if self.reason:
            raise RuntimeError(self.reason)

    def __exit__(self, *exc):
        pass

    @contextlib.contextmanager
    def timed_choices(self):
        self.switched += 1
        yield

    def show_log(self):
        self.shown.append(self)

    def choices(self):
        return [(5.0, 1)] * self.switched


def rows_of_a_run(monkeypatch, tmp_path, load, **server):
    monkeypatch.setattr(bench, "Server", type("Server", (FakeServer,), server))
    monkeypatch.setattr(bench, "load", load)
    file = tmp_path / "rows.csv"
    bench.main([*SMALL, "--append-to", str(file)])
    return vllm_load_rows.read_e2e(file)


def answered(address, request, setting, numbers, clients, warmup, seconds):
    next(numbers)
    n_prompt = (64 if setting is None or setting["keep"] == 1 else 32) + 61
    return vllm_clients.Load(seconds, 1.0, [5.0 * clients], [9.0], [n_prompt], [request.new_tokens])


def test_a_run_stores_its_rows(monkeypatch, tmp_path):
    rows = rows_of_a_run(monkeypatch, tmp_path, answered)
    assert len(rows) == 2 * (5 + 5 + 5 + 2)
    assert len({row["timestamp"] for row in rows}) == 1
    assert {row["command"] for row in rows} == {" ".join(["python -m benchmark.bench_vllm_load", *SMALL])}
    assert {row["model"] for row in rows} == {"tiny shape, random weights"}
    assert not any(row["note"] for row in rows)
    chosen = [row for row in rows if row["phase"].startswith("choice")]
    assert {(row["provider"], row["keep"]) for row in chosen} == {("vllm-sparsevlm", "0.5")}


def test_what_fails_leaves_the_rest_and_says_why(monkeypatch, tmp_path):
    def load(address, request, setting, numbers, clients, *rest):
        if setting == SETTING and clients == 8:
            raise RuntimeError("a request failed: Bad Request")
        return answered(address, request, setting, numbers, clients, *rest)

    shown = []
    rows = rows_of_a_run(monkeypatch, tmp_path, load, shown=shown)
    assert len(shown) == 1
    (failed,) = [row for row in rows if row["note"]]
    assert (failed["note"], failed["clients"], failed["keep"]) == ("failed: a request failed: Bad Request", "8", "0.5")
    assert len(rows) == 2 * (5 + 5) + 7 + 1


def test_a_server_that_does_not_start_and_time_that_is_over(monkeypatch, tmp_path):
    rows = rows_of_a_run(monkeypatch, tmp_path, answered, reason="the server was not ready: exit code 1")
    assert {row["note"] for row in rows} == {"the server was not ready: exit code 1"}
    assert [(row["provider"], row["keep"], row["clients"]) for row in rows] == [
        (provider, keep, clients)
        for provider, keep in (("vllm-dense", "1.0"), ("vllm-sparsevlm", "1.0"), ("vllm-sparsevlm", "0.5"))
        for clients in ("1", "8")
    ]
    given = bench.parse(SMALL)
    monkeypatch.setattr(bench, "Server", FakeServer)
    found = list(bench.measured(given, PRUNED, tmp_path, 61, time.monotonic() - 1))
    assert [row["note"] for row in found] == ["not reached in 9 minutes"] * 2


def answer_of(payload, success=True):
    return types.SimpleNamespace(
        success=success, error="Bad Request", ttft=0.01, latency=0.02, prompt_len=5, output_tokens=payload.output_len
    )


@pytest.fixture
def asked(monkeypatch):
    """Requests that clients have made of a server that answers at once, and how many were under way together."""
    seen = types.SimpleNamespace(requests=[], together=0, most=0, success=True, seconds=0.02)

    async def ask(request, session):
        seen.requests.append(request)
        seen.together += 1
        seen.most = max(seen.most, seen.together)
        await asyncio.sleep(seen.seconds if len(seen.requests) == 1 else 0.02)
        seen.together -= 1
        return answer_of(request, seen.success)

    class Session:
        def __init__(self, **given):
            pass

        async def __aenter__(self):
            return self

        async def __aexit__(self, *exc):
            pass

    functions = types.SimpleNamespace(RequestFuncInput=types.SimpleNamespace, async_request_openai_chat_completions=ask)
    http = types.SimpleNamespace(ClientSession=Session, TCPConnector=lambda **_: None, ClientTimeout=lambda _: None)
    for name in ("vllm", "vllm.benchmarks", "vllm.benchmarks.lib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.benchmarks.lib.endpoint_request_func", functions)
    monkeypatch.setitem(sys.modules, "aiohttp", http)
    return seen


def test_clients_ask_one_request_after_the_other(asked):
    found = vllm_clients.load("http://x", REQUEST, SETTING, itertools.count(), 3, 0.2, 0.8)
    assert asked.most == 3
    urls = [json.dumps(one.multi_modal_content) for one in asked.requests]
    assert len(set(urls)) == len(urls)
    assert 0 < len(found.total) < len(urls)  # those of the warm-up are not counted
    assert found.seconds >= 0.8
    assert set(found.new_tokens) == {16}
    assert asked.requests[0].extra_body["mm_processor_kwargs"] == {"sparsevlm": SETTING}
    assert asked.requests[0].ignore_eos
    vllm_clients.load("http://x", REQUEST, None, itertools.count(), 1, 0.1, 0.0)
    assert "mm_processor_kwargs" not in asked.requests[-1].extra_body


def test_requests_a_second_do_not_depend_on_where_a_wave_ends(asked, monkeypatch):
    """Three clients whose requests take 0.2 s and end together: between two ends there are 15 a second."""
    waited = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: waited(10 * seconds))
    for seconds in (0.3, 0.45, 0.55):
        found = vllm_clients.load("http://x", REQUEST, None, itertools.count(), 3, 0.1, seconds)
        assert len(found.total) % 3 == 0
        assert 5 < found.rate <= 15


def test_the_first_request_may_take_longer_than_the_warm_up(asked, monkeypatch):
    asked.seconds = 1.0
    found = vllm_clients.load("http://x", REQUEST, None, itertools.count(), 1, 0.1, 0.7)
    assert 0 < len(found.total) < len(asked.requests) - 1
    asked.requests.clear()
    monkeypatch.setattr(vllm_clients, "_MOST_OF_THE_FIRST", 0.1)
    with pytest.raises(RuntimeError, match="the first request was not answered in 0 s"):
        vllm_clients.load("http://x", REQUEST, None, itertools.count(), 1, 0.1, 0.2)


def test_a_request_that_fails_ends_the_load(asked):
    asked.success = False
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="a request failed: Bad Request"):
        vllm_clients.load("http://x", REQUEST, None, itertools.count(), 2, 10.0, 10.0)
    assert time.monotonic() - begin < 5


def test_choices_are_timed_while_the_switch_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "choose", choice.choose)  # put back at the end
    monkeypatch.setenv(vllm_timed_choice.FOLDER, str(tmp_path))
    vllm_timed_choice.register()
    vllm_timed_choice.register()  # in each process once
    rows = torch.randn(8, 4)
    run = choice.Run(rows, torch.zeros(3, 8, dtype=torch.int64), 4)
    options = choice.Options(keep=0.5, min_keep=1)
    times = tmp_path / vllm_timed_choice.TIMES
    choice.choose([run], options, 4)
    assert not times.exists()
    (tmp_path / vllm_timed_choice.SWITCH).touch()
    assert len(choice.choose([run, run], options, 4)) == 2
    choice.choose([choice.Run(rows, run.coordinates, 8)], options, 4)  # nothing to choose
    ((milliseconds, n_images),) = map(json.loads, times.read_text(encoding="utf-8").splitlines())
    assert milliseconds > 0
    assert n_images == 2


def stored(found, setting, clients, **origin):
    shared = {**dict.fromkeys(bench.COLUMNS, ""), "commit": "c", "timestamp": "2", "gpu": "G", "model": "7b", **origin}
    made = bench.load_rows(columns(setting, clients, bench.Engine((), (setting,))), found)
    return [{**shared, **row} for row in made]


def test_the_table_is_of_the_last_runs():
    dense = vllm_clients.Load(2.0, 0.5, [30.0], [90.0], [124], [16])
    pruned = vllm_clients.Load(2.0, 1.0, [10.0, 20.0], [50.0, 50.0], [92, 92], [16, 16])
    choices = bench.choice_rows(columns(), [(1.5, 1)], 0.1)
    rows = [*stored(dense, None, 8), *stored(pruned, SETTING, 8)]
    rows += [{**rows[0], **row} for row in choices]
    old = [{**row, "timestamp": "1", "p50": "77"} for row in rows]
    lines = vllm_load_rows.vllm_load_table([*old, *rows, {**old[0], "commit": "older", "timestamp": "0"}]).splitlines()
    assert lines[2] == "| 8 | 64 | vllm-dense | 1.0 | 124 | 0.50 | 8 | 30 | 30 | 90 | – | – |"
    assert lines[3] == "| 8 | 64 | mmtok | 0.5 | 92 | 1.00 | 16 | 15 | 20 | 50 | 1.50 | 1.5 % |"
    assert "1 to 2 answered requests a line" in lines[-1]
    video = [{**row, "case": "other", "frames": "8"} for row in rows[:5]]
    assert "| 8 | 64 of 8 frames | vllm-dense |" in vllm_load_rows.vllm_load_table(video)
    failed = [{**rows[0], "note": "not reached in 9 minutes", "p50": ""}]
    assert "| not reached in 9 minutes | – |" in vllm_load_rows.vllm_load_table(failed)
    assert vllm_load_rows.vllm_load_table([]).startswith("No rows yet")
    with pytest.raises(ValueError, match="differ in gpu"):
        vllm_load_rows.vllm_load_table([*rows, {**rows[0], "case": "other", "gpu": "H"}])


def test_stored_rows_say_where_they_come_from():
    for row in vllm_load_rows.read_vllm_load():
        assert row["commit"] not in ("", "unknown")
        assert "dirty" not in row["commit"]
        assert row["command"].startswith("python -m benchmark.bench_vllm_load")
        assert "--append-to" not in row["command"]
        assert row["vllm"]
