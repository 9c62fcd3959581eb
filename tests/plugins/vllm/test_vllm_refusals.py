"""What engines and requests are refused for, with vLLM."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.config")  # tests/plugins/vllm by itself would do for "vllm"

from reference import Prompt

pytestmark = pytest.mark.timeout(900)


def test_requests_that_cannot_be_served_leave_the_engine_alive(ask):
    good = Prompt(images=((4, 9, 1),), options={"keep": 0.5})
    wrong = {
        "there is no selector 'divprun'": {"selector": "divprun"},
        "inside the decoder": {"selector": "span"},
        "only the engine may name a module": {"selector": "os:getcwd"},
        "did you mean 'keep'": {"kep": 0.5},
    }
    batches = [[Prompt(images=((4, 9, 1),), options=options)] for options in wrong.values()]
    # The text itself holds a placeholder for which no image was given.
    batches.append([Prompt("what is <|image_pad|> the picture", images=((4, 9, 1),))])
    found = ask("qwen2_5_vl", [*batches, [good]], hf_overrides={"sparsevlm": {"min_keep": 2}})
    for says, (answer,) in zip([*wrong, "1 placeholders of images or videos beside"], found, strict=False):
        assert says in answer
    assert found[-1][0][1], "the engine still answers"


def test_without_options_of_the_engine_a_request_is_told_how_to_start_it(ask):
    ((answer,),) = ask("qwen2_5_vl", [[Prompt(images=((4, 9, 1),), options={"keep": 0.5})]])
    assert "the engine was started without pruning" in answer


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"video_pruning_rate": 0.5}, "video_pruning_rate=0.5"),
        ({"hf_overrides": {"sparsevlm": {"keep": 1.5}}}, r"keep as a fraction must be in (0, 1\], got 1.5"),
    ],
    ids=["pipeline", "own pruning", "budget"],
)
def test_engines_that_cannot_prune_do_not_start(engine, says, ask):
    with pytest.raises(AssertionError) as told:
        ask("qwen2_5_vl", [], **{"hf_overrides": {"sparsevlm": {"keep": 0.5}}, **engine})
    assert says.replace("\\", "") in str(told.value)
