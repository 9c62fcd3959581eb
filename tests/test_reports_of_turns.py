"""A report for every call: of turns on a kept cache as well, whatever passes a call makes, on both paths."""

from __future__ import annotations

import copy

import pytest
import torch

from chats import begun
from sparsevlm import ReportTotal, apply_sparsevlm
from sparsevlm.compat import cache_of
from sparsevlm.engine.generate import Engine
from sparsevlm.request.costs import prefill_flops
from sparsevlm.request.session import Session
from toys import IMAGE, PROMPTS, VIDEO, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
N_STEPS = 3
N_VISUAL = 16  # of every image of llava
GREEDY = {
    "max_new_tokens": N_STEPS + 1,
    "do_sample": False,
    "return_dict_in_generate": True,
    "suppress_tokens": [IMAGE, VIDEO],
}
BYTES_PER_TOKEN = 6 * 2 * 2 * 16 * 4  # keys and values of two heads of 16 in six layers, in float32
PATHS = pytest.mark.parametrize(("engine", "path"), [(False, "plain"), (True, "engine")])


@pytest.fixture
def requests(monkeypatch):
    """Requests that were begun."""
    begin, found = Session.new_request, []

    def noted(self, *args, **kwargs):
        found.append(begin(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Session, "new_request", noted)
    return found


def behind(output, *row, family="llava"):
    """Inputs of one more turn, all tokens so far among them."""
    more = make_inputs([*row], seed=9, family=family)
    more.pop("mm_token_type_ids", None)
    ids = torch.cat([output.sequences, more["input_ids"]], dim=1)
    return {**more, "input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache_of(output)}


def chat(engine, family="llava"):
    model = tiny_model(family)
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    return model, state, model.generate(**make_inputs(*PROMPTS["one image"], family=family), **GREEDY)


def held(output):
    layers = cache_of(output).layers
    return sum(states.numel() * states.element_size() for layer in layers for states in (layer.keys, layer.values))


@PATHS
def test_every_turn_has_a_report_of_its_own(engine, path):
    model, state, output = chat(engine)
    reports, dicts, past_len = [state.report], [state.report.to_dict()], 0
    for row in ([("text", 6)], [("text", 5)], [("text", 2), ("image", 4, 5), ("text", 4)]):
        past, past_len = held(output), cache_of(output).get_seq_length()
        inputs = behind(output, *row)
        output = model.generate(**inputs, **GREEDY)
        report = state.report
        n_new = inputs["input_ids"].shape[1] - past_len
        dense = prefill_flops(state.adapter, [n_new] * state.adapter.n_layers, past_len)
        assert (report.path, report.decode_steps, report.failed) == (path, N_STEPS, None)
        assert set(report.wall_ms) >= {"prefill", "decode"}
        assert report.flops.dense == dense
        assert report.past_kv_bytes.sparse == past
        assert report.past_kv_bytes.dense == BYTES_PER_TOKEN * past_len
        assert report.kv_bytes.sparse == held(output) - N_STEPS * BYTES_PER_TOKEN
        assert report.kv_bytes.dense == BYTES_PER_TOKEN * (past_len + n_new)
        assert f"{past / 1e6:.2f} MB of it from before" in str(report)
        reports.append(report)
        dicts.append(report.to_dict())
    assert [report.n_visual for report in reports] == [N_VISUAL, 0, 0, N_VISUAL]
    assert [report.skipped_because for report in reports] == [None, *["no image or video in the input"] * 2, None]
    assert [report.flops.ratio for report in reports[1:3]] == [1.0, 1.0]
    assert [report.to_dict() for report in reports] == dicts
    total = ReportTotal.of(reports)
    assert (total.n_requests, total.n_samples, total.n_visual_sum, total.decode_steps) == (
        4,
        2,
        2 * N_VISUAL,
        4 * N_STEPS,
    )
    assert total.final_tokens_sum == sum(report.final_tokens for report in reports)
    assert total.kv_bytes.sparse == held(output) - 4 * N_STEPS * BYTES_PER_TOKEN
    assert total.flops.sparse == sum(report.flops.sparse for report in reports)
    said = str(total)
    assert said.startswith("4 requests, 2 left dense\n")
    assert f"visual tokens per sample: {N_VISUAL:.1f} in, average {total.average_in:.1f} (layer inputs)" in said
    assert f"KV cache: {total.kv_bytes.sparse / 1e6:.2f} of {total.kv_bytes.dense / 1e6:.2f} MB" in said
    assert f"({4 * N_STEPS} decode steps)" in said
    assert "visual tokens" not in str(ReportTotal.of(reports[1:2]))


@PATHS
def test_a_copy_of_the_cache_and_a_call_in_between_change_nothing_in_a_report(engine, path):
    found = []
    for case in ("the cache", "its copy", "a call in between"):
        model, state, first = chat(engine)
        inputs = behind(first, ("text", 6))
        if case == "its copy":
            inputs["past_key_values"] = copy.deepcopy(inputs["past_key_values"])
        elif case == "a call in between":
            model.generate(**make_inputs([("text", 4)], family="llava"), **GREEDY)
        model.generate(**inputs, **GREEDY)
        found.append({**state.report.to_dict(), "wall_ms": set(state.report.wall_ms)})
    assert found[0] == found[1] == found[2]
    assert found[0]["path"] == path


def in_parts(model, input_ids, generation_config=None, **kwargs):
    """A loop that gives a prompt in parts."""
    cache = cache_of(kwargs)
    past_len = cache.get_seq_length()
    for start in range(past_len, input_ids.shape[1], 3):
        part = input_ids[:, start : start + 3]
        logits = model(input_ids=part, past_key_values=cache).logits
    return torch.cat([input_ids, logits[:, -1:].argmax(dim=-1)], dim=1)


@PATHS
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("prompt lookup", {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}),
        ("a loop of the user's", {"custom_generate": in_parts}),
        ("guidance", {"guidance_scale": 1.5}),
        ("a model that drafts", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_passes_of_a_call_are_of_one_request(engine, path, way, options, requests):
    model, state, first = chat(engine)
    if way == "a model that drafts":
        options = {"assistant_model": tiny_model("llava", seed=3)}
    requests.clear()
    model.generate(**behind(first, ("text", 6)), **{**GREEDY, **options})
    assert len(requests) == 1
    assert (state.report.n_visual, state.report.failed) == (0, None)
    assert state.report.decode_steps > 0


@pytest.mark.parametrize("guidance_scale", [None, 1.5])
def test_steps_without_a_cache_are_of_one_request(guidance_scale, requests):
    model, state, _ = chat(False)
    requests.clear()
    options = {**GREEDY, "use_cache": False, "guidance_scale": guidance_scale}
    model.generate(**make_inputs([("text", 6)], family="llava"), **options)
    assert len(requests) == 1
    assert state.report.decode_steps == N_STEPS


@PATHS
def test_calls_within_a_turn_and_errors(engine, path):
    model, state, first = chat(engine)
    text = make_inputs([("text", 3)], family="llava")

    def asks(input_ids, scores, **kwargs):
        model.generate(**text, max_new_tokens=2, do_sample=False)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def fails(input_ids, scores):
        if input_ids.shape[1] > inputs["input_ids"].shape[1]:
            raise ValueError("in a later turn")
        return scores

    inputs = behind(first, ("text", 6))
    inputs["past_key_values"] = copy.deepcopy(cache_of(first))
    model.generate(**inputs, **GREEDY, stopping_criteria=[asks])
    assert (state.report.path, state.report.decode_steps) == (path, N_STEPS)
    inputs["past_key_values"], before = copy.deepcopy(cache_of(first)), state.report
    with pytest.raises(ValueError, match="in a later turn"):
        model.generate(**inputs, **GREEDY, logits_processor=[fails])
    report = state.report
    assert (report.decode_steps, report.failed) == (1, "ValueError: in a later turn")
    assert (report.prompt_finished, report.flops) == (True, before.flops)
    inputs["past_key_values"] = copy.deepcopy(cache_of(first))
    model.generate(**inputs, **GREEDY)
    assert (state.report.decode_steps, state.report.failed) == (N_STEPS, None)
    assert (report.decode_steps, report.failed) == (1, "ValueError: in a later turn")


@PATHS
def test_a_turn_whose_prompt_fails_says_so_and_what_follows_begins_anew(engine, path, monkeypatch):
    model, state, first = chat(engine)
    inputs, norm = behind(first, ("text", 6)), state.adapter.decoder.norm

    def fails(*args):
        raise RuntimeError("in the prompt")

    with monkeypatch.context() as fault:
        if engine:
            fault.setattr("sparsevlm.engine.text.second_turn.run_layer", fails)
        else:
            fault.setattr(norm, "forward", fails)
        with pytest.raises(RuntimeError, match="in the prompt"):
            model.generate(**inputs, **GREEDY)
    report = state.report
    assert (report.path, report.failed) == (path, "RuntimeError: in the prompt")
    assert (report.prompt_finished, report.decode_steps, report.flops.sparse) == (False, 0, 0)
    assert "the prompt was not finished" in str(report)
    assert "at the end" not in str(report)
    with torch.no_grad():
        model(input_ids=first.sequences[:, -1:], past_key_values=cache_of(first))
    assert (state.report.failed, state.report.prompt_finished, state.report.decode_steps) == (None, True, 0)
    assert report.failed == "RuntimeError: in the prompt"


@PATHS
def test_bytes_that_a_turn_adds_are_those_of_its_tokens(engine, path):
    """Also where samples keep unequal numbers."""
    model = tiny_model()
    state = apply_sparsevlm(model, **{**OPTIONS, "keep": None}, engine=engine)
    inputs = make_inputs(*PROMPTS["batch, unequal counts"])
    first = model.generate(**inputs, **GREEDY)
    before = state.report
    assert len({sample.final_tokens for sample in before.samples}) > 1
    ids = torch.cat([first.sequences, make_inputs(*[[("text", 6)]] * 3)["input_ids"]], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
    model.generate(ids, attention_mask=mask, past_key_values=cache_of(first), **GREEDY)
    assert state.report.path == path
    added = ReportTotal.of([state.report]).kv_bytes
    assert added.dense == added.sparse == 3 * 7 * BYTES_PER_TOKEN
    assert state.report.past_kv_bytes.sparse == before.kv_bytes.sparse + 3 * N_STEPS * BYTES_PER_TOKEN


def test_a_turn_that_the_engine_leaves_to_the_hooks_begins_anew_there(monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError

    model, state, first = chat(True)
    monkeypatch.setattr(Engine, "_decode", fails)
    model.generate(**behind(first, ("text", 6)), **GREEDY)
    assert (state.report.path, state.report.decode_steps) == ("plain", N_STEPS)
    assert "out of memory" in state.report.path_reason


@PATHS
def test_direct_calls_on_the_cache(engine, path, requests):
    """One token is a step of the request before, several are a turn."""
    model, state, first = chat(engine)
    cache, one = cache_of(first), first.sequences[:, -1:]
    before = state.report
    with torch.no_grad():
        model(input_ids=one, past_key_values=cache)
        assert (state.report.n_visual, state.report.decode_steps) == (N_VISUAL, N_STEPS + 1)
        assert ("; later steps on the path plain" in state.report.path_reason) == engine
        assert before.decode_steps == N_STEPS
        past = held(first)
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
        assert (state.report.n_visual, state.report.decode_steps) == (0, 0)
        assert state.report.past_kv_bytes.sparse == past
        model(input_ids=one, past_key_values=cache)
        assert (state.report.n_visual, state.report.decode_steps) == (0, 1)
    assert len(requests) == 2


@pytest.mark.parametrize("engine", [False, True])
def test_drafts_of_an_assistant_are_one_request_for_each_answer(engine):
    """Its rounds go on with a cache of their own, by calls of its ``generate``."""
    model, assistant = tiny_model("llava"), tiny_model("llava", seed=3)
    inputs, found = make_inputs(*PROMPTS["one image"], family="llava"), []
    state = apply_sparsevlm(assistant, **OPTIONS, engine=engine)
    for _ in range(2):
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 8}, assistant_model=assistant)
        found.append((state.report.n_visual, state.report.decode_steps))
    assert found[0] == found[1]
    assert found[0][0] == N_VISUAL
    assert found[0][1] > 1
    assert state.report.path_reason.endswith(" (an assistant model)" if engine else "modules")


@pytest.mark.parametrize("engine", [False, True])
def test_a_conversation_that_is_prefilled_again_has_no_past(engine):
    chat, cache = begun(engine=engine)
    first = chat.state.report
    chat.ask(chat.add([[("text", 6)]], 9), cache)
    assert chat.state.report.n_visual == first.n_visual == 24
    assert chat.state.report.past_kv_bytes.dense == 0
    assert chat.state.report.decode_steps == first.decode_steps
