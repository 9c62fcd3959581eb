"""Images on a kept cache under turns="first": positions by kinds of tokens, and images that it holds, given again."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.compat import cache_of
from sparsevlm.models import adapter_for
from toys import PROMPTS, join_visual, make_inputs, split_visual, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [1, 3], "keep": 0.6}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
GREEDY["suppress_tokens"] = [*range(80, 94)]
IMAGE = [("text", 2), ("image", 4, 5), ("text", 4)]
TEXT = [("text", 5)]
OF_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


class Talk:
    """A conversation in every row of a batch, whose first question is answered."""

    def __init__(self, family="qwen2_5_vl", rows=PROMPTS["one image"], **options):
        self.family, self.model = family, tiny_model(family)
        self.state = apply_sparsevlm(self.model, **{**OPTIONS, **options})
        self.base = adapter_for(self.model).base_model
        self.tokens = make_inputs(*rows, family=family)
        pixels = self._split(self.tokens)
        self.by_row = split_visual(pixels, rows, family)
        self.answered(self.model.generate(**self.tokens, **pixels, **GREEDY))

    def _split(self, inputs):
        return {name: inputs.pop(name) for name in [*inputs] if name not in OF_TOKENS}

    @property
    def visual(self):
        """Images of all turns, row by row."""
        return join_visual(self.by_row, self.family)

    def answered(self, output):
        n = output.sequences.shape[1] - self.tokens["input_ids"].shape[1]
        for name in self.tokens:
            filler = int(name == "attention_mask")
            self.tokens[name] = torch.nn.functional.pad(self.tokens[name], (0, n), value=filler)
        self.tokens["input_ids"], self.cache = output.sequences, cache_of(output)

    def says(self, rows):
        """All tokens with those of the next question, and what it brings."""
        new = make_inputs(*rows, seed=9, family=self.family)
        self.new = dict(new)
        pixels = self._split(new)
        self.tokens = {name: torch.cat([value, new[name]], dim=1) for name, value in self.tokens.items()}
        pairs = zip(self.by_row, split_visual(pixels, rows, self.family), strict=True)
        self.by_row = [join_visual([one for one in pair if one], self.family) for pair in pairs]
        return {**self.tokens, **pixels}

    def ask(self, inputs, **changes):
        given = {name: value for name, value in {**inputs, **changes}.items() if value is not None}
        return self.model.generate(**given, **GREEDY, past_key_values=self.cache)

    def layers(self):
        return [(layer, layer.keys, layer.values, layer.get_seq_length()) for layer in self.cache.layers]

    def refused(self, inputs, match, kind=ValueError, **changes):
        before, deltas = self.layers(), getattr(self.base, "rope_deltas", None)
        with pytest.raises(kind, match=match):
            self.ask(inputs, **changes)
        for one, other in zip(before, self.layers(), strict=True):
            assert all(a is b or a == b for a, b in zip(one, other, strict=True))
        assert getattr(self.base, "rope_deltas", None) is deltas


def of_all(talk, inputs):
    return {}


def of_new(talk, inputs):
    """As the processor gives them; the end of the answer, which is not in the cache, stands before."""
    return {"mm_token_type_ids": talk.new["mm_token_type_ids"]}


def new_alone(talk, inputs):
    return {**of_new(talk, inputs), "input_ids": inputs["input_ids"][:, talk.cache.get_seq_length() :]}


@pytest.mark.parametrize("given", [of_all, of_new, new_alone])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_positions_of_a_new_image_are_those_of_a_fresh_call(family, given):
    """In batches with padding as well, and for the turn behind it."""
    batch = [IMAGE, [("text", 5), ("image", 2, 3), ("text", 2)]]
    for prompt, rows in (("one image", [IMAGE]), ("batch, left padding", batch)):
        talk = Talk(family, PROMPTS[prompt], keep=1.0, engine=False)
        inputs = talk.says(rows)
        changes = given(talk, inputs)
        found = [talk.ask(inputs, **changes)]
        fresh = dict(talk.tokens), dict(talk.visual)
        if "input_ids" in changes:
            found[0].sequences = torch.cat([fresh[0]["input_ids"], found[0].sequences[:, -3:]], dim=1)
        talk.answered(found[0])
        found.append(talk.ask(talk.says([TEXT] * len(rows))))
        for output, (tokens, visual) in zip(found, (fresh, (talk.tokens, talk.visual)), strict=True):
            wanted = talk.model.generate(**tokens, **visual, **GREEDY)
            assert torch.equal(output.sequences, wanted.sequences)
            torch.testing.assert_close(output.logits, wanted.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [of_all, new_alone])
def test_the_engine_takes_the_same_positions(given):
    found = []
    for engine in (True, False):
        talk = Talk("qwen2_5_vl", PROMPTS["batch, left padding"], engine=engine)
        inputs = talk.says([IMAGE, IMAGE])
        found.append(talk.ask(inputs, **given(talk, inputs)).logits)
        assert (talk.state.report.path == "engine") == engine
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_call_that_fails_leaves_positions_as_they_were():
    def fails(input_ids, scores):
        raise ValueError("too late")

    talk = Talk(engine=True)
    inputs = talk.says([IMAGE])
    deltas = talk.base.rope_deltas
    with pytest.raises(ValueError, match="too late"):
        talk.ask(inputs, logits_processor=[fails])
    assert talk.base.rope_deltas is deltas


@pytest.mark.parametrize("engine", [False, True])
def test_kinds_of_tokens_that_cannot_be_read(engine):
    talk = Talk(engine=engine)
    inputs = talk.says([IMAGE])
    types = inputs["mm_token_type_ids"]
    n = types.shape[1]
    shape = rf"mm_token_type_ids has shape \(1, {n - 1}\); wanted is \(1, {n}\)"
    talk.refused(inputs, shape, mm_token_type_ids=types[:, 1:])
    for unknown in (None, torch.zeros(2, 1, dtype=torch.long)):
        talk.base.rope_deltas = unknown
        talk.refused(inputs, "the last prompt that this model has run was none of theirs")


@pytest.mark.parametrize("knows", [False, True])
def test_a_first_image_behind_text(knows):
    """Whether the model has run the text, or another has."""
    talk = Talk(rows=[TEXT], keep=1.0, engine=False)
    inputs = talk.says([IMAGE])
    if not knows:
        talk.base.rope_deltas = None
    found = talk.ask(inputs)
    wanted = talk.model.generate(**talk.tokens, **talk.visual, **GREEDY)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("qwen2_5_vl", "hold 20 image placeholders, and pixel_values and image_grid_thw were given for 44. .*: give"),
        (
            "llava",
            "hold 16 image placeholders, and pixel_values were given for 32. .*: give pixel_values of new images",
        ),
        ("smolvlm", "hold 12 image placeholders, and pixel_values were given for 24. .*: give pixel_values of new"),
        ("idefics3", "hold 12 image placeholders, and pixel_values were given for 24. .*: give pixel_values of new"),
        ("internvl", r"the images do not fit the new tokens \(.*tokens: 12, features: 24\). .* of new images alone"),
    ],
)
def test_images_that_the_cache_holds_given_beside_a_new_one(family, match, engine):
    talk = Talk(family, engine=engine)
    inputs = talk.says([IMAGE])
    for types in (inputs.get("mm_token_type_ids"), None):
        talk.refused(inputs, match, **talk.visual, mm_token_type_ids=types)
    cache = copy.deepcopy(talk.cache)
    found = talk.ask(inputs, mm_token_type_ids=None)
    talk.cache = cache
    assert torch.equal(found.sequences, talk.ask(inputs, mm_token_type_ids=None).sequences)


def test_a_turn_that_lacks_one_of_its_images():
    talk = Talk(engine=False)
    inputs = talk.says([[("text", 2), ("image", 4, 5), ("text", 2), ("image", 2, 3), ("text", 4)]])
    one = {"pixel_values": inputs["pixel_values"][:80], "image_grid_thw": inputs["image_grid_thw"][:1]}
    talk.refused(inputs, "hold 26 image placeholders, and .* were given for 20", **one)


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_tiles_that_fill_a_batch_up_are_no_images(family):
    rows = [IMAGE, [("image", 4, 5), *IMAGE]]
    talk = Talk(family, PROMPTS["batch, same size"], keep=1.0, engine=False)
    inputs = talk.says(rows)
    tiles = inputs["pixel_values"].flatten(0, 1)
    padded = torch.stack([torch.cat([tiles[:3], torch.zeros_like(tiles[:3])]), tiles[3:]])
    talk.refused(inputs, "hold 36 image placeholders, and pixel_values were given for 48", pixel_values=padded + 1.0)
    cache = copy.deepcopy(talk.cache)
    found = talk.ask(inputs, pixel_values=padded)
    talk.cache = cache
    assert torch.equal(found.sequences, talk.ask(inputs).sequences)
