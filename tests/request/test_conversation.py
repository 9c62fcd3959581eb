"""What later questions under turns='refresh' cannot be asked, and what is said then."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sparsevlm import apply_sparsevlm
from sparsevlm.models import adapter_for
from sparsevlm.request.conversation import conversation_of
from sparsevlm.request.kept_features import rows_of
from toys import AUDIO, PROMPTS, make_inputs, split_visual, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [1, 3], "keep": 0.6, "turns": "refresh", "engine": False}
GREEDY = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [*range(80, 94)]}
IMAGE = [("text", 2), ("image", 4, 5), ("text", 4)]
TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def state(model):
    with apply_sparsevlm(model, **OPTIONS) as state:
        yield state


def answered(model, rows=PROMPTS["one image"], **more):
    """A cache that has served a first question, and all tokens so far."""
    cache, inputs = DynamicCache(), make_inputs(*rows)
    sequences = model.generate(**inputs, **GREEDY, past_key_values=cache, **more)
    return cache, sequences


def behind(sequences, *rows, seed=9):
    """Arguments of a later call: all tokens, and the pixels of the new ones."""
    more = make_inputs(*rows, seed=seed)
    more["input_ids"] = torch.cat([sequences, more["input_ids"]], dim=1)
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    del more["mm_token_type_ids"]
    return more


def refused(model, cache, kind, match, **inputs):
    """The call raises, and leaves the cache as it was."""
    layers = [(layer.keys, conversation_of(cache)) for layer in cache.layers]
    with pytest.raises(kind, match=match):
        model.generate(**{**GREEDY, **inputs}, past_key_values=cache)
    assert [(layer.keys, conversation_of(cache)) for layer in cache.layers] == layers


TEXT = [("text", 6)]


def test_a_cache_that_nothing_is_known_of(model, state):
    with state.options(turns="first"):
        cache, sequences = answered(model)
    unknown = "does not know the conversation in this DynamicCache"
    refused(model, cache, ValueError, unknown, **behind(sequences, TEXT))
    cache, sequences = answered(model)
    assert conversation_of(cache) is not None
    other = tiny_model()
    with apply_sparsevlm(other, **OPTIONS):
        refused(other, cache, ValueError, unknown, **behind(sequences, TEXT))
    with state.options(turns="first"):  # the remedy that the message names
        model.generate(**behind(sequences, TEXT), **GREEDY, past_key_values=cache)


def test_calls_that_cannot_prefill_again(model, state):
    cache, sequences = answered(model)
    inputs = behind(sequences, TEXT)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    refused(model, cache, NotImplementedError, "inputs_embeds without input_ids", **given)
    refused(model, cache, NotImplementedError, "an assistant model", **inputs, assistant_model=model)
    positions = torch.arange(6).expand(3, 1, 6)
    refused(model, cache, ValueError, "position_ids of 6 tokens", **inputs, position_ids=positions)
    alone = {"input_ids": inputs["input_ids"][:, -4:], "attention_mask": inputs["attention_mask"]}
    refused(
        model, cache, ValueError, "4 tokens and an attention_mask for 44 were given, and the cache holds 37", **alone
    )
    refused(model, cache, ValueError, "attention_mask for 3 were given", input_ids=inputs["input_ids"][:, -3:])


def test_pixels_and_placeholders_that_do_not_fit(model, state):
    cache, sequences = answered(model)
    with_image = behind(sequences, IMAGE)
    without = {name: value for name, value in with_image.items() if name in TOKENS}
    refused(model, cache, ValueError, "hold 20 placeholders of images or videos, and no pixels were", **without)
    old = {name: value for name, value in make_inputs(*PROMPTS["one image"]).items() if name not in TOKENS}
    refused(
        model,
        cache,
        ValueError,
        "hold 0 image placeholders, .* leave out pixel_values and image_grid_thw",
        **behind(sequences, TEXT),
        **old,
    )
    both = {name: torch.cat([value, with_image[name]]) for name, value in old.items()}
    refused(model, cache, ValueError, "hold 20 image placeholders, .* given for 44", **{**with_image, **both})
    edited = with_image["input_ids"].clone()
    edited[0, :2] = edited[0, 8]
    hold = "hold 26 placeholders of images or videos, and features of 24 are kept"
    refused(model, cache, ValueError, hold, **{**with_image, "input_ids": edited})
    with state.options(turns="first"):
        sequences = model.generate(**with_image, **GREEDY, past_key_values=cache)
    refused(model, cache, ValueError, "some came in a call without turns='refresh'", **behind(sequences, TEXT))


def test_rows_that_are_not_those_of_the_cache(model, state):
    cache, sequences = answered(model, PROMPTS["batch, same size"])
    inputs = behind(sequences[:1], TEXT)
    refused(model, cache, ValueError, "1 prompts were given with a cache of 2 rows", **inputs)


def test_a_selector_that_looks_into_the_tower(model, state):
    cache, sequences = answered(model)
    with state.options(selector="visionzip", target_layers=None):
        needs = "needs vision_attention, vision_keys, which no selector of earlier turns has had read"
        refused(model, cache, ValueError, needs, **behind(sequences, TEXT))
        cache, sequences = answered(model)
    model.generate(**behind(sequences, TEXT), **GREEDY, past_key_values=cache)  # one that asks for less


def test_sound_is_not_kept():
    model = tiny_model("qwen2_5_omni_thinker")
    state = apply_sparsevlm(model, **OPTIONS)
    inputs = make_inputs(*PROMPTS["one image"], family="qwen2_5_omni_thinker")
    cache = DynamicCache()
    sequences = model.generate(**inputs, **GREEDY, past_key_values=cache)
    more = behind(sequences, TEXT)
    sound = {"input_features": torch.zeros(1, 16, 8), "feature_attention_mask": torch.ones(1, 8, dtype=torch.long)}
    refused(model, cache, NotImplementedError, "not of sound", **more, **sound)
    model.generate(**more, **GREEDY, past_key_values=cache)
    assert state.report.n_refreshed > 0


def test_which_image_is_of_which_prompt_has_to_be_known(model):
    """Where placeholders do not show where an image ends, in several prompts."""
    inputs, tokens = make_inputs(*PROMPTS["batch, same size"]), [torch.zeros(24, 64)] * 2
    given = {"image_grid_thw": inputs["image_grid_thw"]}
    with pytest.raises(NotImplementedError, match="image_grid_thw tells of 2 inputs, and which of 2 prompts"):
        rows_of(adapter_for(model), inputs["input_ids"], ["image"], tokens, [], [], [], given)
    (row,) = rows_of(adapter_for(model), inputs["input_ids"][:1], ["image"], tokens[:1], [], [], [], given)
    assert torch.equal(row.sizes["image_grid_thw"], given["image_grid_thw"])


def test_a_direct_call_goes_on_with_what_is_left(model, state):
    cache, sequences = answered(model)
    with torch.no_grad():
        model(input_ids=sequences[:, -1:], past_key_values=cache)
    assert state.report.n_refreshed == 0
    pixels = split_visual(make_inputs(IMAGE, seed=9), [IMAGE])[0]
    model.generate(**{**behind(sequences, IMAGE), **pixels}, **GREEDY, past_key_values=cache)
    assert state.report.n_refreshed == sequences.shape[1]


def test_new_tokens_alone_behind_those_of_a_direct_call(model, state):
    cache, sequences = answered(model)
    inputs = behind(sequences, TEXT)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, 37:40], past_key_values=cache)
    alone = {**inputs, "input_ids": inputs["input_ids"][:, 40:]}
    refused(model, cache, ValueError, "4 new tokens were given on a cache of 40, of which 38 are known", **alone)


def test_sound_before_a_turn_of_text_is_not_forgotten():
    model = tiny_model("qwen2_5_omni_thinker")
    apply_sparsevlm(model, **OPTIONS)
    cache, heard = DynamicCache(), make_inputs(TEXT, family="qwen2_5_omni_thinker")
    sound = {"input_features": torch.zeros(1, 16, 8), "feature_attention_mask": torch.ones(1, 8, dtype=torch.long)}
    heard["input_ids"][0, 2:4] = AUDIO
    sequences = model.generate(**heard, **sound, **GREEDY, past_key_values=cache)
    sequences = model.generate(**behind(sequences, TEXT), **GREEDY, past_key_values=cache)
    refused(model, cache, NotImplementedError, "not of sound", **behind(sequences, IMAGE))


def test_a_cropped_cache_whose_kinds_of_tokens_are_left_out(model, state):
    """A later call is shorter than the one before."""
    row = [("text", 3), ("image", 4, 6), ("text", 9)]
    cache, sequences = answered(model, [row])
    cache.crop(-8)
    inputs = behind(sequences[:, : cache.get_seq_length()], [("text", 2)])
    found = model.generate(**inputs, **GREEDY, past_key_values=cache)
    pixels = {name: value for name, value in make_inputs(row).items() if name not in TOKENS}
    types = (inputs["input_ids"] == adapter_for(model).modalities["image"].token_id).long()
    assert torch.equal(found, model.generate(**inputs, **pixels, mm_token_type_ids=types, **GREEDY))
