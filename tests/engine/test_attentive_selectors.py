"""Selectors that read attention in the decoder: given the same, and choosing the same, on both paths."""

from __future__ import annotations

import pytest
import torch

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from sparsevlm.engine.text import embed
from sparsevlm.selection.raters import padded_embedding_raters
from toys import PROMPTS, make_inputs, of_each_decoder, relative_error, runs_on_engine, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BATCH = PROMPTS["batch, left padding"]


class Reads:
    """Needs all that a decoder layer has, and keeps what differs most by it."""

    needs = frozenset({"rater_attention", "last_attention", "previous_hidden_states", "features", "text_features"})

    def select(self, context, n_keep):
        change = (context.hidden_states - context.previous_hidden_states).norm(dim=-1)
        likeness = (context.features @ context.text_features.T).softmax(dim=-1).amax(dim=-1)
        score = context.rater_attention.mean(dim=0) * change + context.last_attention * likeness
        return score.argsort(descending=True)[:n_keep].sort().values


class Looks:
    """Keeps the first rows, and remembers where all of them are."""

    def __init__(self):
        self.seen = []

    def select(self, context, n_keep):
        self.seen.append((context.coordinates, context.indices))
        return torch.arange(n_keep, device=context.hidden_states.device)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_coordinates_are_the_same_on_both_paths(prompt):
    model, inputs, seen = tiny_model(), make_inputs(*PROMPTS[prompt]), []
    state = apply_sparsevlm(model, **OPTIONS)
    for engine in (False, True):
        with state.options(engine=engine, selector=Looks()):
            model.generate(**inputs, **GREEDY)
            assert state.report.path == ("engine" if engine else "plain")
            seen.append(state._session.options.selector.seen)
    assert len(seen[0]) == len(seen[1]) > 1
    for plain, packed in zip(*seen, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, packed, strict=True))
    time, height, width = seen[0][0][0]
    assert len(set(zip(time.tolist(), height.tolist(), width.tolist(), strict=True))) == len(time)


ATTENTIVE = {
    "sparsevlm": {"selector": "sparsevlm"},
    "raters by embedding": {"selector": "sparsevlm-paper"},
    "visual heads": {"selector": "sparsevlm-v2"},
    "all raters, sums": {"selector": "sparsevlm", "raters": "all", "merge": "sum", "tau": 0.8, "theta": 0.5},
    "the rank decides": {"selector": "sparsevlm", "keep": None, "tau": 0.8, "theta": 0.5, "rank_tolerance": 0.02},
    "the rank decides for span": {"selector": "span", "keep": None, "rank_tolerance": 0.02},
    "the rank decides for random": {"selector": "random", "keep": None, "rank_tolerance": 0.3, "raters": "embedding"},
    "fastv": {"selector": "fastv"},
    "pyramiddrop": {"selector": "pyramiddrop"},
    "span-joint": {"selector": "span-joint"},
    "priortr": {"selector": "priortr"},
    "span-prior": {"selector": "span-prior"},
    "an object": {"selector": Reads()},
    "some targets keep all": {"selector": "sparsevlm", "schedule": [99, 7]},
}


@parametrize_pairs(possible=runs_on_engine, prompt=list(PROMPTS), case=list(ATTENTIVE), family=of_each_decoder())
def test_selectors_that_read_attention_choose_the_same(prompt, case, family):
    model, inputs = tiny_model(family), make_inputs(*PROMPTS[prompt], family=family)
    options = {**OPTIONS, **ATTENTIVE[case]}
    if "schedule" in options:
        del options["keep"]
    state = apply_sparsevlm(model, **options)
    wanted, report = model.generate(**inputs, **GREEDY), state.report
    assert report.path == "plain"
    assert any(stage.n_kept < stage.n_in for sample in report.samples for stage in sample.stages)
    with state.options(engine=True):
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        found = state.report
    assert found.path == "engine"
    assert found.samples == report.samples
    assert (found.flops, found.decode_steps) == (report.flops, report.decode_steps)


