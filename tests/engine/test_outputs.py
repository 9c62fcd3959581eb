"""What a call gives, and what it is given, beside its tokens: dictionaries, caches, processors, criteria, streamers."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from sparsevlm import apply_sparsevlm
from sparsevlm.compat import cache_of
from sparsevlm.engine.support import unsupported_cache
from sparsevlm.engine.text.decode_graph import DecodeGraph
from toys import PROMPTS, make_inputs, relative_error, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
CHOICES = {
    "on the device": {},
    "on the host": {"selector": "fastv", "target_layers": None},
    "before the decoder": {"selector": "divprune", "target_layers": None},
    "by rank": {"keep": None},
    "nothing dropped": {"keep": 1.0},
}


def on_both(model, inputs, choice, **options):
    """Outputs of the hooks and of the engine."""
    state, found = apply_sparsevlm(model, **{**OPTIONS, **CHOICES[choice]}), []
    for engine in (False, True):
        torch.manual_seed(0)
        with state.options(engine=engine):
            found.append(model.generate(**inputs, **options))
            assert state.report.path == ("engine" if engine else "plain"), state.report.path_reason
    return found


def assert_near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [GREEDY, {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}])
def test_a_dictionary_holds_what_was_asked_for(options):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, left padding"])
    wanted, found = on_both(model, inputs, "on the device", **options, **EVERYTHING, repetition_penalty=1.3)
    assert type(found) is type(wanted)
    assert found.keys() == wanted.keys()
    assert torch.equal(found.sequences, wanted.sequences)
    assert_near(found.scores, wanted.scores)
    assert_near(found.logits, wanted.logits)
    assert not torch.equal(found.scores[0], found.logits[0])
    _, found = on_both(model, inputs, "on the device", **GREEDY, return_dict_in_generate=True)
    assert (found.scores, found.logits) == (None, None)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding", "batch, unequal counts", "two images"])
def test_a_cache_is_what_the_hooks_give(prompt, choice):
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    wanted, found = (cache_of(output) for output in on_both(model, inputs, choice, **GREEDY, **EVERYTHING))
    assert found.get_seq_length() == wanted.get_seq_length()
    padding = ~inputs["attention_mask"].bool()
    for mine, theirs in zip(found.layers, wanted.layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.keys.shape == theirs.keys.shape
        tables = mine.table, theirs.table = getattr(mine, "table", None), getattr(theirs, "table", None)
        assert (tables[0] is None) == (tables[1] is None)
        if tables[0] is None:
            hidden = torch.nn.functional.pad(padding, (0, mine.keys.shape[2] - padding.shape[1]))
        else:
            assert torch.equal(*(table.slots(table.appended) for table in tables))
            assert tables[0].has_padding == tables[1].has_padding
            hidden = tables[0].slots(tables[0].appended) < 0
        for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert relative_error(*(x.masked_fill(hidden[:, None, :, None], 0) for x in (one, other))) < 1e-5


class Halving(LogitsProcessor):
    """Works in place, and reads the tokens so far."""

    def __call__(self, input_ids, scores):
        return scores.div_(2).scatter_(1, input_ids[:, -1:], -torch.inf)


class Unsure(StoppingCriteria):
    """Reads scores; ends a sample by itself."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(None if scores is None else len(scores))
        best = torch.zeros(len(input_ids)) if scores is None else scores[-1].max(dim=-1).values
        return best > best.min() if len(self.seen) > 1 else torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("options", [EVERYTHING, {"return_dict_in_generate": True}])
