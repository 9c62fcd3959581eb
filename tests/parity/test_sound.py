"""Sound in the prompt of a model that hears: not visual, and heard as before."""

from __future__ import annotations

import sys

import pytest
import torch
from oracle import dropped_from, masked_run
from runs import GREEDY

from sparsevlm import apply_sparsevlm
from toys import AUDIO, AUDIO_END, AUDIO_START, make_inputs, relative_error, tiny_model

OPTIONS = {"keep": 0.5, "min_keep": 3, "selector": "sparsevlm", "target_layers": [1, 3], "recycle": False}


def with_sound(name, n_frames=20):
    """An image, and a question that is spoken."""
    inputs = make_inputs([("text", 2), ("image", 4, 6), ("text", 34)], family=name)
    module = sys.modules[type(tiny_model(name)).__module__]
    length = ((n_frames - 1) // 2 + 1 - 2) // 2 + 1
    if name == "qwen3_omni_moe_thinker":
        count, window = module._get_feat_extract_output_lengths, tiny_model(name).config.audio_config.n_window
        given = (torch.tensor([n_frames]), window)
        length = int(count(*given[: count.__code__.co_argcount]))
    ids = inputs["input_ids"][0]
    ids[-33 : -31 + length] = torch.tensor([AUDIO_START, *[AUDIO] * length, AUDIO_END])
    features = torch.randn(1, 16, n_frames, generator=torch.Generator().manual_seed(1))
    return {**inputs, "input_features": features, "feature_attention_mask": torch.ones(1, n_frames).long()}


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_sound_is_not_visual(name, place):
    model, inputs = tiny_model(name), with_sound(name)
    state = apply_sparsevlm(model, **OPTIONS, raters="all")
    output = model.generate(**inputs, **GREEDY)
    (sample,) = state.report.samples
    assert sample.n_visual == 24
    assert sample.final_tokens < 12
    heard = (inputs["input_ids"][0] == AUDIO).nonzero().squeeze(-1).tolist()
    assert heard
    assert not set(heard) & set(sample.visual_positions)
    assert set(sample.stages[0].raters) & set(heard)  # a spoken question votes
    state.detach()
    logits = masked_run(model, inputs, output.sequences[:, :-1], [dropped_from(state.report, 0)]).logits
    start = inputs["input_ids"].shape[1] - 1
    assert all(relative_error(got, logits[:, start + i]) <= place.tolerance for i, got in enumerate(output.logits))
