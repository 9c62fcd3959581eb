"""Cases of families whose tower the engine does not run, some through their real processors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsevlm.bench.cases import Case, PictureCase
from sparsevlm.bench.providers import _pruned_generate, make_providers
from sparsevlm.bench.rounds import Measurement, Settings, time_provider
from sparsevlm.bench.run import run
from sparsevlm.bench.workload import fresh_inputs
from toys import IS_OLD, tiny_model
from toys.processors import missing_packages, save_processor

SETTINGS = Settings((0.5,), iterations=1, warmup=1)
ORIGIN = {"commit": "abc", "model": "tiny", "command": "sparsevlm bench"}


@pytest.mark.parametrize(
    ("family", "n_visual"),
    [
        ("llava", 16),
        ("qwen3_vl", 16),
        ("internvl", 20),
        ("gemma3", 16),
        ("gemma4", 64),
        ("minicpmv4_6", 16 if IS_OLD else 80),
    ],
)
def test_rows(family, n_visual, tmp_path):
    if missing := missing_packages(family):
        pytest.skip(f"the processor of {family} needs {', '.join(missing)}: nox -s processors")
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    case = PictureCase(112, new_tokens=2)
    rows = run(model, [case], SETTINGS, ORIGIN, checkpoint=save_processor(family, tmp_path))
    names = {"hf-dense", "ours-default", "ours-dense", "ours", "ours-sparsevlm"}
    assert {row["provider"] for row in rows} - {"ours-engine"} == names
    assert {row["n_visual"] for row in rows} == {str(n_visual)}
    assert all(float(row["p50"]) > 0 for row in rows if row["metric"] == "ms")
    assert all(float(row["floor"]) > 0 for row in rows if row["phase"] == "vision" and row["metric"] == "ms")


@pytest.mark.parametrize(
    ("family", "n_visual", "batch"), [("mistral3", 16, 1), ("lighton_ocr", 16, 1), ("deepseek_vl", 18, 2)]
)
def test_numbers_of_tokens_that_images_come_in(family, n_visual, batch):
    rows = run(tiny_model(family), [Case(n_visual, batch, 2)], SETTINGS, ORIGIN)
    assert {row["n_visual"] for row in rows} == {str(n_visual)}
    assert {row["path"] for row in rows if row["provider"] == "ours-engine"} == {"engine"}
    assert all(float(row["p50"]) > 0 for row in rows if row["metric"] == "ms")


def test_a_selector_that_looks_into_the_tower_is_timed_on_hooks():
    """Where the engine was meant to run, as on a GPU, its row says why."""
    model, case = tiny_model("mistral3"), Case(64, 1, 2)
    *_, zipped = make_providers(model, (0.5,), static=False, selectors=["visionzip"])
    config = zipped.config.replace(engine=True)
    zipped = dataclasses.replace(zipped, config=config, generate=_pruned_generate(zipped.state, config))
    measured = Measurement.of(zipped)
    inputs = fresh_inputs(model, case, torch.Generator().manual_seed(0))
    assert time_provider(zipped, inputs, case.new_tokens, measured) is not None
    assert (measured.path, measured.note) == ("plain", "")
    assert "of a tower that is not the engine's" in measured.remark
