"""What a model can run, before it is loaded."""

import dataclasses

import pytest

from sparsevlm.evaluation import ALL, DENSE, DOWNSAMPLE, EvalConfig, make_settings
from sparsevlm.evaluation.execution.feasible import feasible_settings
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.selectors import SELECTORS
from tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    (folder / "model.safetensors").write_bytes(b"not looked at")
    return folder


def test_of_everything_the_rest_runs(folder):
    config = EvalConfig("demo", "m", (ALL,), (0.6, 0.2), target_layers=(2, 4))
    left, unsupported = feasible_settings(config, folder)
    assert {setting.name for setting in left} | set(unsupported) == {setting.name for setting in make_settings(config)}
    assert {"dense", "fastv-keep0.6", "downsample-keep0.2"} <= {setting.name for setting in left}
    assert "keep=0.2 cannot hold" in unsupported["fastv-keep0.2"]


def test_of_everything_what_runs_before_the_decoder_has_no_target_layers(folder):
    before = {name for name, selector in SELECTORS.items() if SelectorTraits.of(selector()).placement == BEFORE_DECODER}
    config = EvalConfig("demo", "m", (ALL,), (0.6,))
    assert before < {setting.selector for setting in feasible_settings(config, folder)[0]}
    left, unsupported = feasible_settings(dataclasses.replace(config, target_layers=(2, 4)), folder)
    assert {setting.selector for setting in left} == {DENSE, DOWNSAMPLE, *SELECTORS} - before
    reasons = [f"selector {name!r} runs before the decoder: leave target_layers unset." for name in sorted(before)]
    assert sorted(unsupported.values()) == reasons


@pytest.mark.parametrize("selectors", [("span-features",), ("grid", "divprune")], ids=" ".join)
def test_what_was_named_runs_at_the_target_layers_that_were_named(folder, selectors):
    config = EvalConfig("demo", "m", selectors, (0.6,), target_layers=(2, 4))
    with pytest.raises(ValueError, match=rf"{selectors[-1]}-keep0\.6 cannot run: .* leave target_layers unset"):
        feasible_settings(config, folder)


def test_what_was_named_has_to_run(folder):
    config = EvalConfig("demo", "m", ("grid", "fastv"), (0.6, 0.2), target_layers=(2, 4))
    with pytest.raises(ValueError, match=r"grid-keep0\.2 cannot run: keep=0\.2 cannot hold"):
        feasible_settings(config, folder)


def test_dense_alone_can_be_asked_for(folder):
    assert [setting.name for setting in feasible_settings(EvalConfig("demo", "m", ("dense",)), folder)[0]] == ["dense"]
