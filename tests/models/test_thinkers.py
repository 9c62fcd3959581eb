"""Thinkers of models that hear and speak: the whole model around one, speech."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.models import adapter_for
from toys import AUDIO_END, AUDIO_START, PROMPTS, make_inputs, tiny_model

THINKERS = {"qwen2_5_omni_thinker": "Qwen2_5Omni", "qwen3_omni_moe_thinker": "Qwen3OmniMoe"}
OPTIONS = {"keep": 0.5, "min_keep": 3, "selector": "sparsevlm", "target_layers": [1, 3], "recycle": False}


def whole_model(name):
    """As loaded without the part that speaks."""
    thinker, kind = tiny_model(name), THINKERS[name]
    config = getattr(transformers, f"{kind}Config")(thinker_config=thinker.config, enable_audio_output=False)
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    whole.thinker, whole.talker, whole.speaker_map = thinker, nn.Module(), {"Chelsie": {}}
    whole.talker.codec_pad_token = 0
    return whole


def answer(whole, inputs):
    """In text alone."""
    wish = {"generation_mode": "text"} if "2_5" in whole.thinker.config.model_type else {"return_audio": False}
    output = whole.generate(**inputs, thinker_max_new_tokens=4, **wish)
    output = output[0] if isinstance(output, tuple) else output
    return getattr(output, "sequences", output)


@pytest.mark.parametrize("name", THINKERS)
def test_the_whole_model_is_refused_and_its_thinker_prunes(name):
    whole, inputs = whole_model(name), make_inputs(*PROMPTS["one image"], family=name)
    with pytest.raises(NotImplementedError, match=r"is not supported.*pass what sees and writes, model\.thinker"):
        apply_sparsevlm(whole)
    dense = answer(whole, inputs)
    state = apply_sparsevlm(whole.thinker, **OPTIONS)
    answer(whole, inputs)
    assert (state.report.n_visual, state.report.samples[0].layer_tokens[0]) == (24, 24)
    assert state.report.final_tokens < 12
    with pytest.raises(ValueError, match=r"pass that.*model\.thinker"):
        remove_sparsevlm(whole)
    remove_sparsevlm(whole.thinker)
    assert not state.attached
    again = answer(whole, inputs)
    assert torch.equal(again, dense)


@pytest.mark.parametrize("name", THINKERS)
def test_speech_of_a_pruned_prompt_is_refused(name):
    model, inputs = tiny_model(name), make_inputs(*PROMPTS["one image"], family=name)
    speech = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    apply_sparsevlm(model, **OPTIONS)
    with pytest.raises(NotImplementedError, match="return_audio=False"):
        model.generate(**inputs, **speech)
    only_text = make_inputs([("text", 6)], family=name)
    assert len(model.generate(**only_text, **speech).hidden_states) == 2
    remove_sparsevlm(model)
    assert len(model.generate(**inputs, **speech).hidden_states) == 2


@pytest.mark.parametrize("name", THINKERS)
def test_marks_of_sound_never_vote(name):
    assert {AUDIO_START, AUDIO_END} <= adapter_for(tiny_model(name)).special_token_ids
