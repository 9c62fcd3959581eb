"""What tests of training share."""

from __future__ import annotations

import pytest

from tiny_gguf import make_llama, write_gguf


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny decoder, read from a file laid out as SmolLM2's."""
    pytest.importorskip("gguf")
    from sparsevlm.smol.decoder import read_decoder

    return read_decoder(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", make_llama()))
