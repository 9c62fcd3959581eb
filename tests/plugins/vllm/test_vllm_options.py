"""Options of the plugin, and what engines are refused for, without vLLM."""

from __future__ import annotations

import sys

import pytest

from sparsevlm import SparseVLMConfig
from sparsevlm.plugins.vllm.budget import kept_per_run
from sparsevlm.plugins.vllm.compat import check_vllm, is_tested
from sparsevlm.plugins.vllm.options import Options, available
from sparsevlm.selection.budget import plan_budget
from sparsevlm.selection.selectors import make_selector
from sparsevlm.selection.selectors.divprune import DivPruneSelector


def test_options_of_a_request_take_the_engines_place():
    engine = Options.of_engine({"keep": 0.5, "min_keep": 4})
    assert engine.of_request(None) == engine
    assert engine.of_request({"keep": 9, "selector": "mmtok"}) == Options(9, "mmtok", 4)
    assert Options.of_engine({}) == Options(keep=1.0)


def test_who_names_no_selector_gets_the_one_of_the_library():
    assert Options.of_engine({"keep": 0.5}).chooser[0] == make_selector(SparseVLMConfig(keep=0.5))
    assert Options.of_engine({"selector": "mmtok"}).of_request({"keep": 0.5}).selector == "mmtok"


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"keep": 1.5}, ValueError, r"keep as a fraction must be in \(0, 1\], got 1.5"),
        ({"keep": 0}, ValueError, "keep as a number of tokens must be at least 1"),
        ({"keep": [0.5, 0.5]}, TypeError, "keep must be one budget"),
        ({"selector": "divprun"}, ValueError, "did you mean 'divprune'"),
        ({"selector": "span"}, ValueError, "inside the decoder, where vLLM gives all layers of a request one length"),
        ({"selector": "visionzip"}, ValueError, "reads vision_attention, vision_keys inside the vision tower"),
        ({"selector": 3}, TypeError, "selector must be a name, got 3"),
        ({"selector": "no.module:Here"}, ValueError, "cannot be imported"),
        ({"keeps": 0.5}, TypeError, r"did you mean 'keep'.*the options are keep, selector, min_keep, seed\.$"),
        ({"recycle": False}, TypeError, "that are read inside the decoder do nothing here"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        (0.5, TypeError, r"hf_overrides\['sparsevlm'\] must be a dict"),
    ],
)
def test_wrong_options_say_what_is_right(given, error, says):
    with pytest.raises(error, match=says):
        Options.of_engine(given)


def test_what_cannot_run_is_told_with_what_can():
    assert set(available()) == {"cdpruner", "divprune", "grid", "mmtok", "random", "span-features", "tome"}
    with pytest.raises(
        ValueError, match="Under vLLM there are cdpruner, divprune, grid, mmtok, random, span-features, tome"
    ):
        Options.of_engine({"selector": "fastv"})


def test_only_an_engine_names_a_module():
    name = f"{DivPruneSelector.__module__}:DivPruneSelector"
    engine = Options.of_engine({"selector": name})
    assert isinstance(engine.chooser[0], DivPruneSelector)
    assert engine.of_request({"keep": 0.5}).selector == name
    with pytest.raises(ValueError, match="only the engine may name a module"):
        Options().of_request({"selector": name})
    with pytest.raises(ValueError, match="only the engine may name a module"):
        Options().of_request({"selector": "antigravity:fly"})
    assert "antigravity" not in sys.modules  # nothing is imported for a request


def test_keys_tell_choices_apart():
    variants = [
        Options(keep=1), Options(keep=1.0), Options(keep=0.5), Options(selector="mmtok"), Options(min_keep=3),
        Options(seed=1), Options(text=(1, 2)), Options(text=(1, 3)),
    ]  # fmt: skip
    assert len({one.key() for one in variants}) == len(variants)
    for one in variants:
        again = Options.from_key(one.key())
        assert again == one
        assert type(again.keep) is type(one.keep)


