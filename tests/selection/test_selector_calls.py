"""Errors inside a selector name it, the layer, and what it reads without asking for it."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from selector_contexts import make_context

from sparsevlm import Report, apply_sparsevlm, error_notes
from sparsevlm.error_notes import add_note, with_notes
from sparsevlm.plugins.vllm.choice import Run, choose
from sparsevlm.plugins.vllm.options import Options
from sparsevlm.plugins.vllm.positions import grid_coordinates
from sparsevlm.selection.context import NEEDS, SelectorTraits
from sparsevlm.selection.decide import decide
from sparsevlm.selection.padded import PaddedSelection, padded_sample, unpadded
from sparsevlm.selection.places import highest
from sparsevlm.selection.selectors.fastv import FastVSelector
from toys import PROMPTS, make_inputs, tiny_model

N, N_KEEP = 12, 5
OPTIONS = {"min_keep": 3, "keep": 0.6}
GREEDY = {"max_new_tokens": 2, "do_sample": False}
PATHS = pytest.mark.parametrize(("engine", "path"), [(False, "plain"), (True, "engine")])


def first(n_keep):
    return torch.arange(n_keep)


class Change:
    """Reads what it does not ask for."""

    name = "change"

    def select(self, context, n_keep):
        change = (context.hidden_states - context.previous_hidden_states).norm(dim=-1)
        return change.topk(n_keep).indices.sort().values


class PaddedChange(Change):
    """The same for the device."""

    def select(self, context, n_keep):
        return unpadded(self.select_padded(padded_sample(context, n_keep)))

    def select_padded(self, context):
        change = (context.hidden_states - context.previous_hidden_states).norm(dim=-1)
        return PaddedSelection(highest(change, context.valid, context.n_keep))


class Batched(Change):
    """A generator, which fails when its answers are fetched."""

    def select_batch(self, contexts, n_keep):
        for context in contexts:
            yield context.last_attention.topk(n_keep).indices.sort().values


class Early:
    """Before the decoder."""

    name = "early"
    placement = "before_decoder"

    def select(self, context, n_keep):
        return (context.features * 2)[:, 0].topk(n_keep).indices.sort().values


class EarlyLate(Early):
    def select(self, context, n_keep):
        return context.last_attention.topk(n_keep).indices.sort().values


class Both(Early):
    """Where a field that it lists does not exist."""

    placement = "both"
    needs = ("last_attention",)

    def select(self, context, n_keep):
        return context.last_attention.topk(n_keep).indices.sort().values


class Fails:
    name = "fails"

    def __init__(self, error):
        self.error, self.calls = error, 0

    def select(self, context, n_keep):
        self.calls += 1
        raise self.error


class FailsInOrder(Fails):
    def select(self, context, n_keep):
        return first(n_keep)

    def order(self, states, valid, n_keep):
        raise self.error


class FailsPadded(FailsInOrder):
    order = None

    def select_padded(self, context):
        raise self.error


def ask(selector, *contexts):
    """The decision on contexts that hold nothing but what the selector lists."""
    traits = SelectorTraits.of(selector)
    nothing = dict.fromkeys(set(NEEDS) - traits.needs)
    contexts = contexts or (make_context(N, **nothing),)
    return decide(contexts, selector, traits, [N_KEEP] * len(contexts))


@pytest.mark.parametrize(
    ("selector", "field"),
    [(Change(), "previous_hidden_states"), (PaddedChange(), "previous_hidden_states"), (Batched(), "last_attention")],
)
def test_a_field_that_is_not_listed_is_named_with_the_remedy(selector, field):
    with pytest.raises(TypeError, match=f"selector 'change' reads {field} at target layer 2") as raised:
        ask(selector)
    assert "add the name to needs. needs may list features, text_features," in str(raised.value)
    assert all(name in str(raised.value) for name in NEEDS)
    assert isinstance(raised.value.__cause__, (TypeError, AttributeError))


def test_only_what_the_selector_itself_reads_is_named():
    class Copies(Change):
        def select(self, context, n_keep):
            part = context.at(torch.arange(context.n_visual))
            return part.rater_attention.sum(dim=0).topk(n_keep).indices.sort().values

    with pytest.raises(TypeError, match="'change' reads rater_attention at target layer"):
        ask(Copies())


def test_what_a_helper_has_read_is_named_and_what_is_listed_is_not():
    class Helped(Change):
        needs = ("last_attention",)

        def scores(self, context):
            return context.prior_attention

        def select(self, context, n_keep):
            return (context.last_attention * self.scores(context)).topk(n_keep).indices.sort().values

    with pytest.raises(TypeError, match="reads prior_attention at target layer 2, not listed in its needs"):
        ask(Helped())


def test_a_subclass_of_a_built_in_selector_that_lists_less():
    class Less(FastVSelector):
        needs = ()

    with pytest.raises(AssertionError) as raised:
        ask(Less())
    note = "which reads last_attention: None there (needs does not list last_attention)"
    assert with_notes(raised.value) == f"(in selector 'fastv' at target layer 2, {note})"


def test_what_does_not_exist_before_the_decoder_is_not_to_be_listed():
    early = make_context(N, layer=-1, **dict.fromkeys(NEEDS))
    with pytest.raises(TypeError, match=r"reads last_attention before the decoder .* does not exist there") as raised:
        ask(EarlyLate(), early)
    assert str(raised.value).endswith("may list features, text_features, vision_attention, vision_keys.")
    with pytest.raises(TypeError, match=r"reads features before the decoder .*: add the name to needs"):
        ask(Early(), early)
    with pytest.raises(AttributeError, match="topk") as kept:
        ask(Both(), early)
    assert with_notes(kept.value).endswith(
        "(in selector 'early' before the decoder (layer -1), which reads last_attention: None there)"
    )


def test_a_field_may_be_tested_for_none():
    class Careful(Change):
        def select(self, context, n_keep):
            assert context.previous_hidden_states is None
            assert (
                type(context).__getattribute__ is object.__getattribute__
            )  # nothing is recorded as long as all is well
            return first(n_keep)

    (decision,) = ask(Careful())
    assert decision.selection.keep_idx.tolist() == list(range(N_KEEP))


class OwnError(Exception):
    """A user's."""


