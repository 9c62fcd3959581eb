"""Later questions that choose anew, on towers of the engine: what runs, what is recorded, what is kept over calls."""

from __future__ import annotations

import pytest
import torch

from chats import TURNS, begun
from sparsevlm.engine import generate
from sparsevlm.engine.vision.captured import _Program
from sparsevlm.engine.vision.program import VisionPrograms
from toys import FAMILIES, ON_ENGINE, make_inputs

OF_PROGRAMS = [name for name in ON_ENGINE if FAMILIES[name].tower_on_engine]
RECORDED = [name for name in ON_ENGINE if not FAMILIES[name].tower_on_engine]


@pytest.fixture
def ran(monkeypatch):
    """Programs of the tower, and of its modules, that have run."""
    seen = []
    for kind in (VisionPrograms, _Program):

        def counted(self, *args, kind=kind, call=kind.__call__, **kwargs):
            seen.append(kind)
            return call(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", counted)
    return seen


def asked(chat, cache, turn, seed=9):
    """The answer to one more question, its report, and that of a fresh call, which has to say the same."""
    found = chat.ask(chat.add([TURNS[turn]], seed), cache)
    report = chat.state.report
    chat.check(found, exactly=False)
    chat.answer(found.sequences)
    return report


@pytest.mark.parametrize("family", ON_ENGINE)
def test_new_images_run_by_programs_and_questions_run_none(family, ran):
    program = VisionPrograms if family in OF_PROGRAMS else _Program
    chat, cache = begun(family, engine=True)
    # Images of exact sizes are recorded when these come again.
    of_sizes = any(not part.in_tiles for part in chat.state.adapter.vision.captured)
    expected = (set() if of_sizes else {program}, {program}, set())
    for turn, programs in zip(("image", "image", "text"), expected, strict=True):
        new = chat.add([TURNS[turn]], 9)
        ran.clear()
        found = chat.ask(new, cache)
        assert set(ran) == programs
        assert chat.state.report.path_reason == "packed samples"
        chat.check(found, exactly=False)
        chat.answer(found.sequences)


@pytest.mark.parametrize("family", RECORDED)
def test_a_tower_that_is_not_recorded_is_told(family):
    chat, cache = begun(family, engine=True)
    chat.model.model.get_submodule(FAMILIES[family].tower.removeprefix("model.")).register_forward_hook(lambda *_: None)
    report = asked(chat, cache, "image")
    assert "; the tower ran module by module: something is hooked to" in report.path_reason
    assert "module by module" not in asked(chat, cache, "text").path_reason


@pytest.mark.parametrize("family", OF_PROGRAMS)
def test_images_that_are_kept_over_calls(family, ran):
    """A later turn may bring an image that an earlier call has brought; one of text has no use for the cache."""
    chat, cache = begun(family, engine=True, image_cache=1 << 20)
    for turn, seed, n_cached in (("image", 9, 0), ("text", 10, 0), ("image", 9, 1)):
        new = chat.add([TURNS[turn]], seed)
        ran.clear()
        found = chat.ask(new, cache)
        report = chat.state.report
        assert (report.images_cached, len(ran)) == (n_cached, int(turn == "image" and not n_cached))
        assert report.path_reason == "packed samples"
        with chat.state.options(image_cache=0):
            chat.check(found, exactly=False)
        chat.answer(found.sequences)


@pytest.mark.parametrize(("family", "engine"), [("llava", True), ("qwen2_5_vl", False)])
def test_where_no_image_can_be_kept_over_calls(family, engine):
    chat, cache = begun(family, engine=engine, image_cache=1 << 20)
    for turn in ("text", "image", "text"):
        new = chat.add([TURNS[turn]], 9)
        found = chat.ask(new, cache)
        assert ("image_cache" in chat.state.report.path_reason) == (turn == "image")
        chat.answer(found.sequences)


@pytest.mark.parametrize("family", ON_ENGINE)
def test_kept_features_outlive_the_memory_of_programs(family):
    """What programs give is overwritten by the next images; what a conversation keeps is not."""
    chat, cache = begun(family, engine=True)
    chat.add([TURNS["text"]], 9)
    for seed in (20, 21):
        with chat.state.options(turns="first"):
            chat.model.generate(**make_inputs([("text", 3), ("image", 4, 6), ("text", 7)], family=family, seed=seed))
    found = chat.ask({}, cache)
    chat.check(found)


def test_out_of_memory_while_a_new_image_is_encoded(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError

    chat, cache = begun("llava", engine=True)
    with monkeypatch.context() as patched:
        patched.setattr(generate, "encode_before", fails)
        assert asked(chat, cache, "image").path_reason == "packed samples"  # of the prompt; the image by the modules
    monkeypatch.setattr(_Program, "__call__", fails)
    assert "; the tower ran module by module: out of memory" in asked(chat, cache, "image").path_reason