def test_only_guided_selectors_read_the_text():
    assert {name for name in available() if Options(selector=name).reads_text} == {"cdpruner", "mmtok"}


def test_untested_versions_are_refused(monkeypatch):
    monkeypatch.delenv("SPARSEVLM_ALLOW_UNTESTED_VLLM", raising=False)
    check_vllm("0.25.0")
    check_vllm("0.32.0")
    check_vllm("0.32.0+cpu")
    assert not is_tested("0.33.0")
    with pytest.raises(ImportError, match=r"vLLM 0\.33\.0 is installed.*0\.32\.0"):
        check_vllm("0.33.0")
    monkeypatch.setenv("SPARSEVLM_ALLOW_UNTESTED_VLLM", "1")
    check_vllm("0.33.0")


@pytest.mark.parametrize("keep", [1, 7, 40, 1000, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("n_visual", [1, 20, 100])
def test_an_image_keeps_what_it_does_before_the_decoder_of_transformers(n_visual, keep):
    (of_28_layers,) = plan_budget(keep, "single", n_visual, (-1,), 28, 8).counts
    assert kept_per_run([n_visual], Options(keep=keep, min_keep=8)) == [of_28_layers]


def test_frames_share_the_count_evenly():
    assert kept_per_run([10] * 4, Options(keep=0.5, min_keep=1)) == [5, 5, 5, 5]
    assert kept_per_run([10] * 4, Options(keep=11, min_keep=1)) == [2, 3, 3, 3]
    assert kept_per_run([10] * 4, Options(keep=2, min_keep=1)) == [1, 1, 1, 1]  # a frame that stands apart needs one
    assert kept_per_run([10] * 4, Options(keep=1.0)) == [10, 10, 10, 10]


class Given:
    """Anything with the attributes that are asked for."""

    def __init__(self, **values):
        vars(self).update(values)


def engine(given, architectures=("Qwen2_5_VLForConditionalGeneration",), stages=1, speculative=None, **of_inputs):
    mm_config = Given(**{"video_pruning_rate": None, "mm_processor_kwargs": None, **of_inputs})
    return Given(
        model_config=Given(
            hf_config=Given(**({} if given is None else {"sparsevlm": given})),
            architectures=list(architectures),
            multimodal_config=mm_config,
        ),
        parallel_config=Given(pipeline_parallel_size=stages),
        speculative_config=speculative,
        lora_config=None,
    )


REFUSED = {
    "pipeline": ({"stages": 2}, NotImplementedError, "pipeline_parallel_size=2: .*Use tensor_parallel_size"),
    "own pruning": ({"video_pruning_rate": 0.5}, NotImplementedError, "video_pruning_rate=0.5: vLLM's own pruning"),
    "model": ({"architectures": ("LlavaForConditionalGeneration",)}, NotImplementedError, "covers Qwen2VL"),
    "place": ({"mm_processor_kwargs": {"sparsevlm": {}}}, ValueError, "which is for requests"),
    "drafts": ({"speculative": object()}, NotImplementedError, "speculative decoding was not tested"),
}


@pytest.mark.parametrize(("options", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_engines_that_cannot_prune_are_refused(options, error, says, monkeypatch):
    from sparsevlm.plugins.vllm import checks

    monkeypatch.setattr(checks, "check_vllm", lambda: None)
    with pytest.raises(error, match=says):
        checks.check_engine(engine({"keep": 0.5}, **options))
    checks.check_engine(engine(None, **options))  # who asks for nothing is left alone


def test_the_decoder_of_an_engine_that_passed_is_not_refused(monkeypatch):
    """vLLM builds it from a copy of the model's configuration that names another architecture."""
    from sparsevlm.plugins.vllm import checks

    monkeypatch.setattr(checks, "check_vllm", lambda: None)
    decoder = engine({"keep": 0.5}, architectures=("Qwen2ForCausalLM",))
    with pytest.raises(NotImplementedError, match="was given for Qwen2ForCausalLM"):
        checks.check_engine(decoder)
    decoder.model_config.config_updated = True
    checks.check_engine(decoder)
