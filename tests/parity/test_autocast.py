"""Under ``torch.autocast`` the model computes in half precision; what is read and decided is not rounded again."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.hooks import readout, vision_probe
from sparsevlm.request import step
from sparsevlm.selection.selectors import SELECTORS
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}
HALF = torch.autocast("cpu", dtype=torch.bfloat16)


class Reading:
    """Needs all that is computed of attention, and uses none of it."""

    needs = frozenset({"vision_attention", "vision_keys", "last_attention", "rater_attention"})

    def select(self, context, n_keep):
        return torch.arange(n_keep)


@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
def test_attention_is_read_as_without_it(prompt, monkeypatch):
    calls = []

    def compared(function):
        def both(*args):
            got = function(*args)
            with torch.autocast("cpu", enabled=False):
                calls.append(torch.equal(function(*args), got))
            return got

        return both

    for module, name in ((readout, "text_to_visual_attention"), (vision_probe, "received_attention")):
        monkeypatch.setattr(module, name, compared(getattr(module, name)))
    model = tiny_model()
    apply_sparsevlm(model, **OPTIONS, selector=Reading())
    with HALF:
        model.generate(**make_inputs(*PROMPTS[prompt]), max_new_tokens=1)
    assert calls
    assert all(calls)


class Checking:
    """A built-in selector, asked twice."""

    def __init__(self, name):
        self.inner = SELECTORS[name]()
        for attribute in ("placement", "needs", "default_schedule"):
            setattr(self, attribute, getattr(self.inner, attribute))
        self.asked = 0

    def select(self, context, n_keep):
        given = self.inner.select(context, n_keep)
        with torch.autocast("cpu", enabled=False):
            again = self.inner.select(context, n_keep)
        indices = [getattr(answer, "keep_idx", answer) for answer in (given, again)]
        assert torch.equal(*indices)
        assert not torch.is_autocast_enabled("cpu")
        self.asked += 1
        return given


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_every_selector_chooses_as_without_it(name):
    selector = Checking(name)
    model = tiny_model()
    options = {"keep": 0.7, "min_keep": 3} | ({} if selector.placement == "before_decoder" else {"target_layers": [1]})
    apply_sparsevlm(model, **options, selector=selector)
    with HALF:
        model.generate(**make_inputs([("text", 3), ("image", 8, 8), ("text", 7)]), max_new_tokens=1)
    assert selector.asked


def test_embedding_raters_are_chosen_as_without_it(monkeypatch):
    chosen = []
    choose = step.embedding_raters

    def both(*states):
        chosen.append(choose(*states))
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(choose(*states), chosen[-1])
        assert not torch.is_autocast_enabled("cpu")
        return chosen[-1]

    monkeypatch.setattr(step, "embedding_raters", both)
    model = tiny_model()
    apply_sparsevlm(model, selector="span", min_keep=3, raters="embedding")
    with HALF:
        model.generate(**make_inputs(*PROMPTS["one image"]), max_new_tokens=1)
    assert len(chosen) == 1