class Spy:
    """Keeps what is first, whatever it is given, and remembers it."""

    needs = Reads.needs | {"prior_attention", "vision_attention", "vision_keys"}

    def __init__(self):
        self.seen = []

    def select(self, context, n_keep):
        self.seen.append(context)
        return torch.arange(n_keep, device=context.indices.device)


@pytest.mark.parametrize("heads", ["all", "visual"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        pytest.param("cpu", torch.float32, 1e-5, id="cpu"),
        pytest.param("cuda", torch.float16, 2e-2, id="fp16", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 1e-1, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_selectors_are_given_the_same(device, dtype, tolerance, prompt, heads):
    model = tiny_model().to(device, dtype)
    inputs = {name: value.to(device) for name, value in make_inputs(*PROMPTS[prompt]).items()}
    given = []
    for engine in (False, True):
        spy = Spy()
        state = apply_sparsevlm(model, **OPTIONS, selector=spy, raters="all", heads=heads, engine=engine)
        model.generate(**inputs, max_new_tokens=1)
        assert state.report.path == ("engine" if engine else "plain")
        given.append(spy.seen)
    places = [(context.layer, context.sample) for context in given[0]]
    assert places == [(context.layer, context.sample) for context in given[1]]
    first = [context for context in given[0] if context.layer == 0]  # later ones rest on more rounding
    for wanted, found in zip(given[0] if device == "cpu" else first, given[1], strict=device == "cpu"):
        assert torch.equal(found.indices, wanted.indices)
        for need in Spy.needs:
            one, other = getattr(found, need), getattr(wanted, need)
            assert one.dtype == other.dtype
            assert relative_error(one, other) < tolerance, need


def test_the_cases_say_something():
    """Ranks, raters, recycled tokens and heads differ where they should."""
    model, inputs = tiny_model(), make_inputs(*BATCH)
    stages = {}
    for case in ("sparsevlm", "raters by embedding", "visual heads", "all raters, sums", "the rank decides"):
        state = apply_sparsevlm(model, **{**OPTIONS, **ATTENTIVE[case]}, engine=True)
        model.generate(**inputs, **GREEDY)
        assert state.report.path == "engine"
        stages[case] = state.report.samples[0].stages
    raters = [stages[case][0].raters for case in ("sparsevlm", "raters by embedding", "all raters, sums")]
    assert len(set(raters)) == 3
    assert all(stage.rank for stage in stages["the rank decides"])
    assert any(stage.recycled for stage in stages["all raters, sums"])
    assert stages["visual heads"][0].kept != stages["sparsevlm"][0].kept


@pytest.mark.parametrize("case", ["raters by embedding", "the rank decides", "an object"])
def test_attention_is_read_where_the_tower_leaves_out_tokens(case, monkeypatch):
    """What is left is all there is: as if the picture had no other tokens."""
    asked = []

    def spy(visual, valid, text, is_text):
        asked.append(int(valid.sum()))
        return padded_embedding_raters(visual, valid, text, is_text)

    monkeypatch.setattr(embed, "padded_embedding_raters", spy)
    model, inputs = tiny_model(), make_inputs([("text", 3), ("image", 8, 8), ("text", 9)])
    state = apply_sparsevlm(model, **{**OPTIONS, "keep": 0.35, **ATTENTIVE[case]}, vision_keep=0.5, engine=True)
    model.generate(**inputs, **GREEDY)
    (sample,) = state.report.samples
    assert (state.report.path, sample.layer_tokens[0]) == ("engine", 32)
    first, second, third = sample.stages
    gone_on = {*second.kept, *second.recycled}
    assert set(first.kept) >= gone_on >= {*third.kept, *third.recycled}
    assert len(third.kept) < len(gone_on) < 32
    assert asked == [32] * (case == "raters by embedding")
