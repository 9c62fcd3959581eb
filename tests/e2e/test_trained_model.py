"""The algorithm on the bundled trained model: real attention, real questions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene
from sparsevlm.selection import rank
from sparsevlm.selection.rank import sketch_rank

SEEDS = range(500_000, 500_003)


@pytest.fixture(scope="module")
def parts():
    model = load_model(bundled_path(), dtype="float32", device="cpu")
    return model, load_processor(bundled_path(), local_files_only=True)


def inputs_of(processor, scene, text):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[prompt], images=[scene.image], return_tensors="pt")


@pytest.fixture(scope="module")
def adaptive_runs(parts):
    """Rater attention and reports of rank-adaptive runs over several scenes and all tasks."""
    model, processor = parts
    matrices, samples = [], []

    def spy(matrix, tolerance):
        matrices.append(matrix.clone())
        return sketch_rank(matrix, tolerance)

    with pytest.MonkeyPatch.context() as patch, apply_sparsevlm(model, selector="span") as state:
        patch.setattr(rank, "sketch_rank", spy)
        for seed in SEEDS:
            scene = draw_scene(seed)
            for question in scene.questions:
                model.generate(**inputs_of(processor, scene, question.text), max_new_tokens=1)
                samples.append(state.report.samples[0])
    return matrices, samples


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.02, 0.001])
def test_the_sketch_is_the_svd_on_real_attention(adaptive_runs, tolerance):
    matrices, _ = adaptive_runs
    assert len(matrices) >= 50
    for matrix in matrices:
        energy = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
        wanted = int(np.searchsorted(np.cumsum(energy), (1 - tolerance) * energy.sum()) + 1)
        assert sketch_rank(matrix, tolerance) == wanted


def test_adaptive_counts_vary_with_picture_and_question(adaptive_runs):
    _, samples = adaptive_runs
    assert len({sample.layer_tokens for sample in samples}) >= 5
    for place in range(2):
        stages = [sample.stages[place] for sample in samples]
        assert len({stage.rank for stage in stages}) >= 3
        same_as_raters = sum(stage.rank == len(stage.raters) for stage in stages)
        assert same_as_raters <= 0.1 * len(stages)


def test_pruned_answers_are_right_where_dense_ones_are(parts):
    """A quarter of the tokens, by default; benchmark/results has rows of more scenes and tasks."""
    model, processor = parts
    right = {None: 0, "dense": 0, "random": 0}
    seeds = range(900_000, 900_008)
    for seed in seeds:
        scene = draw_scene(seed)
        question = scene.question("number")
        inputs = inputs_of(processor, scene, question.text)
        for name in right:
            options = {"keep": 1.0} if name == "dense" else {"keep": 0.25, "selector": name}
            with apply_sparsevlm(model, **options):
                output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            right[name] += text.strip() == question.answer
    assert min(right["dense"], right[None]) >= len(seeds) - 1
    assert right["random"] <= len(seeds) / 2


def test_dense_logits_are_bit_equal_with_hooks_attached(parts):
    model, processor = parts
    scene = draw_scene(3)
    inputs = inputs_of(processor, scene, scene.questions[0].text)
    options = {"max_new_tokens": 17, "min_new_tokens": 17, "return_dict_in_generate": True, "output_logits": True}
    dense = model.generate(**inputs, **options)
    with apply_sparsevlm(model, keep=1.0):
        hooked = model.generate(**inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, hooked.logits, strict=True))