def test_processors_and_criteria_see_what_transformers_shows_them(options):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, unequal counts"])
    criteria = [Unsure(), Unsure()]
    state, found = apply_sparsevlm(model, **OPTIONS), []
    for engine, criterion in zip((False, True), criteria, strict=True):
        with state.options(engine=engine):
            own = {"logits_processor": [Halving()], "stopping_criteria": [criterion], "pad_token_id": 95}
            found.append(model.generate(**inputs, **GREEDY, **own, **options))
    assert state.report.path == "engine"
    assert criteria[0].seen == criteria[1].seen
    assert criteria[0].seen[0] == (1 if options is EVERYTHING else None)
    assert torch.equal(found[0].sequences, found[1].sequences)
    if options is EVERYTHING:
        assert_near(found[1].scores, found[0].scores)
        assert_near(found[1].logits, found[0].logits)  # those that the processor has written into


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("named", ["list", "word", "configuration"])
def test_strings_end_an_answer(named, engine):
    words = {chr(32 + i): i for i in range(96)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    own = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ")}
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    said = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    last = "".join(chr(32 + word) for word in said[1:3])
    config = GenerationConfig(**GREEDY, stop_strings=[last])
    own |= {"list": {"stop_strings": [last]}, "word": {"stop_strings": last}}.get(named, {"generation_config": config})
    apply_sparsevlm(model, **{**OPTIONS, "keep": 1.0}, engine=engine)
    found = model.generate(**inputs, **own, **({} if named == "configuration" else GREEDY))
    assert found[0, inputs["input_ids"].shape[1] :].tolist() == said[:3]


@pytest.mark.parametrize("engine", [False, True])
def test_the_model_may_be_asked_in_between(engine):
    """By a criterion, say: about text alone, or the last token alone."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    text = make_inputs([("text", 5)])["input_ids"]

    def asks(input_ids, scores, **kwargs):
        for ids in (text, input_ids[:, -1:]):
            model(input_ids=ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    wanted = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, stopping_criteria=[asks]), wanted)
    assert state.report.path == ("engine" if engine else "plain")


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("own_cache", [False, True])
def test_passes_beside_the_prompts_are_not_in_its_report(engine, own_cache):
    """Those of a criterion, and those without the prompt under guidance_scale."""
    model, inputs = tiny_model("llava"), make_inputs(*PROMPTS["one image"], family="llava")
    text, cache = make_inputs([("text", 5)], family="llava")["input_ids"], DynamicCache(config=model.config)

    def asks(input_ids, scores, **kwargs):
        model(input_ids=text, past_key_values=cache if own_cache else None)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    state, found = apply_sparsevlm(model, **OPTIONS, engine=engine), []
    for options in ({}, {"guidance_scale": 1.5}, {"stopping_criteria": [asks]}):
        model.generate(**inputs, **GREEDY, **options)
        report = state.report
        found.append((report.path, report.decode_steps, report.kv_bytes, report.samples, report.flops))
    assert found[0][:2] == ("engine" if engine else "plain", GREEDY["max_new_tokens"] - 1)
    assert found[1:] == found[:1] * 2


class Heard(BaseStreamer):
    """Notes what is put, and how many steps the report counts by then."""

    def __init__(self, state):
        self.said, self.steps, self._state = [], [], state

    def put(self, value):
        self.said.append(value.tolist())
        if value.ndim == 1:  # a new token
            self.steps.append(self._state.report.decode_steps)

    def end(self):
        self.said.append("end")


@pytest.mark.parametrize("ends", ["by length", "by a word", "by a criterion"])
@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
def test_a_step_that_was_run_ahead_is_taken_back(prompt, ends, monkeypatch):
    """Nothing of it is left: in tokens, scores, caches, counts, or what a streamer hears."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    state, found, taken_back = apply_sparsevlm(model, **OPTIONS, engine=True), [], []
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    word = int(said[0, 2])
    options = {"by length": {}, "by a word": {"eos_token_id": word, "pad_token_id": 95}, "by a criterion": {}}[ends]

    def early(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= inputs["input_ids"].shape[1] + 3)

    undo = DecodeGraph.take_back
    monkeypatch.setattr(DecodeGraph, "take_back", lambda self: taken_back.append(undo(self)))
    for ahead in (False, True):
        monkeypatch.setattr(DecodeGraph, "runs_ahead", ahead)
        own = {"stopping_criteria": [early]} if ends == "by a criterion" else {}
        heard = Heard(state) if len(said) == 1 else None
        output = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, streamer=heard, **options, **own, **EVERYTHING
        )
        found.append((output, heard and (heard.said, heard.steps), state.report.decode_steps))
    (plain, *others), (again, *others_again) = found
    assert torch.equal(plain.sequences, again.sequences)
    assert plain.sequences.shape[1] < inputs["input_ids"].shape[1] + 6 or len(said) > 1 or ends == "by length"
    assert others == others_again
    assert len(taken_back) == int(plain.sequences.shape[1] < inputs["input_ids"].shape[1] + 6)
    assert_near(again.logits, plain.logits)
    for mine, theirs in zip(cache_of(again).layers, cache_of(plain).layers, strict=True):
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert_near(mine.keys, theirs.keys)


def test_a_cache_of_the_user_is_filled():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, left padding"])
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    cache = DynamicCache(config=model.config)
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert state.report.path == "engine"
    assert cache.get_seq_length() == first.shape[1] - 1
    model.generate(**inputs, **GREEDY, past_key_values=StaticCache(model.config.get_text_config(), 60))
    assert "a StaticCache" in state.report.path_reason


def test_caches_that_are_not_filled():
    offloaded, sliding = DynamicCache(), DynamicCache()
    offloaded.offloading = True
    sliding.layers.append(DynamicSlidingWindowLayer(8))
    assert unsupported_cache(DynamicCache()) is None
    assert unsupported_cache(offloaded) == "an offloaded cache"
    assert unsupported_cache(sliding) == "a cache with DynamicSlidingWindowLayer"
