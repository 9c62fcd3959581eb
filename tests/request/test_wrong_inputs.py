"""Arguments of a wrong type or shape are refused at the door, on both paths and in direct calls."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from sparsevlm import apply_sparsevlm
from toys import make_inputs, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}
PROMPTS = {
    "image": [("text", 3), ("image", 4, 6), ("text", 7)],
    "video": [("text", 3), ("video", 2, 4, 4), ("text", 7)],
    "two images": [("text", 3), ("image", 4, 6), ("image", 4, 4), ("text", 7)],
}
GRID_WANTED = r"wanted is a tensor of integers, \(number of images or videos, 3\)"
TOKENS_WANTED = r"wanted is a tensor of integers, \(batch, length\)"
# Prompt, argument, what becomes of it, error.
CASES = {
    "ids as a list": ("image", "input_ids", torch.Tensor.tolist, TypeError, f"input_ids is a list; {TOKENS_WANTED}"),
    "ids as an array": ("image", "input_ids", torch.Tensor.numpy, TypeError, "input_ids is a ndarray"),
    "ids of one dimension": ("image", "input_ids", lambda x: x[0], ValueError, r"input_ids has shape \(36,\)"),
    "ids of three dimensions": ("image", "input_ids", lambda x: x[None], ValueError, r"has shape \(1, 1, 36\)"),
    "ids in floats": ("image", "input_ids", torch.Tensor.float, TypeError, "input_ids has dtype torch.float32"),
    "a mask as a list": ("image", "attention_mask", torch.Tensor.tolist, TypeError, "attention_mask is a list"),
    "a mask of one dimension": (
        "image",
        "attention_mask",
        lambda x: x[0],
        ValueError,
        r"attention_mask has shape \(36,",
    ),
    "a short mask": ("image", "attention_mask", lambda x: x[:, 1:], ValueError, r"\(1, 35\); wanted is \(1, 36\)"),
    "a long mask": ("image", "attention_mask", lambda x: x.repeat(1, 2), ValueError, r"\(1, 72\); wanted is \(1, 36\)"),
    "a mask of two rows": (
        "image",
        "attention_mask",
        lambda x: x.repeat(2, 1),
        ValueError,
        r"\(2, 36\); wanted is \(1",
    ),
    "a mask that hides all": ("image", "attention_mask", torch.zeros_like, ValueError, "hides all tokens of a sample"),
    "types as a list": ("image", "mm_token_type_ids", torch.Tensor.tolist, TypeError, "mm_token_type_ids is a list"),
    "short types": (
        "image",
        "mm_token_type_ids",
        lambda x: x[:, 1:],
        ValueError,
        r"mm_token_type_ids has shape \(1, 35",
    ),
    "positions as a list": ("image", "position_ids", lambda x: [[0] * 36], TypeError, "position_ids is a list"),
    "a grid as a list": ("image", "image_grid_thw", torch.Tensor.tolist, TypeError, f"thw is a list; {GRID_WANTED}"),
    "a video's grid": (
        "video",
        "video_grid_thw",
        torch.Tensor.tolist,
        TypeError,
        f"video_grid_thw is a list; {GRID_WANTED}",
    ),
    "a grid of one dimension": (
        "image",
        "image_grid_thw",
        lambda x: x[0],
        ValueError,
        r"image_grid_thw has shape \(3,\)",
    ),
    "a grid of two columns": ("image", "image_grid_thw", lambda x: x[:, 1:], ValueError, r"thw has shape \(1, 2\)"),
    "a grid in floats": (
        "video",
        "video_grid_thw",
        torch.Tensor.float,
        TypeError,
        "video_grid_thw has dtype torch.float",
    ),
    "no grid": ("image", "image_grid_thw", lambda x: None, ValueError, "pixel_values was given without image_grid_thw"),
    "no grid of a video": (
        "video",
        "video_grid_thw",
        lambda x: None,
        ValueError,
        "videos was given without video_grid",
    ),
    "pixels as a list": ("image", "pixel_values", lambda x: [x], TypeError, "pixel_values is a list"),
    "pixels as an array": ("video", "pixel_values_videos", torch.Tensor.numpy, TypeError, "videos is a ndarray"),
    "a tuple for a cache": (
        "image",
        "past_key_values",
        lambda x: (),
        TypeError,
        "is a tuple; wanted is a transformers C",
    ),
    "a name for a cache": ("image", "past_key_values", lambda x: "static", TypeError, "the cache is a str"),
    "embeddings as a list": ("image", "inputs_embeds", lambda x: [[0.0]], TypeError, "inputs_embeds is a list"),
}


def wrong_inputs(case):
    prompt, name, change, error, message = CASES[case]
    inputs = make_inputs(PROMPTS[prompt])
    return {**inputs, name: change(inputs.get(name))}, error, message


def goes_on(model, state):
    """A right call after a wrong one is answered."""
    model.model.rope_deltas = None
    model.generate(**make_inputs(PROMPTS["image"]), max_new_tokens=1)
    assert state.report.final_tokens < 24


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_generate(case, engine):
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    inputs, error, message = wrong_inputs(case)
    with pytest.raises(error, match=message):
        model.generate(**inputs, max_new_tokens=2)
    assert error.__name__ in state._session.last.failed
    goes_on(model, state)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", [False, True], ids=["the model", "its base model"])
def test_direct_calls(base, case):
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS)
    inputs, error, message = wrong_inputs(case)
    with pytest.raises(error, match=message):
        (model.model if base else model)(**inputs)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        (model.model if base else model)()
    goes_on(model, state)


@pytest.mark.parametrize("engine", [False, True])
def test_a_mask_of_queries_and_keys(engine):
    """A direct call may bring one; generate makes its own."""
    model, inputs = tiny_model(), make_inputs(PROMPTS["image"], pad=False)
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.model.rope_deltas = None
        positions = torch.arange(length).expand(3, 1, -1)
        model(**inputs, attention_mask=mask, position_ids=positions)
    assert wanted.shape[1] == state.report.samples[0].n_text + state.report.final_tokens
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 36, 36\)"):
        model.generate(**inputs, attention_mask=mask, max_new_tokens=1)


def test_a_mask_of_a_kept_cache_may_be_longer():
    model, inputs = tiny_model(), make_inputs(PROMPTS["image"])
    state = apply_sparsevlm(model, **OPTIONS)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**make_inputs([("text", 5)]), past_key_values=cache)
        mask = torch.ones(1, 41, dtype=torch.long)
        del inputs["mm_token_type_ids"]
        model(
            **{**inputs, "attention_mask": mask},
            position_ids=torch.arange(5, 41).expand(3, 1, -1),
            past_key_values=cache,
        )
    assert state.report.final_tokens < 24


def error_of(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever transformers raises
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "change",
    [lambda x: torch.cat([x, x[:8]]), lambda x: x[:-4], lambda x: x[:0], lambda x: x[:, :10]],
    ids=["more", "fewer", "none", "narrower"],
)
def test_pixels_that_are_not_what_the_grids_say_are_what_they_are_without_pruning(change, prompt, engine):
    model, inputs = tiny_model(), make_inputs(PROMPTS[prompt])
    name = "pixel_values_videos" if prompt == "video" else "pixel_values"
    wrong = {**inputs, name: change(inputs[name])}
    wanted = error_of(lambda: model.generate(**wrong, max_new_tokens=1))
    right = model.generate(**inputs, max_new_tokens=3)
    state = apply_sparsevlm(model, keep=1.0, engine=engine)
    assert error_of(lambda: model.generate(**wrong, max_new_tokens=1)) == wanted
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), right)
    assert state.report.path == ("engine" if engine else "plain")


@pytest.mark.parametrize("engine", [False, True])
def test_without_images_a_mask_may_hide_a_whole_sample(engine):
    """As in dense, which answers it."""
    model, inputs = tiny_model(), make_inputs([("text", 6)], [("text", 6)])
    inputs["attention_mask"][1] = 0
    dense = model.generate(**inputs, max_new_tokens=2)
    apply_sparsevlm(model, **OPTIONS, engine=engine)
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), dense)


def later_turn(model, n_new=6):
    """A cache that has served a first call, all tokens of the conversation, and how many of them it holds."""
    cache = DynamicCache(config=model.config)
    sequences = model.generate(**make_inputs(PROMPTS["image"]), max_new_tokens=4, past_key_values=cache)
    ids = torch.cat([sequences, make_inputs([("text", n_new)])["input_ids"]], dim=1)
    return cache, ids, int(cache.get_seq_length())


# Of a later call, given all tokens and how many of them are cached: what its tokens and mask are, and what is said.
CUT = {
    "new ones, no mask": (lambda ids, past: (ids[:, past:], None), "7 tokens and an attention_mask for 7 were given"),
    "new ones and their mask": (lambda ids, past: (ids[:, past:], 7), "for all 46"),
    "new ones and a short mask": (
        lambda ids, past: (ids[:, past:], past),
        "7 tokens and an attention_mask for 39 were",
    ),
    "as many as are cached": (lambda ids, past: (ids[:, :past], None), "for 39 were given, and the cache holds 39"),
    "all and a short mask": (lambda ids, past: (ids, past), "46 tokens and an attention_mask for 39 were"),
}


@pytest.mark.parametrize("turns", ["first", "refresh"])
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("case", CUT)
def test_tokens_that_would_be_cut_as_if_cached(case, engine, turns):
    model, (given, message) = tiny_model(), CUT[case]
    apply_sparsevlm(model, **OPTIONS, engine=engine, turns=turns)
    cache, ids, past_len = later_turn(model)
    ids, length = given(ids, past_len)
    mask = {} if length is None else {"attention_mask": torch.ones(1, length, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        model.generate(ids, **mask, max_new_tokens=4, past_key_values=cache)
    assert cache.get_seq_length() == past_len


def test_embeddings_that_would_be_cut_as_if_cached():
    model = tiny_model()
    apply_sparsevlm(model, **OPTIONS)
    cache, ids, past_len = later_turn(model)
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="inputs_embeds hold 7 tokens, and the cache 39"):
        model.generate(inputs_embeds=embeds[:, past_len:], attention_mask=mask, max_new_tokens=4, past_key_values=cache)
    wanted = model.generate(ids, max_new_tokens=4, past_key_values=copy.deepcopy(cache))
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4, past_key_values=cache)
    assert torch.equal(found, wanted[:, ids.shape[1] :])


@pytest.mark.parametrize("engine", [False, True])
def test_later_calls_that_go_on_rightly(engine):
    model = tiny_model()
    apply_sparsevlm(model, **OPTIONS, engine=engine)
    cache, ids, past_len = later_turn(model)
    mask, answers = torch.ones_like(ids), []
    one = ids[:, : past_len + 1]  # nothing new but the last answer's last token
    drafting = {"prompt_lookup_num_tokens": 2, "suppress_tokens": [90]}
    for given, more in (
        ({"input_ids": ids, "attention_mask": mask}, {}),
        ({"inputs": ids}, {}),
        ({"input_ids": ids[:, past_len:], "attention_mask": mask}, {}),
        ({"input_ids": ids, "attention_mask": mask}, drafting),
        ({"input_ids": ids, "attention_mask": mask}, {"num_beams": 2}),
        ({"input_ids": one}, {}),
    ):
        own = copy.deepcopy(cache)
        if "num_beams" in more:
            own.batch_repeat_interleave(2)
        n = next(iter(given.values())).shape[1]
        answers.append(model.generate(**given, **more, max_new_tokens=4, past_key_values=own)[:, n:])
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