@pytest.mark.parametrize("error", [OwnError("mine"), KeyError("k"), RuntimeError("no"), AssertionError("no")])
def test_other_errors_stay_what_they_are_and_name_selector_and_layer(error):
    selector = Fails(error)
    with pytest.raises(type(error)) as raised:
        ask(selector)
    assert raised.value is error
    assert with_notes(error).endswith("(in selector 'fails' at target layer 2)")
    is_asked_again = isinstance(error, AssertionError)  # nothing else is that did not fail for None
    assert selector.calls == 1 + is_asked_again


def test_an_order_that_fails_is_named():
    images = torch.arange(N) // 6
    with pytest.raises(OwnError) as raised:
        ask(FailsInOrder(OwnError("mine")), make_context(N, image_idx=images, n_images=2))
    assert with_notes(raised.value) == "mine (in selector 'fails' at target layer 2)"


@PATHS
@pytest.mark.parametrize("selector", [Change(), PaddedChange(), Batched()])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_field_that_is_not_listed_is_named_on_either_path(selector, layer, engine, path):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, selector=selector, target_layers=[layer], engine=engine, **OPTIONS)
    with pytest.raises(TypeError, match=f"selector 'change' reads .* at target layer {layer}, .*add the name to needs"):
        model.generate(**inputs, **GREEDY)
    assert state.report.path == path
    assert "add the name to needs" in state.report.failed


@pytest.mark.parametrize(
    ("kind", "engine", "path"),
    [(Fails, False, "plain"), (Fails, True, "engine"), (FailsInOrder, True, "engine"), (FailsPadded, True, "engine")],
)
def test_other_errors_are_named_on_either_path(kind, engine, path):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    for layer in (2, 0):
        error = OwnError("mine")
        state = apply_sparsevlm(model, selector=kind(error), target_layers=[layer], engine=engine, **OPTIONS)
        with pytest.raises(OwnError) as raised:
            model.generate(**inputs, **GREEDY)
        assert raised.value is error
        assert state.report.path == path
        assert state.report.failed == f"OwnError: mine (in selector 'fails' at target layer {layer})"
        assert Report.from_dict(state.report.to_dict()).failed == state.report.failed


@PATHS
def test_a_program_that_is_run_again_names_the_layer_of_this_run(engine, path):
    """Layers may share a program."""

    class Later(FailsPadded):
        def order(self, states, valid, n_keep):
            self.calls += 1
            if self.calls > 1:
                raise self.error
            return torch.arange(n_keep).repeat(states.shape[0], 1)

        select_padded = None

        def select(self, context, n_keep):
            return self.order(context.hidden_states[None], None, n_keep)[0]

    error = OwnError("mine")
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, selector=Later(error), target_layers=[0, 2], engine=engine, **OPTIONS)
    with pytest.raises(OwnError):
        model.generate(**inputs, **GREEDY)
    assert (state.report.path, with_notes(error)) == (path, "mine (in selector 'fails' at target layer 2)")


@PATHS
def test_before_the_decoder(engine, path):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, selector=Early(), engine=engine, **OPTIONS)
    with pytest.raises(TypeError, match=r"selector 'early' reads features before the decoder \(layer -1\)"):
        model.generate(**inputs, **GREEDY)
    assert state.report.path == path


@dataclass(frozen=True)
class EarlyFails:
    """As vLLM's plugin imports it."""

    placement = "before_decoder"

    def select(self, context, n_keep):
        raise ValueError("mine")


def test_the_plugin_of_vllm_names_them(caplog):
    rows = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    run = Run(rows, grid_coordinates((1, 3, 4)), N_KEEP)
    with pytest.raises(TypeError, match=r"selector 'early' reads features before the decoder .*add the name to needs"):
        choose([run], Options(keep=N_KEEP, selector=f"{__name__}:Early", min_keep=1), 8)
    choose([run], Options(keep=N_KEEP, selector=f"{__name__}:EarlyFails", min_keep=1), 8)  # which goes on
    assert "mine (in selector 'EarlyFails' before the decoder (layer -1))" in caplog.text


@pytest.mark.parametrize("version", [(3, 10), sys.version_info])
def test_notes_of_an_error(version, monkeypatch):
    """Tracebacks of Python 3.10 show no notes: there the first is the cause, too."""
    monkeypatch.setattr(error_notes, "sys", SimpleNamespace(version_info=version))
    error = ValueError("wrong")
    assert with_notes(error) == "wrong"
    add_note(error, "here")
    add_note(error, "and there")
    add_note(error, "here")
    assert with_notes(error) == "wrong (here; and there)"
    assert error.__notes__ == ["here", "and there"]
    shown = "".join(traceback.format_exception(error))
    assert shown.index("here") < shown.rindex("wrong") if version < (3, 11) else shown.endswith("here\nand there\n")
    cause = KeyError("first")
    error.__cause__ = cause
    add_note(error, "last")
    assert error.__cause__ is cause
