"""Answers, as OpenAI's client gets them."""

from __future__ import annotations

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from live_server import MODEL, LiveServer, about, asked, scene_url  # noqa: E402

from sparsevlm import apply_sparsevlm  # noqa: E402
from sparsevlm.bundled import bundled_path  # noqa: E402
from sparsevlm.inputs import load_model  # noqa: E402
from sparsevlm.inputs.turns import process, render_turn  # noqa: E402
from sparsevlm.scenes import draw_scene  # noqa: E402


def direct(loaded, content, scenes, max_new_tokens=8, **options):
    """What the library itself says: the answer and the report."""
    state, processor = loaded
    parts = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
    prompt = render_turn(processor, [{"role": "user", "content": parts}])
    inputs = process(processor, [prompt], [[draw_scene(scene).image for scene in scenes]])
    with state.options(**options):
        output = state.adapter.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        report = state.report
    new = output[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0], inputs["input_ids"].shape[1], report


def test_an_answer_is_that_of_the_library(live, loaded):
    text, n_prompt, report = direct(loaded, about(8), [8])
    answer = live.ask()
    assert answer.choices[0].message.content == text == "354"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == n_prompt
    assert answer.usage.completion_tokens == 4  # the end of the turn included
    assert answer.usage.total_tokens == n_prompt + 4
    assert answer.model == MODEL
    assert answer.sparsevlm["visual_tokens"] == report.n_visual == 256
    assert answer.sparsevlm["visual_tokens_kept"] == report.average_in
    assert answer.sparsevlm["visual_tokens_last_layer"] == report.final_tokens
    assert answer.sparsevlm["path"] == report.path == "plain"
    assert answer.sparsevlm["selector"] == "span-features"


@pytest.mark.parametrize("includes_usage", [True, False])
def test_a_stream_says_the_same_piece_by_piece(live, includes_usage):
    whole = live.ask(about(8, text="List all cards."), max_tokens=24)
    options = {"stream_options": {"include_usage": True}} if includes_usage else {}
    chunks = list(live.ask(about(8, text="List all cards."), max_tokens=24, stream=True, **options))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert len(list(filter(None, pieces))) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    ends = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [chunk.choices[0].finish_reason for chunk in ends] == [whole.choices[0].finish_reason]
    assert ends[0].sparsevlm["visual_tokens_kept"] == whole.sparsevlm["visual_tokens_kept"]
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert usages == ([whole.usage] if includes_usage else [])
    assert not includes_usage or not chunks[-1].choices


def test_options_of_one_request(live, loaded):
    for options in ({"keep": 0.5}, {"keep": 64, "selector": "random"}, {"schedule": [128, 64, 48, 40, 36, 32]}):
        of_library = {"keep": None, **options} if "schedule" in options else options
        text, _, report = direct(loaded, about(8), [8], **of_library)
        answer = live.ask(extra_body={"sparsevlm": options})
        assert answer.choices[0].message.content == text
        assert answer.sparsevlm["visual_tokens_kept"] == pytest.approx(report.average_in, abs=0.01)
        assert answer.sparsevlm["selector"] == report.selector
    assert live.ask().sparsevlm["visual_tokens_kept"] == 64.0  # the server's own are as before


def test_a_schedule_by_name_spreads_the_servers_budget(live, loaded):
    _, _, report = direct(loaded, about(8), [8], schedule="single")
    answer = live.ask(extra_body={"sparsevlm": {"schedule": "single"}})
    assert answer.sparsevlm["visual_tokens_kept"] == pytest.approx(report.average_in, abs=0.01)


def test_several_images_and_turns(live, loaded):
    two = about(8, 9, text="What number is on the blue card in the first image?")
    text, n_prompt, _ = direct(loaded, two, [8, 9])
    answer = live.ask(two)
    assert answer.choices[0].message.content == text
    assert answer.usage.prompt_tokens == n_prompt
    assert answer.sparsevlm["visual_tokens"] == 512
    first = live.ask().choices[0].message
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": about(8)},
        first.model_dump(),  # as it came, with its empty fields
        {"role": "user", "content": about(9)},
    ]
    later = live.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
    assert later.usage.prompt_tokens > n_prompt
    assert later.sparsevlm["visual_tokens"] == 512


def test_text_alone(live):
    answer = live.ask("Hello", max_tokens=3)
    assert answer.sparsevlm["visual_tokens"] == answer.sparsevlm["visual_tokens_kept"] == 0
    assert answer.usage.completion_tokens <= 3


