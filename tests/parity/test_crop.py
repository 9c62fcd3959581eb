"""Pruned caches are cropped in all layers or in none: rejected guesses of prompt lookup, turns that are taken back."""

from __future__ import annotations

import flash_emulation
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Cache, DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.cache_utils import StaticLayer

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from toys import IMAGE, PROMPTS, VIDEO, VISION_END, VISION_START, make_inputs, relative_error, tiny_model, use_attention

ATTENTIONS = ("sdpa", "eager", flash_emulation.NAME)
OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}
SELECTORS = {
    "span": OPTIONS,
    "random": {**OPTIONS, "selector": "random"},
    "rank adaptive": {"min_keep": 3, "target_layers": [1, 3], "rank_tolerance": 0.3},
    "before the decoder": {"keep": 0.5, "min_keep": 3, "selector": "divprune"},
}
LOOKUP = {
    "max_new_tokens": 14,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": [IMAGE, VIDEO],
}
CACHES = ["dynamic"]
if hasattr(StaticLayer, "crop"):  # older transformers guess with no static cache
    CACHES.append("static")


def pruned_model(attn="sdpa", **options):
    flash_emulation.register()
    model = tiny_model()
    use_attention(model, attn)
    model.config._attn_implementation_internal = attn
    return model, apply_sparsevlm(model, **options)


def looked_up(before, after, n_known):
    """A prompt that ends in ``n_known`` tokens of its beginning, so that the first step has guesses already."""
    inputs = make_inputs([("text", before), ("image", 4, 6), *([("text", after)] if after else [])])
    if after:
        inputs["input_ids"][0, -n_known:] = inputs["input_ids"][0, 2 : 2 + n_known]
    else:
        inputs["input_ids"][0, 3] = VISION_END  # what such a prompt ends in
    return inputs


def cache_of(model, kind, room):
    if kind == "dynamic":
        return {}
    return {"past_key_values": StaticCache(config=model.config.get_text_config(), max_cache_len=room)}


@pytest.fixture
def rejected(monkeypatch):
    """Numbers of tokens that caches were asked to crop."""
    asked, crop = [], Cache.crop

    def noted(self, tokens_to_remove):
        asked.append(-tokens_to_remove)
        return crop(self, tokens_to_remove)

    monkeypatch.setattr(Cache, "crop", noted)
    return asked


@parametrize_pairs(attn=ATTENTIONS, selector=list(SELECTORS), cache=CACHES, prompt=[(20, 4, 3), (20, 1, 1), (12, 0, 0)])
def test_rejected_guesses_leave_no_trace(attn, selector, cache, prompt, rejected):
    """Also where they outnumber the text behind the image, or there is none but the token that closes it."""
    model, state = pruned_model(attn, **SELECTORS[selector])
    inputs = looked_up(*prompt)
    wanted, stages = model.generate(**inputs, **LOOKUP), state.report.samples[0].stages
    own = cache_of(model, cache, inputs["input_ids"].shape[1] + 40)
    found = model.generate(**inputs, **LOOKUP, prompt_lookup_num_tokens=10, **own)
    assert max(rejected) > 1
    assert state.report.samples[0].stages == stages
    assert state.report.final_tokens < 24
    assert torch.equal(found.sequences, wanted.sequences)
    for got, right in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(got, right) < 1e-5


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("prompt", [(20, 4, 3), (20, 1, 1), (12, 0, 0)], ids=str)
def test_guesses_where_nothing_is_pruned(cache, prompt, rejected):
    model, state = pruned_model(keep=1.0)
    inputs = looked_up(*prompt)
    room = inputs["input_ids"].shape[1] + 40
    own = (cache_of(model, cache, room) for _ in range(3))
    kept_all = model.generate(**inputs, **LOOKUP, prompt_lookup_num_tokens=10, **next(own)).sequences
    assert max(rejected) > 1
    state.detach()
    for guesses in ({}, {"prompt_lookup_num_tokens": 10}):
        assert torch.equal(model.generate(**inputs, **LOOKUP, **guesses, **next(own)).sequences, kept_all)


class Says(LogitsProcessor):
    """Lets an answer begin with given tokens."""

    def __init__(self, prompt_length, tokens):
        self._length, self._tokens = prompt_length, tokens

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self._length
        if step >= len(self._tokens):
            return scores
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([self._tokens[step]]), 0.0)


@pytest.mark.parametrize("selector", SELECTORS)
def test_placeholders_may_be_drafted_once_the_prompt_is_through(selector):
    """Where the answer repeats what stands before the image: they are tokens like others then, and rejected."""
    model, _ = pruned_model(**SELECTORS[selector])
    inputs = make_inputs([("text", 6), ("image", 4, 6), ("text", 5)])
    length, before = inputs["input_ids"].shape[1], inputs["input_ids"][0, 5:7].tolist()
    options = {**LOOKUP, "suppress_tokens": None, "logits_processor": LogitsProcessorList([Says(length, [7, *before])])}
    wanted = model.generate(**inputs, **options).sequences
    assert wanted[0, length + 2] == VISION_START
    drafted = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: drafted.append(bool((kwargs["input_ids"] == IMAGE).any())), with_kwargs=True
    )
    found = model.generate(**inputs, **options, prompt_lookup_num_tokens=5).sequences
    handle.remove()
    assert any(drafted[1:])
    assert torch.equal(found, wanted)


