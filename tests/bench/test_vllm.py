"""vLLM's rows, with a module of that name that answers with as many tokens as it is asked for."""

from __future__ import annotations

import os

import pytest
import torch

from sparsevlm.bench import shapes
from sparsevlm.bench.cases import Case, MixedCase, PictureCase
from sparsevlm.bench.checkpoint import write_checkpoint_files
from sparsevlm.bench.rounds import Settings
from sparsevlm.bench.run import run
from sparsevlm.bench.vllm_dense import measure_vllm, vllm_is_installed

FAKE = """
import json, pathlib, time, types

__version__ = "9.9"
RequestOutput = "outputs of requests"


def SamplingParams(**options):
    return types.SimpleNamespace(**options)


class LLM:
    def __init__(self, model, max_model_len, load_format="auto", compilation_config=None, **options):
        CONDITION
        assert json.loads((pathlib.Path(model) / "config.json").read_text())["model_type"] == "qwen2_5_vl"
        print("loading", load_format)
        self.waiting, self.longest = [], max_model_len

    def _preprocess_cmpl(self, prompts):
        for prompt in prompts:
            width, height = prompt["multi_modal_data"]["image"].size
            start, pad, end = (prompt["prompt_token_ids"].index(i) for i in (151652, 151655, 151653))
            assert (start, pad, end) == (8, 9, 10)
            n = len(prompt["prompt_token_ids"]) - 1 + width * height // 28**2
            assert n <= self.longest
            yield n

    def _add_request(self, n, params):
        self.waiting.append((n, params))

    def _run_engine(self, output_type, use_tqdm):
        assert output_type == RequestOutput
        begin, done = time.monotonic(), []
        time.sleep(0.005)
        for n, params in self.waiting:
            first = time.monotonic()
            time.sleep(0.002 * (params.max_tokens - 1))
            metrics = types.SimpleNamespace(scheduled_ts=begin, first_token_ts=first)
            answer = types.SimpleNamespace(token_ids=[0] * params.max_tokens)
            done.append(types.SimpleNamespace(prompt_token_ids=[0] * n, outputs=[answer], metrics=metrics))
        self.waiting = []
        return done
"""
CASES = (Case(100, 2, 4), PictureCase(168), MixedCase(3, 2, (36, 64), (20, 40)))
SETTINGS = Settings((0.5,), seconds=0.1, iterations=4, warmup=1, vision_keep=1.0, selectors=())


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measures the cases by a module of that name."""
    folder = tmp_path / "model"
    folder.mkdir()
    with torch.device("meta"):
        config = shapes.empty_model("tiny", torch.float32, "sdpa").config
    write_checkpoint_files(config, folder)

    def measure(condition="pass"):
        (tmp_path / "vllm.py").write_text(FAKE.replace("CONDITION", condition))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.syspath_prepend(str(tmp_path))
        assert vllm_is_installed()
        return measure_vllm(folder, config, CASES, SETTINGS, dtype="float32", is_random=True)

    return measure


def test_times(measured):
    found = measured()
    equal, picture, mixed = (found[case.name] for case in CASES)
    assert not any(one.note for one in found.values())
    assert equal.remark == "vllm 9.9, encoder graphs on, preprocessing not counted"
    assert picture.remark == "vllm 9.9, encoder graphs on"
    assert len(equal.times) == 4
    for times in equal.times:
        assert set(times) == {"preprocess", "first_token", "total", "decode_per_token"}
        assert 5 < times["first_token"] < times["total"]
        assert times["total"] == pytest.approx(times["first_token"] + 3 * times["decode_per_token"])
    assert all(times["first_token"] == times["total"] > 5 + times["preprocess"] for times in picture.times)
    assert list(mixed.by_request) == [0, 1, 2]


def test_rows_stand_beside_those_of_the_others(measured):
    model = shapes.random_model("tiny", "cpu", torch.float32, "sdpa", layers=6)
    origin = {"commit": "abc", "model": "tiny", "command": "sparsevlm bench"}
    rows = run(model, CASES, SETTINGS, origin, vllm=measured())
    for case in CASES:
        of_case = [row for row in rows if row["case"] == case.name]
        theirs = [row for row in of_case if row["provider"] == "vllm-dense"]
        assert {row["path"] for row in theirs} == {"vllm"}
        assert {row["timestamp"] for row in of_case} == {theirs[0]["timestamp"]}
        dense = {(row["phase"], row["metric"]): row["floor"] for row in of_case if row["provider"] == "hf-dense"}
        for row in theirs:
            assert row["floor"] == dense.get((row["phase"], row["metric"]), row["floor"])
    assert any(row["metric"] == "x" for row in rows if row["provider"] == "vllm-dense")


def test_options_that_a_version_does_not_know(measured):
    found = measured("assert load_format == 'dummy'\n        if compilation_config: raise ValueError('what is that')")
    assert found[CASES[0].name].remark == "vllm 9.9, encoder graphs off, preprocessing not counted"


def test_what_fails_is_a_note(measured):
    found = measured("raise RuntimeError('no memory')")
    assert {one.note for one in found.values()} == {"failed with exit code 1: RuntimeError: no memory"}
    found = measured("self._preprocess_cmpl = lambda prompts: [7 for _ in prompts]")
    assert found[CASES[1].name].note.startswith("failed: RuntimeError: prompts of [7] tokens, not of [78]")
    assert all(one.note for one in found.values())
