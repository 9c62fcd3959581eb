"""vLLM with the plugin answers what the transformers path does with the same selector before the decoder."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("vllm.config")  # tests/plugins/vllm by itself would do for "vllm"

from reference import Prompt

from sparsevlm.plugins.vllm.options import Options
from sparsevlm.selection.selectors import DEFAULT

pytestmark = pytest.mark.timeout(900)
ENGINE_OPTIONS = {"keep": 0.5, "min_keep": 3}
LANDSCAPE, PORTRAIT, SMALL = (4, 9, 1), (8, 3, 2), (3, 5, 3)
SELECTORS = ("divprune", "span-features", "cdpruner", "mmtok", "tome", "random", "grid")
VIDEO, LONG_VIDEO = (6, 7, 5), (16, 16, 2)


def prompts() -> list[Prompt]:
    """Every selector on one image, and the default and a guided one on everything else."""
    found = [Prompt(images=(LANDSCAPE,), options={"selector": name}) for name in SELECTORS]
    for name in (DEFAULT, "mmtok"):
        found += [
            Prompt(images=(PORTRAIT,), options={"selector": name, "keep": 0.25}),
            Prompt(images=(PORTRAIT, LANDSCAPE), options={"selector": name, "keep": 9}),
            Prompt("is the picture in the video", images=(SMALL,), video=VIDEO, options={"selector": name}),
            Prompt("what is in the video", video=VIDEO, options={"selector": name, "keep": 0.2}),
        ]
    found += [
        Prompt(images=(LANDSCAPE,)),
        Prompt("is the picture in the picture", images=(LANDSCAPE,), options={"selector": "mmtok"}),
        Prompt(images=(LANDSCAPE, LANDSCAPE, SMALL), options={"keep": 0.9, "selector": "tome"}),
        Prompt(images=(SMALL,), options={"keep": 1.0}),
        Prompt("what is in the video", video=LONG_VIDEO, options={"keep": 0.2}),
        Prompt("what is the video"),
    ]
    return found


def check(found, asked, reference) -> None:
    """Compare batches of answers, all of them, with the reference's."""
    options, wrong = Options.of_engine(ENGINE_OPTIONS), []
    for answers, batch in zip(found, asked, strict=True):
        assert len(answers) == len(batch), answers
        for answer, prompt in zip(answers, batch, strict=True):
            if answer[:2] != list(reference.answer(prompt, options)):
                wrong.append((prompt, answer, reference.answer(prompt, options)))
    assert not wrong, "\n".join(map(str, wrong))


WAYS = {
    "plain": {"enable_prefix_caching": False},
    "prefix cache": {"enable_prefix_caching": True},
    "chunks": {"enable_prefix_caching": False, "max_num_batched_tokens": 40, "max_num_seqs": 4},
    "chunks and prefix cache": {"enable_prefix_caching": True, "max_num_batched_tokens": 33, "max_num_seqs": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_qwen2_5_vl(way, ask, reference):
    """One by one, again, and all at once."""
    asked = prompts()
    batches = [*([one] for one in asked), *([one] for one in asked[len(SELECTORS) : len(SELECTORS) + 4]), asked]
    found = ask("qwen2_5_vl", batches, hf_overrides={"sparsevlm": ENGINE_OPTIONS}, **WAYS[way])
    check(found, batches, reference("qwen2_5_vl")[1])
    again = list(itertools.chain.from_iterable(found[len(asked) : -1]))
    assert any(answer[2] for answer in again) == WAYS[way]["enable_prefix_caching"]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_other_families(kind, ask, reference):
    # Written times of frames are text that transformers shows a guided selector, and vLLM's processor writes them late.
    asked = [one for one in prompts() if not ("qwen3" in kind and one.video and one.options.get("selector") == "mmtok")]
    batches = [asked, *([one] for one in asked[5:10])]
    way = {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    found = ask(kind, batches, dummies=True, hf_overrides={"sparsevlm": ENGINE_OPTIONS}, **way)
    check(found, batches, reference(kind)[1])


def test_two_ranks(ask, reference):
    batches = [prompts()]
    engine = {"hf_overrides": {"sparsevlm": ENGINE_OPTIONS}, "tensor_parallel_size": 2, "max_num_batched_tokens": 64}
    check(ask("qwen2_5_vl", batches, **engine), batches, reference("qwen2_5_vl")[1])


def test_dense_stays_dense(ask, reference):
    """An engine without options, and one with options that keeps all."""
    dense = [Prompt(images=(LANDSCAPE, PORTRAIT)), Prompt("what is in the video", video=VIDEO)]
    kept = [Prompt(one.text, one.images, one.video, {"keep": 1.0}) for one in dense]
    of_reference = [list(reference("qwen2_5_vl")[1].answer(one, Options())) for one in dense]
    (without,) = ask("qwen2_5_vl", [dense])
    (within,) = ask("qwen2_5_vl", [kept], hf_overrides={"sparsevlm": ENGINE_OPTIONS})
    assert [one[:2] for one in without] == [one[:2] for one in within] == of_reference
