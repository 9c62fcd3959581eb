"""The engine against the plain path, step by step: on a CPU in float32, on a GPU as it runs there."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import TASKS, draw_example
from sparsevlm.selection.selectors.span import SpanSelector
from toys import PROMPTS, make_inputs, relative_error, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
PLACES = [
    pytest.param("cpu", torch.float32, 1e-5, id="cpu"),
    pytest.param("cuda", torch.float16, 1e-2, id="fp16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 6e-2, id="bf16", marks=pytest.mark.gpu),
]


class Teacher(LogitsProcessor):
    """Notes the scores of every step and lets generate say what another run has said, if there was one."""

    def __init__(self, said=None):
        self.scores, self._said = [], said

    def __call__(self, input_ids, scores):
        self.scores.append(scores.float().clone())
        if self._said is None:
            return scores
        token = self._said[:, len(self.scores) - 1]
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def run(model, inputs, n_new, said=None, **options):
    teacher = Teacher(said)
    processors = LogitsProcessorList([teacher])
    length = {"min_new_tokens": n_new, "max_new_tokens": n_new, "do_sample": False}
    output = model.generate(**inputs, **length, logits_processor=processors, **options)
    return output[:, inputs["input_ids"].shape[1] :], teacher.scores


def chosen_without_values(self, states, valid, n_keep, search=None):
    """The same rows whatever the states are: what rounding changes is seen in the logits alone."""
    n = states.shape[1]
    score = (torch.arange(n, device=states.device) * 7919) % 1009
    return score.expand_as(valid).masked_fill(~valid, 2000 + n).argsort(dim=-1, stable=True)[:, :n_keep]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("options", [{}, {"keep": 1.0}, {"selector": "random"}])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
def test_logits_under_the_same_choice(device, dtype, tolerance, prompt, options, family, monkeypatch):
    monkeypatch.setattr(SpanSelector, "order", chosen_without_values)
    model = tiny_model(family).to(device, dtype)
    inputs = {name: value.to(device) for name, value in make_inputs(*PROMPTS[prompt]).items()}
    if family == "qwen2_vl":
        inputs.pop("second_per_grid_ts", None)  # it does not take that
    state = apply_sparsevlm(model, **{**OPTIONS, **options})
    said, wanted = run(model, inputs, 7)
    kept = [[stage.kept for stage in sample.stages] for sample in state.report.samples]
    with state.options(engine=True):
        for _ in range(2):  # the second time by what was recorded
            _, found = run(model, inputs, 7, said)
            assert state.report.path == "engine"
            assert [[stage.kept for stage in sample.stages] for sample in state.report.samples] == kept
            for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
                assert relative_error(one, other) < tolerance, step


def scene_batches(processor, n_scenes, batch):
    """Questions of all tasks over hold-out scenes, with the processor's inputs."""
    for task in TASKS:
        for seeds in (range(n, min(n_scenes, n + batch)) for n in range(0, n_scenes, batch)):
            examples = [draw_example(task, 700_000 + seed, "square") for seed in seeds]
            prompts = []
            for example in examples:
                content = [{"type": "image"}] * len(example.images) + [{"type": "text", "text": example.question}]
                message = [{"role": "user", "content": content}]
                prompts.append(processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            images = [list(example.images) for example in examples]
            yield processor(text=prompts, images=images, return_tensors="pt", padding=True)


@pytest.mark.parametrize(
    ("device", "dtype", "n_scenes"),
    [
        pytest.param("cpu", torch.float32, 1, id="cpu"),
        pytest.param("cuda", torch.bfloat16, 50, id="bf16", marks=pytest.mark.gpu),  # 500 prompts
    ],
)
def test_the_trained_model_says_and_keeps_the_same(device, dtype, n_scenes):
    """Every token kept by one path alone, and every first word that differs, is a near tie."""
    model = load_model(bundled_path(), dtype=str(dtype).removeprefix("torch."), device=device)
    processor = load_processor(bundled_path(), local_files_only=True)
    state = apply_sparsevlm(model, keep=0.25)
    n_kept = n_shared = n_answers = n_same = 0
    for batch in scene_batches(processor, n_scenes, 25):
        inputs = batch.to(device)
        said, wanted = run(model, inputs, 8)
        plain = [set(sample.stages[0].kept) for sample in state.report.samples]
        with state.options(engine=True):
            again, _ = run(model, inputs, 8)
            _, found = run(model, inputs, 8, said)
            assert state.report.path == "engine"
        for b, kept in enumerate(plain):
            mine = set(state.report.samples[b].stages[0].kept)
            assert len(mine) == len(kept)
            n_kept += len(kept)
            n_shared += len(kept & mine)
            n_answers += 1
            differs = (said[b] != again[b]).nonzero()
            n_same += not len(differs)
            if len(differs):
                step = int(differs[0])
                scores = wanted[step][b]
                gap = float(scores[said[b, step]] - scores[again[b, step]])
                # By as much as the paths differ for this sample, the two words may change places.
                difference = (found[step][b] - scores)[scores.isfinite()].abs().max()
                assert gap <= 2 * float(difference), (b, step, gap)
    print(f"kept alike: {n_shared} of {n_kept}; answers alike: {n_same} of {n_answers}")
    assert n_shared >= 0.99 * n_kept
    assert n_same >= 0.97 * n_answers
