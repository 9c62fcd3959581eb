"""Later questions that choose anew say what a fresh call with the whole conversation says."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from runs import AtRandom
from transformers import DynamicCache, StaticCache

from chats import N_NEW, TURNS, Chat, begun
from covering import parametrize_pairs
from sparsevlm.compat import cache_of
from sparsevlm.request.conversation import conversation_of
from toys import FAMILIES, PROMPTS, join_visual, make_inputs, runs_on_engine, split_visual, tiny_model

SELECTORS = {
    "span": {},
    "sparsevlm": {"selector": "sparsevlm"},
    "cdpruner": {"selector": "cdpruner", "target_layers": None},
    "visionzip": {"selector": "visionzip", "target_layers": None},
}
PAIRED = ["qwen2_5_vl", "qwen3_vl", "llava", "internvl", "gemma3", "qwen3_5", "ovis2"]


def possible(case):
    family = FAMILIES[case["family"]]
    if not family.takes(PROMPTS[case["prompt"]]) or (case["engine"] and not runs_on_engine(case)):
        return False
    reads_tower = case["selector"] == "visionzip"
    return not (reads_tower and case["engine"] and not family.tower_on_engine)


@parametrize_pairs(
    possible,
    family=PAIRED,
    prompt=["one image", "video", "batch, unequal counts"],
    selector=list(SELECTORS),
    engine=[False, True],
    turn=["text", "image"],
)
def test_a_later_question_is_answered_as_by_a_fresh_call(family, prompt, selector, engine, turn):
    chat = Chat(family, prompt, engine, **SELECTORS[selector])
    first = chat.ask(join_visual([row for row in chat.visual if row], family))
    cache, n = cache_of(first), chat.tokens["attention_mask"].sum()
    ran = []
    for seed, kind in ((9, turn), (10, "text")):
        chat.answer(first.sequences)
        past = chat.tokens["attention_mask"][:, : cache.get_seq_length()].sum()
        new = chat.add([TURNS[kind]] * len(PROMPTS[prompt]), seed)
        tower = FAMILIES[family].tower_of(chat.model) if kind == "text" else torch.nn.Identity()
        handle = tower.register_forward_pre_hook(lambda *args: ran.append(args))
        first = chat.ask(new, cache)
        handle.remove()
        assert cache_of(first) is cache
        report = chat.state.report
        assert report.n_refreshed == int(past) >= int(n)
        assert report.features_bytes == conversation_of(cache).features.n_bytes > 0
        chat.check(first, exactly=turn == "text")  # a tower rounds images of one call otherwise than one by one
    assert not ran


@pytest.mark.parametrize("turn", list(TURNS))
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in PAIRED])
def test_other_families(family, turn):
    chat, cache = begun(family)
    found = chat.ask(chat.add([TURNS[turn]], 9), cache)
    assert chat.state.report.n_refreshed > 0
    chat.check(found, exactly=turn == "text")


BOTH_PATHS = pytest.mark.parametrize("engine", [False, True])


@BOTH_PATHS
def test_it_chooses_for_the_new_question(engine):
    """What a first question has left is not what the second one's own choice is, by which it is answered."""
    kept = {}
    for turns in ("first", "refresh"):
        chat, cache = begun(engine=engine, selector="sparsevlm", turns=turns)
        (before,) = chat.state.report.samples
        chat.add([TURNS["text"]], 9)
        kept[turns] = chat.ask({}, cache), chat.state.report.samples
    assert kept["first"][1] == ()  # of the text alone
    assert kept["refresh"][1][0].stages[-1].kept != before.stages[-1].kept
    assert not torch.equal(kept["first"][0].logits[0], kept["refresh"][0].logits[0])


@BOTH_PATHS
def test_new_tokens_alone(engine):
    chat, cache = begun(prompt="batch, left padding", engine=engine)
    past_len = cache.get_seq_length()
    chat.add([TURNS["image"]] * 2, 9)
    new = chat.add([TURNS["text"]] * 2, 10)
    pixels = split_visual(make_inputs(*[TURNS["image"]] * 2, seed=9), [TURNS["image"]] * 2)
    alone = {"input_ids": chat.tokens["input_ids"][:, past_len:], "mm_token_type_ids": None}
    found = chat.ask({**new, **join_visual(pixels)}, cache, **alone)
    assert found.sequences.shape[1] == alone["input_ids"].shape[1] + N_NEW
    found["sequences"] = torch.cat([chat.tokens["input_ids"][:, :past_len], found.sequences], dim=1)
    chat.check(found, exactly=False)
    chat.answer(found.sequences)
    chat.add([TURNS["text"]] * 2, 11)
    chat.check(chat.ask({}, cache), exactly=False)


@BOTH_PATHS
def test_copies_of_a_cache_go_their_own_ways(engine):
    chat, cache = begun(engine=engine)
    other, before = copy.deepcopy(cache), dict(chat.tokens)
    assert conversation_of(other) is conversation_of(cache)  # which nobody changes
    for own, seed in ((cache, 9), (other, 10)):
        chat.tokens = dict(before)
        chat.add([TURNS["text"]], seed)
        chat.check(chat.ask({}, own))


