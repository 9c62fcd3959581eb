"""What a model can run, before it is loaded."""

import pytest

from sparsevlm.evaluation import ALL, EvalConfig, make_settings
from sparsevlm.evaluation.execution.feasible import feasible_settings
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
    assert {"dense", "fastv-keep0.6", "hiprune-keep0.2", "downsample-keep0.2"} <= {setting.name for setting in left}
    assert "keep=0.2 cannot hold" in unsupported["fastv-keep0.2"]


def test_what_was_named_has_to_run(folder):
    config = EvalConfig("demo", "m", ("grid", "fastv"), (0.6, 0.2), target_layers=(2, 4))
    with pytest.raises(ValueError, match=r"grid-keep0\.2 cannot run: keep=0\.2 cannot hold"):
        feasible_settings(config, folder)


def test_dense_alone_can_be_asked_for(folder):
    assert [setting.name for setting in feasible_settings(EvalConfig("demo", "m", ("dense",)), folder)[0]] == ["dense"]
