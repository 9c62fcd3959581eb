"""Models whose weights are spread over two processes: both keep the tokens that one process keeps, and say so."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

import sparsevlm
import two_ranks
from sparsevlm import apply_sparsevlm
from toys import relative_error, tiny_model

pytest.importorskip("accelerate", reason="transformers loads tensor-parallel models with accelerate")
WHERE = ["cpu", *[pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()]
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-5}
SEEN = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "cuda": {}}


class Ranks:
    """What both processes have found: reports and errors by case, and tensors."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
        self.tensors = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.fixture(scope="module", params=WHERE)
def ranks(request, tmp_path_factory):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("ranks")
    for family in two_ranks.FAMILIES:
        tiny_model(family).save_pretrained(folder / family)
    paths = (str(Path(sparsevlm.__file__).parents[1]), str(Path(two_ranks.__file__).parent))
    shared = {**os.environ, **SEEN[request.param], "PYTHONPATH": os.pathsep.join(paths), "WORLD_SIZE": "2"}
    both = subprocess.Popen(
        [sys.executable, two_ranks.__file__, str(folder), request.param],
        env=shared,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = both.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(both.pid, signal.SIGKILL)
    assert both.returncode == 0, errors
    return Ranks(folder, request.param)


@pytest.mark.parametrize("case", [*two_ranks.cases(), "draws"])
def test_ranks_are_alike(ranks, case):
    first, second = (found[case] for found in ranks.found)
    assert first == second
    samples = first["report"]["samples"]
    assert any(stage["kept"] and len(stage["kept"]) < stage["n_in"] for one in samples for stage in one["stages"])
    assert len(set(first["lengths"])) > 1 or samples[0]["stages"][0]["layer"] == -1
    for part in ("logits", "sequences"):
        assert torch.equal(*(tensors[f"{case}/{part}"] for tensors in ranks.tensors))


@pytest.mark.parametrize("case", two_ranks.cases())
def test_ranks_answer_as_one_process(ranks, case):
    family, prompt, options = two_ranks.cases()[case]
    model = tiny_model(family).to(ranks.device)
    wanted, tensors = two_ranks.answer(
        model, {**options, "engine": False}, two_ranks.inputs_of(family, prompt, ranks.device)
    )
    found = ranks.found[0][case]
    assert found["report"]["samples"] == wanted["report"]["samples"]
    assert found["lengths"] == wanted["lengths"]
    assert torch.equal(ranks.tensors[0][f"{case}/sequences"], tensors["sequences"])
    assert relative_error(ranks.tensors[0][f"{case}/logits"], tensors["logits"]) <= TOLERANCE[ranks.device]


def test_the_engine_stands_back(ranks):
    for found in ranks.found:
        report = found["engine"]["report"]
        assert report["path"] == "plain"
        assert "a tensor-parallel model" in report["path_reason"]


def test_all_ranks_are_told_of_an_error_of_the_one_that_chooses(ranks):
    first, second = (found["fails"] for found in ranks.found)
    assert first == "KeyError: 'no tokens today'"
    assert second.startswith("RuntimeError: the first rank, which chooses the tokens of all, has failed: KeyError")


def test_other_options_on_another_rank_are_refused_on_both(ranks):
    for found in ranks.found:
        assert found["other options"].startswith("RuntimeError: the ranks of a tensor-parallel model were given diff")


def test_weights_that_torch_has_spread_are_refused(ranks):
    for found in ranks.found:
        assert "layers.1.mlp.up_proj.weight is spread over processes by other means" in found["by other means"]
        assert "Load with tp_plan='auto'" in found["by other means"]


def test_sharded_copies_answer_each_for_itself(ranks):
    for rank in range(2):
        model, inputs = tiny_model().to(ranks.device), two_ranks.own_prompt(rank, ranks.device)
        wanted, tensors = two_ranks.answer(model, two_ranks.SELECTED["attention of the text"], inputs)
        assert ranks.found[rank]["fsdp"]["report"]["samples"] == wanted["report"]["samples"]
        error = relative_error(ranks.tensors[rank]["fsdp/logits"], tensors["logits"])
        assert error <= TOLERANCE[ranks.device]


def test_a_part_of_a_pipeline_is_refused():
    model = tiny_model()
    model.model.language_model.layers[4] = PipelineIdentityLayer()
    with pytest.raises(NotImplementedError, match=r"pipeline-parallel .*language_model\.layers\.4 is on another rank"):
        apply_sparsevlm(model)
