"""Prompts that hold placeholders of images, and bring no pixels."""

from __future__ import annotations

import logging

import pytest
import torch

from sparsevlm import apply_sparsevlm
from toys import IMAGE, PROMPTS, VIDEO, make_inputs, tiny_model

ONE, NO_IMAGE = PROMPTS["one image"], "no image or video in the input"
GREEDY = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
SAID = "input_ids hold 24 image placeholders, but no pixel_values came with them"


def without_pixels(*rows):
    """Inputs whose pixels were lost."""
    inputs = make_inputs(*rows)
    return {name: value for name, value in inputs.items() if "pixel" not in name and "grid" not in name}


def warnings(caplog):
    return [record.message for record in caplog.records if "placeholder" in record.message]


def applied(**options):
    model = tiny_model()
    return model, apply_sparsevlm(model, keep=0.6, min_keep=4, **options)


@pytest.fixture(autouse=True)
def _listen(caplog):
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize("engine", [False, True])
def test_lost_pixels_are_warned_about_once_and_reported(engine, caplog):
    model, state = applied(engine=engine)
    for _ in range(2):
        model.generate(**without_pixels(*ONE), **GREEDY)
        assert state.report.skipped_because == SAID
    assert warnings(caplog) == [
        f"sparsevlm: {SAID}: the model answers without having seen anything, and nothing is pruned. Pass all that the "
        "processor returned, as in model.generate(**inputs)."
    ]
    assert f"nothing pruned: {SAID}" in str(state.report)


@pytest.mark.parametrize("engine", [False, True])
def test_strict_refuses_lost_pixels(engine):
    model, state = applied(engine=engine, strict=True)
    with pytest.raises(ValueError, match=r"24 image placeholders.*\*\*inputs\) \(strict=True refuses this\)"):
        model.generate(**without_pixels(*ONE), **GREEDY)
    assert "24 image placeholders" in state.report.failed
    model.generate(**make_inputs(*ONE), **GREEDY)


def test_a_direct_call_without_pixels(caplog):
    model, state = applied()
    model(**without_pixels(*ONE))
    assert state.report.skipped_because == SAID
    assert len(warnings(caplog)) == 1


def test_images_and_videos_are_counted_apart(caplog):
    model, _ = applied()
    model.generate(**without_pixels(*PROMPTS["image and video"]), **GREEDY)
    assert (
        "hold 16 image placeholders and 32 video placeholders, but no pixel_values or pixel_values_videos"
        in (warnings(caplog)[0])
    )


def test_a_placeholder_alone_may_be_text(caplog):
    """As where a user asks about it, or a processor was not given the image: said, and never refused."""
    inputs = make_inputs([("text", 12)])
    inputs["input_ids"][0, 4] = IMAGE
    model, state = applied(strict=True)
    model.generate(**inputs, **GREEDY)
    assert state.report.skipped_because.startswith("input_ids hold 1 image placeholder, but")
    assert len(warnings(caplog)) == 1


def test_padding_is_no_placeholder(caplog):
    inputs = make_inputs([("text", 12)])
    inputs["input_ids"][0, :4] = IMAGE
    inputs["attention_mask"][0, :4] = 0
    model, state = applied(strict=True)
    model.generate(**inputs, **GREEDY)
    assert state.report.skipped_because == NO_IMAGE
    assert not warnings(caplog)


def follow_up(first, *row, whole=True):
    """A later turn: the conversation and new tokens, or these alone."""
    new = without_pixels(list(row))["input_ids"]
    ids = torch.cat([first.sequences[:, :-1], new], dim=1)
    return {
        "input_ids": ids if whole else ids[:, first.past_key_values.get_seq_length() :],
        "attention_mask": torch.ones_like(ids),
        "past_key_values": first.past_key_values,
    }


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_later_turns_on_a_kept_cache(engine, whole, caplog):
    """The placeholders of earlier turns are in the cache; those of a new turn want pixels."""
    model, _ = applied(engine=engine, strict=True)
    first = model.generate(**make_inputs(*ONE), **GREEDY, return_dict_in_generate=True)
    second = model.generate(**follow_up(first, ("text", 5), whole=whole), **GREEDY, return_dict_in_generate=True)
    assert not warnings(caplog)
    if whole:
        with pytest.raises(ValueError, match="hold 4 image placeholders"):
            model.generate(**follow_up(second, ("text", 2), ("image", 2, 2), ("text", 3)), **GREEDY)


class Says:
    """Logits processor that makes the answer up."""

    def __init__(self, length, tokens):
        self.length, self.tokens = length, tokens

    def __call__(self, input_ids, scores):
        token = self.tokens[(input_ids.shape[1] - self.length) % len(self.tokens)]
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([token]), 0.0)


TEXT = [("text", 9)]


@pytest.mark.parametrize(
    ("row", "more"),
    [(row, {"prompt_lookup_num_tokens": n}) for row in (ONE[0], TEXT) for n in (None, 3)]
    + [(TEXT, {"use_cache": False})],
)
def test_generated_and_guessed_placeholders_are_no_images(row, more, caplog):
    """Prompt lookup guesses what stands in the prompt, or in the answer so far."""
    inputs = make_inputs(row)
    says = Says(inputs["input_ids"].shape[1], [7, IMAGE, IMAGE])
    model, _ = applied(strict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=9, logits_processor=[says], **more)
    assert output[0, -8:].tolist() == [IMAGE, IMAGE, 7, IMAGE, IMAGE, 7, IMAGE, IMAGE]
    assert not warnings(caplog)