@BOTH_PATHS
def test_a_cropped_cache(engine):
    """The last question is taken back, with its image where it had one that was not pruned."""
    chat, cache = begun(engine=engine)
    before, visual = dict(chat.tokens), list(chat.visual)
    with chat.state.options(keep=1.0):
        chat.answer(chat.ask(chat.add([TURNS["image"]], 9), cache).sequences)
    cache.crop(before["input_ids"].shape[1] - cache.get_seq_length())
    chat.tokens, chat.visual = before, visual
    chat.add([TURNS["text"]], 10)
    chat.check(chat.ask({}, cache))
    with chat.state.options(keep=1.0):
        chat.answer(chat.ask(chat.add([TURNS["image"]], 9), cache).sequences)
    cache.crop(-10)
    chat.tokens = {name: value[:, : cache.get_seq_length()] for name, value in chat.tokens.items()}
    chat.add([TURNS["text"]], 12)
    with pytest.raises(ValueError, match="are not whole images"):
        chat.ask({}, cache)


@pytest.mark.parametrize("several", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
@BOTH_PATHS
def test_several_answers(several, engine):
    chat, cache = begun(prompt="batch, left padding", engine=engine, more=several)
    chat.add([TURNS["text"]] * 2, 9)
    torch.manual_seed(0)
    found = chat.ask({}, cache, **several)
    own = chat.state.report
    torch.manual_seed(0)
    wanted, report = chat.fresh(**several)
    assert own.samples == report.samples
    assert torch.equal(found.sequences, wanted.sequences)
    assert own.features_bytes == 2 * 24 * 64 * 4  # not by answer


@BOTH_PATHS
def test_chosen_rows(engine):
    """Rows of the cache are reordered, left out and repeated with what is kept of them."""
    chat, cache = begun(prompt="batch, left padding", engine=engine)
    for pick in ([1, 0], [0, 0, 1], [2]):
        change = cache.reorder_cache if len(pick) == 2 else cache.batch_select_indices
        change(torch.tensor(pick))
        chat.tokens = {name: value[pick] for name, value in chat.tokens.items()}
        chat.visual = [chat.visual[row] for row in pick]
        chat.add([TURNS["text"]] * len(pick), 9)
        found = chat.ask({}, cache)
        chat.check(found)
        chat.answer(found.sequences)
    cache.batch_repeat_interleave(3)
    chat.add([TURNS["text"]], 10)
    chat.check(chat.ask({}, cache))


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "minicpmv4_6"])
def test_caches_that_are_handed_over(family, is_static):
    def new_cache():
        config = tiny_model(family).config.get_text_config()
        return StaticCache(config=config, max_cache_len=100) if is_static else DynamicCache(config=config)

    cache = new_cache()
    chat, found = begun(family, more={"past_key_values": cache})
    assert found is cache
    for seed in (9, 10):
        chat.add([TURNS["text"]], seed)
        found = chat.ask({}, cache)
        chat.check(found, past_key_values=new_cache())
        chat.answer(found.sequences)


@pytest.mark.parametrize("engines", [(True, False, True), (False, True, False)])
def test_paths_take_turns(engines):
    chat, cache = begun(family="qwen3_vl", engine=engines[0])
    for engine, seed in zip(engines[1:], (9, 10), strict=True):
        new = chat.add([TURNS["image"]], seed)
        with chat.state.options(engine=engine):
            found = chat.ask(new, cache)
            assert chat.state.report.path == ("engine" if engine else "plain")
            chat.check(found, exactly=False)
        chat.answer(found.sequences)


@BOTH_PATHS
def test_a_conversation_that_begins_with_text(engine):
    chat = Chat(engine=engine)
    chat.tokens, chat.visual = {}, []
    chat.add([[("text", 5)]], 3)
    first = chat.ask({})
    chat.answer(first.sequences)
    chat.add([TURNS["text"]], 4)
    second = chat.ask({}, cache_of(first))
    assert chat.state.report.n_refreshed == chat.state.report.features_bytes == 0  # nothing to choose anew
    chat.answer(second.sequences)
    found = chat.ask(chat.add([TURNS["image"]], 9), cache_of(first))
    chat.check(found)


@BOTH_PATHS
def test_a_call_that_fails_leaves_the_cache_as_it_was(engine):
    def fails(input_ids, scores):
        raise RuntimeError("too late")

    chat, cache = begun(engine=engine)
    chat.add([TURNS["text"]], 9)
    keys = [layer.keys for layer in cache.layers]
    with pytest.raises(RuntimeError, match="too late"):
        chat.ask({}, cache, logits_processor=[fails])
    assert all(layer.keys is before for layer, before in zip(cache.layers, keys, strict=True))
    chat.check(chat.ask({}, cache))


@BOTH_PATHS
def test_features_die_with_the_cache(engine):
    chat, cache = begun(engine=engine)
    chat.add([TURNS["text"]], 9)
    chat.ask({}, cache)
    kept, other = weakref.ref(conversation_of(cache).features.rows[0].tokens), copy.deepcopy(cache)
    del cache
    gc.collect()
    assert kept() is not None
    other.reset()  # a new conversation begins
    assert conversation_of(other) is None
    gc.collect()
    assert kept() is None
    chat, cache = begun(engine=engine)
    kept = weakref.ref(conversation_of(cache).features.rows[0].tokens)
    chat.add([TURNS["text"]], 9)
    chat.ask({}, cache)
    del cache
    gc.collect()
    assert kept() is None


@BOTH_PATHS
def test_nothing_is_kept_without_a_cache_to_go_on_with(engine):
    chat = Chat(engine=engine)
    chat.ask(join_visual(chat.visual), return_dict_in_generate=False, output_logits=False)
    assert chat.state.report.features_bytes == 0


def test_guesses_and_selectors_before_the_decoder():
    chat, cache = begun(selector=AtRandom(), target_layers=None)
    chat.add([TURNS["text"]], 9)
    found = chat.ask({}, cache, prompt_lookup_num_tokens=3)
    chat.check(found, exactly=False, prompt_lookup_num_tokens=3)
