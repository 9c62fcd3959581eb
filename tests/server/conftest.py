"""Servers of the bundled model, each on a free port, with OpenAI's client."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def loaded():
    """The bundled model under SparseVLM, and its processor."""
    from sparsevlm import apply_sparsevlm
    from sparsevlm.bundled import bundled_path
    from sparsevlm.inputs import load_model, load_processor

    model, processor = load_model(bundled_path()), load_processor(bundled_path())
    return apply_sparsevlm(model, keep=0.25, processor=processor), processor


@pytest.fixture(scope="session")
def _shared(loaded):
    from live_server import LiveServer

    with LiveServer(*loaded) as live:
        yield live


@pytest.fixture
def live(_shared):
    """A server with the default settings; at the end of each test it must be idle and well."""
    yield _shared
    _shared.check_idle()


@pytest.fixture
def start(loaded):
    """Start a server with other settings."""
    from live_server import LiveServer

    started = []

    def start(**settings):
        started.append(LiveServer(*loaded, **settings).__enter__())
        return started[-1]

    yield start
    for live in started:
        live.__exit__(None, None, None)


@pytest.fixture
def endless(loaded, monkeypatch):
    """Answers end at their number of tokens only, and every token takes a while."""
    import time

    from sparsevlm.server.worker import Row

    model, push = loaded[0].adapter.model, Row.push

    def push_slowly(self, token):
        time.sleep(0.02)
        push(self, token)

    monkeypatch.setattr(model.generation_config, "eos_token_id", [model.config.get_text_config().vocab_size - 1])
    monkeypatch.setattr(Row, "push", push_slowly)
