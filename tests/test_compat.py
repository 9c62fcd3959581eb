"""Versions of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from sparsevlm import apply_sparsevlm
from sparsevlm.compat import NEWEST, OLDEST, cache_of, check_transformers
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}


@pytest.mark.parametrize("version", [OLDEST, "5.20.1", "5.24.0"])
def test_the_tested_range_is_taken_silently(version, caplog):
    check_transformers(version=version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["5.16.4", "5.25.0", "6.0.0", "5.25.0.dev0", "4.57.0"])
def test_other_versions_are_refused_with_the_remedy(version, caplog):
    with pytest.raises(
        ImportError, match=rf'{version} is installed.*pip install "transformers>=5.17,<5.25".*allow_unt'
    ):
        check_transformers(version=version)
    check_transformers(True, version)
    assert version in caplog.text


def test_a_newer_patch_is_warned_about_once(caplog):
    for _ in range(2):
        check_transformers(version="5.24.7")
    assert caplog.text.count("patch 5.24.7") == 1


def test_the_installed_version_is_one_of_the_ends():
    assert transformers.__version__ in (OLDEST, NEWEST)


def test_apply_checks(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    check_transformers.cache_clear()
    with pytest.raises(ImportError, match=r"5\.99\.0"):
        apply_sparsevlm(tiny_model())
    assert apply_sparsevlm(tiny_model(), allow_untested=True).attached
    monkeypatch.undo()
    check_transformers.cache_clear()


def test_the_cache_has_two_names():
    assert cache_of({"cache": 1}) == cache_of({"past_key_values": 1}) == 1
    assert cache_of({"cache": None, "past_key_values": 2}) == 2
    assert cache_of({}) is None


def renamed(module, names):
    """Call a module by other names, as another version of transformers might; ``None``: not at all."""

    def rename(module, args, kwargs):
        kwargs = {names.get(name, name): value for name, value in kwargs.items()}
        kwargs.pop(None, None)
        return args, kwargs

    return module.register_forward_pre_hook(rename, with_kwargs=True, prepend=True)


def asked(model, inputs, *, direct):
    model.model.rope_deltas = None
    with torch.no_grad():
        return model(**inputs) if direct else model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("prompt", ["one image", "video"])
def test_images_that_the_first_pass_does_not_show_are_no_reason_to_go_on_dense(prompt, engine, direct):
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    names = dict.fromkeys(("pixel_values", "pixel_values_videos", "mm_encoder_outputs"))
    handle = renamed(model.model, names)
    with pytest.raises(RuntimeError, match=r"images were given, but the first pass .* Install a tested version"):
        asked(model, inputs, direct=direct)
    assert "RuntimeError" in state._session.last.failed
    text = {name: inputs[name] % 80 for name in ("input_ids", "attention_mask")}
    asked(model, text, direct=direct)  # where none were given, there is nothing to miss
    handle.remove()
    asked(model, inputs, direct=direct)
    assert state.report.final_tokens < state.report.n_visual


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"past_key_values": "kv", "cache": "kv"}, "a cache as kv"),
        ({"attention_mask": "mask"}, "no attention_mask"),
        ({"position_embeddings": "rotary"}, "no position_embeddings"),
    ],
    ids=["cache", "mask", "rotary"],
)
def test_a_layer_that_is_called_by_other_names_is_not_pruned_wrongly(names, message, direct):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **OPTIONS)
    handles = [renamed(layer, names) for layer in model.model.language_model.layers]
    with pytest.raises(RuntimeError, match=rf"decoder layer is given {message}.*Install a tested version"):
        asked(model, inputs, direct=direct)
    for handle in handles:
        handle.remove()
    asked(model, inputs, direct=direct)
