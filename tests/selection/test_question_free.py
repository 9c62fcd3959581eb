"""turns='agnostic': what is kept does not depend on the question, and selectors that read it are refused."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.selection.selectors import SELECTORS
from toys import make_inputs, tiny_model

READERS = {
    "span-joint",
    "span-prior",
    "priortr",
    "sparsevlm",
    "sparsevlm-paper",
    "sparsevlm-v2",
    "fastv",
    "pyramiddrop",
    "cdpruner",
    "mmtok",
}
OPTIONS = {"min_keep": 3, "keep": 0.5, "turns": "agnostic"}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def kept(model, state, before=3, behind=7, seed=0):
    """Stages of a prompt with so much text before and behind the same image; that behind is drawn by ``seed``."""
    inputs = make_inputs([("text", before), ("image", 4, 6), ("text", behind)])
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    words = torch.Generator().manual_seed(seed)
    inputs["input_ids"][:, :before] = torch.arange(1, before + 1)
    inputs["input_ids"][:, -behind:] = torch.randint(1, 80, (1, behind), generator=words)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return [(stage.kept, stage.recycled) for stage in state.report.samples[0].stages]


@pytest.mark.parametrize("selector", sorted(SELECTORS.keys() - READERS))
def test_another_question_changes_nothing(model, selector):
    state = apply_sparsevlm(model, selector=selector, **OPTIONS)
    first = kept(model, state)
    assert any(len(one) < 24 for one, _ in first)
    assert all(kept(model, state, behind=n, seed=seed) == first for n, seed in ((7, 1), (7, 2), (15, 3)))


def test_the_control_bites(model):
    options = {**OPTIONS, "turns": "first", "selector": "sparsevlm", "target_layers": [1, 3], "keep": 0.7}
    state = apply_sparsevlm(model, **options)
    assert kept(model, state, seed=1) != kept(model, state, seed=2)


def test_text_before_the_image_is_read_by_states_of_layers_alone(model):
    state = apply_sparsevlm(model, selector="span", **{**OPTIONS, "target_layers": [1, 3], "keep": 0.75})
    choices = [kept(model, state, before=n) for n in (1, 9, 30)]
    assert any(one != choices[0] for one in choices)
    assert all(kept(model, state, before=9, seed=seed) == choices[1] for seed in (1, 2, 3))
    state = apply_sparsevlm(model, selector="divprune", **OPTIONS)
    assert kept(model, state, before=1) == kept(model, state, before=30)


@pytest.mark.parametrize("selector", sorted(READERS))
def test_selectors_that_read_the_question_are_refused(model, selector):
    with pytest.raises(
        ValueError,
        match=f"{selector!r} reads .*Choose one of span, span-features, v2drop, visionzip, .*grid, or turns=",
    ):
        apply_sparsevlm(model, selector=selector, **OPTIONS)
    state = apply_sparsevlm(model, **{**OPTIONS, "turns": "first"})
    with pytest.raises(ValueError, match="read nothing"), state.options(turns="agnostic", selector=selector):
        pass


def test_selectors_of_users_are_judged_by_what_they_need(model):
    class Mine:
        needs = frozenset({"text_features"})

        def select(self, context, n_keep):
            return torch.arange(n_keep)

    with pytest.raises(ValueError, match="'Mine' reads text_features"):
        apply_sparsevlm(model, selector=Mine(), **OPTIONS)
    Mine.needs = frozenset({"features"})
    apply_sparsevlm(model, selector=Mine(), **OPTIONS)


def test_the_rank_reads_the_question(model):
    with pytest.raises(ValueError, match="rank of the question's attention decides how much that is: set keep"):
        apply_sparsevlm(model, selector="span", turns="agnostic")
    apply_sparsevlm(model, turns="agnostic")


def test_layers_that_see_the_whole_prompt():
    """Of such a decoder only what comes before it; towers that are not read are not offered."""
    offered = r"states of decoder layers, .* Choose one of span-features, visionzip, hiprune, divprune, scope, tome, or"
    with pytest.raises(ValueError, match=offered):
        apply_sparsevlm(tiny_model("paligemma"), target_layers=[1, 3], **OPTIONS)
    with pytest.raises(ValueError, match="Choose one of span, span-features, v2drop, divprune, tome, random, grid, or"):
        apply_sparsevlm(tiny_model("llava_next"), selector="fastv", **OPTIONS)
    apply_sparsevlm(tiny_model("paligemma"), selector="divprune", **OPTIONS)