def test_an_answer_ends_at_its_number_of_tokens(live):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = live.ask(about(8, text="List all cards."), **{"max_tokens": openai.omit, name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_an_answer_ends_before_a_stop_text(live):
    question = about(8, text="List all cards.")
    whole = live.ask(question, max_tokens=24).choices[0].message.content
    assert whole.startswith("blue 354, orange")
    for stop, cut in ((["354"], "blue "), ("4, o", "blue 35"), (["zzz", "ran", "e 3"], "blu"), ("ge 78x", None)):
        answer = live.ask(question, max_tokens=24, stop=stop)
        assert answer.choices[0].message.content == (whole if cut is None else cut)
        pieces = live.ask(question, max_tokens=24, stop=stop, stream=True)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        assert said == answer.choices[0].message.content
        if cut is not None:
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage.completion_tokens < 16


def test_a_seed_draws_the_same_again_and_greedy_draws_nothing(live):
    question = about(8, text="List all cards.")

    def drawn(**more):
        return live.ask(question, max_tokens=24, temperature=2.0, **more).choices[0].message.content

    assert drawn(seed=1) == drawn(seed=1)
    assert len({drawn(seed=seed) for seed in range(4)}) > 1
    assert len({drawn() for _ in range(4)}) > 1
    greedy = {live.ask(question, max_tokens=24, temperature=0, seed=seed).choices[0].message.content for seed in (1, 2)}
    assert len(greedy) == 1


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 5e-324])
def test_a_temperature_near_zero_is_answered(live, temperature):
    """Logits that are divided by less than float32 holds are no probabilities."""
    assert live.ask(temperature=temperature).choices[0].message.content == "354"


def test_requests_that_wait_together_are_one_batch(start):
    live = start(batch_wait=60.0)
    alone = [live.ask(about(scene, text="List all cards."), max_tokens=n).choices[0] for scene, n in CASES]
    works = [lambda case=case: live.ask(about(case[0], text="List all cards."), max_tokens=case[1]) for case in CASES]
    answers = live.together(works)
    assert [answer.sparsevlm["batch_size"] for answer in answers] == [4] * 4
    for (_, n), before, answer in zip(CASES, alone, answers, strict=True):
        assert answer.choices[0].message.content == before.message.content
        assert answer.choices[0].finish_reason == before.finish_reason
        assert answer.usage.completion_tokens <= n


CASES = [(8, 3), (9, 24), (10, 1), (11, 12)]


def test_unlike_requests_are_not_one_batch(start):
    live = start(batch_wait=60.0)
    more = [{}, {"extra_body": {"sparsevlm": {"keep": 0.5}}}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}]
    answers = live.together([lambda one=one: live.ask(**one) for one in more])
    assert [answer.sparsevlm["batch_size"] for answer in answers] == [1, 1, 1, 1]
    assert answers[1].sparsevlm["visual_tokens_kept"] > 100


def test_the_list_of_models(live):
    client = live.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "sparsevlm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("owner/other")


def test_what_was_done_is_counted(live):
    names = ("prompt_tokens", "visual_tokens", "visual_tokens_kept", "generated_tokens")
    before = {name: live.metric(f"{name}_total") for name in names}
    n_before = live.metric("request_seconds_count", phase="total")
    answered = live.metric("requests_total", path="/v1/chat/completions", status="200")
    answer = live.ask()
    live.check_idle()
    counted = [live.metric(f"{name}_total") - before[name] for name in names]
    assert counted == [answer.usage.prompt_tokens, 256, 64.0, answer.usage.completion_tokens]
    for phase in ("queue", "first_token", "total"):
        assert live.metric("request_seconds_count", phase=phase) == n_before + 1
    assert live.metric("requests_total", path="/v1/chat/completions", status="200") == answered + 1
    status, headers, text = live.send("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    for name in ("sparsevlm_queue_length 0.0", "sparsevlm_batch_size_bucket", 'phase="first_token"'):
        assert name in text.decode()


def test_a_request_has_an_id(live):
    status, headers, _ = live.send("GET", "/health", headers={"x-request-id": "mine-1"})
    assert (status, headers["x-request-id"]) == (200, "mine-1")
    for strange in ("a b", "x" * 65, 'q"{}'):
        assert live.send("GET", "/health", headers={"x-request-id": strange})[1]["x-request-id"].startswith("req-")
    assert live.client().chat.completions.with_raw_response.create(**asked()).headers["x-request-id"]


def test_an_image_that_comes_again_is_not_encoded_again(loaded):
    """On the engine, which alone keeps images; here it runs on the CPU."""
    model, processor = load_model(bundled_path()), loaded[1]
    state = apply_sparsevlm(model, keep=0.25, engine=True, image_cache=1 << 24, processor=processor)
    with LiveServer(state, processor) as live:
        first, again = live.ask(), live.ask(about(8, text="List all cards."))
        assert (first.sparsevlm["path"], first.sparsevlm["images_cached"]) == ("engine", 0)
        assert again.sparsevlm["images_cached"] == 1
        assert live.ask(about(9)).sparsevlm["images_cached"] == 0
        stream = live.ask(stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "354"


def test_image_formats_say_the_same(live):
    for kind in ("PNG", "WEBP", "GIF"):
        part = {"type": "image_url", "image_url": {"url": scene_url(8, kind), "detail": "auto"}}
        assert live.ask([part, about(8)[-1]]).choices[0].message.content == "354"
