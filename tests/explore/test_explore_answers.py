"""Answers behind the page: dense and pruned, by turns of several pages, stopped, refused."""

import itertools
import threading
import time

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.explore.answers import ANSWERING, DENSE, DONE, FAILED, STOPPED, WAITING, Answerer, Side
from sparsevlm.explore.drawing import draw_patches, numbers
from sparsevlm.explore.question import Question
from sparsevlm.explore.runs import Runs
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.inputs.turns import move_inputs, process, render_turn
from sparsevlm.scenes import draw_scene
from sparsevlm.selection.selectors import SELECTORS
from tiny_checkpoint import save_tiny_checkpoint
from toys import tiny_model
from toys.processors import missing_packages, save_processor

PICTURE = draw_scene(8).image.resize((224, 224))
N_VISUAL = 64


def asked(text="What is in the picture?", max_new_tokens=6, picture=PICTURE):
    return Question(picture, text, max_new_tokens)


def last(answerer, question, *sides, known=None):
    """The answers at the end."""
    return list(answerer.compare(question, sides or (DENSE,), threading.Event(), known))[-1]


def half(selector="span"):
    return Side.pruned(selector, 0.5)


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    """A model of random weights, with more layers than two targets."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("model"), n_layers=12)
    model, processor = load_model(folder, device="cpu"), load_processor(folder)
    model.generation_config.eos_token_id = None  # it says as many tokens as it is let
    return Answerer(model, processor, apply_sparsevlm(model, processor=processor, min_keep=4))


@pytest.fixture
def endless(answerer):
    """The model takes its time for every token."""
    hook = answerer._model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    yield answerer
    hook.remove()


def test_dense_and_pruned_answers_grow_one_behind_the_other(answerer):
    seen = list(answerer.compare(asked(), [DENSE, half()], threading.Event()))
    states = list(dict.fromkeys(tuple(answer.state for answer in answers) for answers in seen))
    assert states[0] == (WAITING, WAITING)
    assert states[-1] == (DONE, DONE)
    assert {(ANSWERING, WAITING), (DONE, ANSWERING)} <= set(states)
    dense, pruned = seen[-1]
    assert dense.n_tokens == pruned.n_tokens == 6
    assert 0 < dense.first_token_ms < dense.total_ms
    assert dense.report.average_in == dense.report.n_visual == N_VISUAL
    assert dense.report.kv_bytes.sparse == dense.report.kv_bytes.dense == pruned.report.kv_bytes.dense
    assert pruned.report.selector == "span"
    assert pruned.report.average_in <= 0.5 * N_VISUAL
    texts = [answers[0].text for answers in seen]
    assert all(earlier.strip() in later for earlier, later in itertools.pairwise(texts))


def test_the_dense_answer_is_that_of_transformers(answerer):
    question = asked("How many red circles are there?")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    prompt = render_turn(answerer.processor, messages)
    inputs = move_inputs(process(answerer.processor, [prompt], [[PICTURE]]), answerer._model)
    with answerer._state.options(keep=1.0, engine=False):
        plain = answerer._model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = plain[:, inputs["input_ids"].shape[1] :]
    (dense,) = last(answerer, question)
    assert dense.text == answerer.processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def test_known_answers_are_not_generated_again(answerer):
    (dense,) = last(answerer, asked())
    again = last(answerer, asked(), DENSE, half(), known={DENSE: dense})
    assert again[0] is dense
    assert last(answerer, asked(), DENSE, known={DENSE: dense}) == (dense,)
    assert again[1].state == DONE


def test_a_whole_slider_keeps_all_tokens_and_not_one(answerer):
    (answer,) = last(answerer, asked(), Side.pruned("span", 1))
    assert answer.report.average_in == N_VISUAL


def test_by_rank_is_the_default_rule(answerer):
    (answer,) = last(answerer, asked(), Side.pruned("span", None))
    assert any(stage.rank is not None for stage in answer.report.samples[0].stages)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (Side.pruned("span", 0.05), "keep=0.05 cannot hold on target layers"),
        (
            Side.pruned("divprune", None),
            "selector 'divprune' runs before the decoder, where no rank is known: set keep.",
        ),
    ],
)
def test_what_the_library_refuses_is_said_in_its_words(answerer, side, message):
    dense, refused, other = last(answerer, asked(), DENSE, side, half())
    assert (dense.state, refused.state, other.state) == (DONE, FAILED, DONE)
    assert refused.message.startswith(message)
    assert 'role="alert"' in numbers(refused)
    assert draw_patches(PICTURE, refused, 3) == (None, "")


def test_a_fault_is_told_without_its_traceback_and_leaves_the_model_free(answerer, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(answerer._model, "generate", fails)
        (answer,) = last(answerer, asked())
    assert (answer.state, answer.message) == (FAILED, "RuntimeError: out of memory")
    assert "Traceback" in caplog.text
    assert last(answerer, asked())[0].state == DONE


def test_a_stopped_answer_is_kept_as_far_as_it_came(endless):
    stop = threading.Event()
    for answers in endless.compare(asked(max_new_tokens=512), [DENSE, half()], stop):
        if answers[0].n_tokens >= 3:
            stop.set()
    assert [answer.state for answer in answers] == [STOPPED, STOPPED]
    assert 3 <= answers[0].n_tokens <= 12
    assert answers[0].report is not None
    assert answers[1].n_tokens == 0


def test_answers_of_the_engine_grow_and_are_stopped(answerer, monkeypatch):
    options = answerer._state.options
    monkeypatch.setattr(answerer._state, "options", lambda **changes: options(**changes, engine=True))
    seen = list(answerer.compare(asked(max_new_tokens=12), [half()], threading.Event()))
    assert seen[-1][0].report.path == "engine"
    assert seen[-1][0].n_tokens == 12
    assert any(0 < answers[0].n_tokens < 12 for answers in seen)
    stop = threading.Event()
    for answers in answerer.compare(asked(max_new_tokens=400), [half()], stop):
        if answers[0].n_tokens:
            stop.set()
    assert answers[0].state == STOPPED
    assert 0 < answers[0].n_tokens < 400


def test_a_page_that_goes_ends_its_answer_and_frees_the_model(endless):
    comparing = endless.compare(asked(max_new_tokens=512), [DENSE], threading.Event())
    while next(comparing)[0].n_tokens < 2:
        pass
    comparing.close()  # as the server does where the browser is gone
    begin = time.monotonic()
    assert last(endless, asked(max_new_tokens=2))[0].state == DONE
    assert time.monotonic() - begin < 5


def test_a_page_that_goes_while_it_waits_leaves_the_queue(endless):
    first, second = threading.Event(), threading.Event()
    holding = endless.compare(asked(max_new_tokens=512), [DENSE], first)
    while next(holding)[0].n_tokens < 1:
        pass
    waiting = endless.compare(asked(), [DENSE], second)
    assert next(waiting)[0].state == WAITING
    second.set()
    assert [answers[0].state for answers in waiting] == [STOPPED]
    assert next(holding)[0].state == ANSWERING
    holding.close()


def test_two_pages_get_their_own_options(answerer):
    pages = [
        (asked(), [DENSE, Side.pruned("span", 0.4), Side.pruned("grid", 0.6)]),
        (asked("How many red circles are there?"), [DENSE, Side.pruned("random", 0.8), Side.pruned("sparsevlm", 0.4)]),
    ]
    alone = [last(answerer, question, *sides) for question, sides in pages]
    together = [None, None]

    def ask(index):
        together[index] = last(answerer, pages[index][0], *pages[index][1])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, got in zip(alone, together, strict=True):
        assert [answer.text for answer in got] == [answer.text for answer in expected]
        assert [answer.report.selector for answer in got] == [answer.report.selector for answer in expected]
        assert [answer.report.samples[0].stages for answer in got] == [a.report.samples[0].stages for a in expected]


def test_no_time_holds_the_wait_for_another_page(answerer):
    with answerer._lock:
        comparing = answerer.compare(asked(), [DENSE], threading.Event())
        assert next(comparing)[0].state == WAITING
        time.sleep(2)
    *_, (answer,) = comparing
    assert answer.state == DONE
    assert answer.first_token_ms < answer.total_ms < 2000


def test_a_later_run_of_a_page_hides_the_former_and_no_other_page():
    runs = Runs()
    mine, other = runs.begin("mine", 3), runs.begin("other", 3)
    later = runs.begin("mine", 5)
    assert mine.stop.is_set()
    assert not mine.is_shown
    runs.turn_to("mine", 7)
    assert (later.layer, other.layer) == (7, 3)
    runs.stop("mine")
    assert later.stop.is_set()
    assert later.is_shown
    runs.leave("mine")
    assert not later.is_shown
    assert not other.stop.is_set()
    runs.turn_to("gone", 1)
    runs.stop("gone")
    runs.leave("gone")


def test_selectors_that_a_model_refuses_are_known_with_the_reason(answerer):
    assert answerer.refusals(list(SELECTORS)) == {}
    model = tiny_model("gemma4_unified", n_layers=12)
    refused = Answerer(model, None, apply_sparsevlm(model)).refusals(list(SELECTORS))
    assert set(refused) == {"visionzip", "hiprune", "scope"}
    assert refused["scope"].startswith("selector 'scope' needs vision_attention, which is not read")


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "paligemma"])
def test_other_families_answer_and_are_drawn(family, tmp_path):
    """Crops, tiles with separators, tiles and a picture without a chat template."""
    if missing := missing_packages(family):
        pytest.skip(f"the processor of {family} needs {', '.join(missing)}: nox -s explore")
    model = tiny_model(family, n_layers=12)
    model.config.save_pretrained(tmp_path)
    processor = load_processor(save_processor(family, tmp_path))
    answerer = Answerer(model, processor, apply_sparsevlm(model, processor=processor, min_keep=2))
    picture = PICTURE.resize((168, 112))
    question = asked("what is in the picture", 3, picture)
    dense, pruned = last(answerer, question, DENSE, Side.pruned("span", 0.6))
    assert (dense.state, pruned.state) == (DONE, DONE), pruned.message
    assert pruned.report.average_in < dense.report.average_in
    drawing, caption = draw_patches(picture, pruned, 11, processor)
    assert drawing is not None
    dropped = pruned.report.samples[0].n_visual - pruned.report.final_tokens
    assert f" {dropped:.0f} dropped of {dense.report.n_visual:.0f}." in caption
    assert torch.isfinite(torch.tensor(pruned.total_ms))