def test_placeholders_cannot_be_drafted_with_the_prompt():
    """Nor can they without pruning."""
    model, state = pruned_model(**OPTIONS)
    inputs = make_inputs([("text", 6), ("image", 4, 6), ("text", 5)])
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, 5:7]
    free = {**LOOKUP, "suppress_tokens": None, "prompt_lookup_num_tokens": 5}
    with pytest.raises(ValueError, match=r"drafted tokens hold placeholders.*suppress_tokens=\[90, 91\]"):
        model.generate(**inputs, **free)
    found = model.generate(**inputs, **LOOKUP, prompt_lookup_num_tokens=5).sequences
    assert torch.equal(found, model.generate(**inputs, **LOOKUP).sequences)
    state.detach()
    with pytest.raises(ValueError, match="do not match"):
        model.generate(**inputs, **free)


def state_of(cache):
    """All that a crop could change."""
    tables = [layer.table for layer in cache.layers]
    return [
        *(x for layer in cache.layers for x in (layer.keys, layer.values)),
        *(getattr(layer, "cumulative_length", torch.tensor(0)).clone() for layer in cache.layers),
        *(table.slots(table.appended) for table in tables if table is not None),
    ]


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("selector", ["random", "before the decoder"])
def test_what_is_cropped_was_never_there(attn, cache, selector):
    """Of a batch, as far as the text of all its samples reaches: eight and five tokens, the closing one among them.

    The selectors do not look at the text, so that the prompt without what is cropped keeps the same tokens.
    """
    model, state = pruned_model(attn, **SELECTORS[selector])
    inputs = make_inputs([("text", 2), ("image", 4, 6), ("text", 7)], [("text", 5), ("image", 4, 6), ("text", 4)])
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    assert bool(mask.all())
    short = {name: x[:, :-4] if x.shape == mask.shape else x for name, x in inputs.items()}
    logits = []
    for given, n_cropped in ((inputs, 4), (short, 0)):
        past = cache_of(model, cache, length + 3).get("past_key_values") or DynamicCache(config=model.config)
        model.model.rope_deltas = None
        with torch.no_grad():
            model(**given, past_key_values=past, use_cache=True)
            assert state.report.final_tokens < 24
            if n_cropped:
                held = state_of(past)
                with pytest.raises(ValueError, match="cannot crop 6 tokens off a pruned cache: only the last 5 are"):
                    past.crop(-6)
                assert all(torch.equal(one, other) for one, other in zip(state_of(past), held, strict=True))
                past.crop(-1)
                past.crop(0)
                past.crop(1 - n_cropped)
            assert [int(layer.get_seq_length()) for layer in past.layers] == [length - 4] * 6
            for token in (7, 8):
                now = int(past.get_seq_length())
                step = {"input_ids": torch.full((2, 1), token), "attention_mask": torch.ones(2, now + 1).long()}
                positions = torch.full((4, 2, 1), now)
                logits.append(model(**step, position_ids=positions, past_key_values=past).logits)
    assert relative_error(logits[0], logits[2]) < 1e-5
    assert relative_error(logits[1], logits[3]) < 1e-5


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.18"), reason="crop takes negative numbers only")
def test_a_length_to_crop_to_is_that_of_every_layer():
    model, _ = pruned_model(**OPTIONS)
    output = model.generate(**make_inputs(*PROMPTS["one image"]), **LOOKUP)
    cache, length = output.past_key_values, output.sequences.shape[1] - 1
    cache.crop(length + 5)
    cache.crop(length - 3)
    assert [layer.get_seq_length() for layer in cache.layers] == [length - 3] * 6
    slots = [layer.keys.shape[-2] for layer in cache.layers]
    cache.crop(-1)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n - 1 for n in slots]


def test_layers_that_cannot_be_cropped_are_left_alone():
    """Static ones of older transformers."""
    model, _ = pruned_model(**OPTIONS)
    inputs = make_inputs(*PROMPTS["one image"])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    held = state_of(cache)
    if hasattr(StaticLayer, "crop"):
        cache.crop(-2)
        assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1] - 2
    else:
        with pytest.raises(AttributeError):
            cache.crop(-2)
        assert all(torch.equal(one, other) for one, other in zip(state_of(cache), held, strict=True))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("n_new", [1, 2, 6])
def test_flash_attention_sees_no_more_of_a_full_buffer_than_there_is(selector, n_new):
    """transformers gives no mask where the sequence fills the buffer; that of a pruned layer is not full."""
    model, state = pruned_model(flash_emulation.NAME, **SELECTORS[selector])
    inputs = make_inputs(*PROMPTS["one image"])
    options = {**LOOKUP, "max_new_tokens": n_new}
    wanted = model.generate(**inputs, **options)
    found = model.generate(**inputs, **options, cache_implementation="static")
    assert state.report.final_tokens < 24
    for got, right in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(got, right) < 1e-5
