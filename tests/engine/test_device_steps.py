"""Prune steps on the device against the one that the hooks take."""

from __future__ import annotations

import pytest
import torch
from test_parity import run

from made_requests import make_request, make_sample
from sparsevlm import apply_sparsevlm
from sparsevlm.engine.text import prefill
from sparsevlm.engine.text.stages import chooses_on_device, record
from sparsevlm.selection.context import SelectorTraits
from sparsevlm.selection.selectors import SELECTORS
from toys import PROMPTS, make_inputs, relative_error, tiny_model

TRAITS = {name: SelectorTraits.of(make()) for name, make in SELECTORS.items()}
PADDED = [name for name, traits in TRAITS.items() if traits.padded and traits.placement == "target_layers"]
BEFORE = [
    name
    for name, traits in TRAITS.items()
    if traits.placement == "before_decoder" and (traits.padded or traits.ordered)
]
WITH_BUDGET = [name for name in BEFORE if not TRAITS[name].adaptive]  # those that choose nothing without one
ORDERED = [name for name, traits in TRAITS.items() if traits.ordered]
OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 0.9},
        {"keep": 1.0},
        {"keep": [0.5, 0.9, 1.0]},
        {"min_keep": 18},
        {"keep": 0.35},
        {"min_keep_per_image": 9},
        {"min_keep_per_image": 0},
        {"schedule": "geometric"},
        *({"selector": selector, "keep": 0.5} for selector in PADDED),
        *({"selector": selector, "keep": None} for selector in ("span", *PADDED)),
        *({"selector": selector, "keep": keep} for selector in BEFORE for keep in (0.5, 0.2)),
        {"selector": "span-features", "keep": None},
        {"selector": "span-features", "keep": None, "min_keep": 9},
        {"selector": "span-features", "keep": None, "min_keep": 18, "min_keep_per_image": 0},
        {"selector": "span-features", "keep": None, "min_keep_per_image": 12},
        {"selector": "sparsevlm", "keep": None, "heads": "visual", "raters": "all", "merge": "sum"},
        {"selector": "sparsevlm", "keep": 0.5, "raters": "embedding", "tau": 1.0, "theta": 0.1},
        {"selector": "sparsevlm", "keep": None, "tau": 1.0, "theta": 1.0},
        {"selector": "sparsevlm", "keep": None, "min_keep": 10, "rank_lambda": 0.9},
        {"selector": "span-joint", "keep": 0.5, "recycle": False},
        {"selector": "random", "keep": 0.5, "seed": 7},
        {"keep": None, "rank_lambda": 1.0, "min_keep": 8, "rank_tolerance": 0.001},
        {"keep": None, "rank_lambda": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_steps_on_the_device_do_what_the_prune_step_does(prompt, options, monkeypatch):
    if isinstance(options.get("keep"), list):
        options = {"keep": (options["keep"] * 2)[: len(PROMPTS[prompt])]}
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    records = []
    monkeypatch.setattr(prefill, "record", lambda *given: records.append(given) or record(*given))
    before = {"target_layers": None} if options.get("selector") in BEFORE else {}
    state = apply_sparsevlm(model, **{**OPTIONS, **options, **before}, engine=True)
    said, found = run(model, inputs, 4)
    report = state.report
    n_steps = len(records)
    monkeypatch.setattr(prefill, "chooses_on_device", lambda request, adapter: False)
    _, wanted = run(model, inputs, 4, said)
    assert state.report.path == report.path == "engine"
    has_floors = any(len(sample.images) > 1 for sample in report.samples)
    assert n_steps == (0 if has_floors and options.get("selector", "span") not in ORDERED else 1)
    assert state.report.samples == report.samples
    assert state.report.kv_bytes == report.kv_bytes
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("selector", BEFORE)
def test_recorded_steps_choose_as_the_prune_step(selector, monkeypatch):
    """On a GPU, where programs are replayed: what differs is nearly tied."""
    model = tiny_model().to("cuda", torch.bfloat16)
    state = apply_sparsevlm(model, keep=0.5, min_keep=3, min_keep_per_image=0, selector=selector, engine=True)
    n_kept = n_alike = 0
    for prompt in PROMPTS:
        inputs = {name: value.to("cuda") for name, value in make_inputs(*PROMPTS[prompt]).items()}
        kept = []
        for on_device in (True, True, False):
            with monkeypatch.context() as patch:
                if not on_device:
                    patch.setattr(prefill, "chooses_on_device", lambda request, adapter: False)
                model.generate(**inputs, max_new_tokens=1)
            assert state.report.path == "engine"
            stages = [sample.stages[0] for sample in state.report.samples if sample.n_visual]
            kept.append([{*stage.kept, *stage.recycled} for stage in stages])
        assert kept[0] == kept[1]
        assert [len(one) for one in kept[0]] == [len(one) for one in kept[2]]
        n_kept += sum(map(len, kept[0]))
        n_alike += sum(len(one & other) for one, other in zip(kept[0], kept[2], strict=True))
    assert n_alike >= 0.95 * n_kept


class Ordered:
    """A selector of the user's that the engine can capture: by the length of the states, shortest or longest first."""

    default_schedule = "single"

    def __init__(self, sign):
        self.sign, self.n_calls = sign, 0

    def order(self, states, valid, n_keep):
        self.n_calls += 1
        length = (self.sign * states.float().norm(dim=-1)).masked_fill(~valid, -torch.inf)
        return length.argsort(dim=-1, descending=True, stable=True)[:, :n_keep]

    def select(self, context, n_keep):
        valid = torch.ones((1, context.n_visual), dtype=torch.bool)
        return self.order(context.hidden_states[None], valid, n_keep)[0].sort().values


class Anew(Ordered):
    """Defines ``select`` anew, so that ``order`` no longer says what it chooses."""

    def select(self, context, n_keep):
        return torch.arange(n_keep)


@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
def test_a_selector_of_the_users_may_be_captured(prompt):
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[1])
    greedy = {"max_new_tokens": 3, "do_sample": False}
    for kind, sign in ((Ordered, 1), (Ordered, -1), (Anew, 1)):  # objects that differ in what they hold
        selector = kind(sign)
        with state.options(selector=selector):
            wanted, report = model.generate(**inputs, **greedy), state.report
        n_samples = sum(sample.n_visual > 0 for sample in report.samples)
        assert selector.n_calls == (0 if kind is Anew else n_samples)
        with state.options(selector=selector, engine=True):
            for _ in range(4):
                assert torch.equal(model.generate(**inputs, **greedy), wanted)
                assert state.report.samples == report.samples
                assert state.report.path == "engine"
        assert selector.n_calls == (0 if kind is Anew else n_samples + 4)  # all samples at once


@pytest.mark.parametrize("selector", [name for name in BEFORE if "text_features" in TRAITS[name].needs])
def test_text_that_is_no_number_is_found_before_the_decoder(selector):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, keep=0.5, min_keep=3, selector=selector, engine=True)
    model.generate(**inputs, max_new_tokens=1)
    assert state.report.path == "engine"
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[inputs["input_ids"][0, 0]] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize(
    ("selector", "keep"),
    [*((name, 0.75) for name in SELECTORS), *((name, None) for name in SELECTORS if name not in WITH_BUDGET)],
)
def test_pictures_that_are_no_numbers_are_told_of_in_one_way_on_both_paths(selector, keep):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    inputs["pixel_values"][0] = torch.nan
    state = apply_sparsevlm(model, keep=keep, min_keep=3, selector=selector)
    message = "visual tokens, or what they are judged by, hold NaN or infinity; check the model's inputs and dtype"
    for engine in (False, True):
        with state.options(engine=engine), pytest.raises(ValueError, match=f"^{message}"):
            model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize(("selector", "most"), [("divprune", 1 << 14), ("tome", 1 << 14), ("mmtok", 1 << 13)])
def test_very_many_tokens_are_chosen_from_by_the_prune_step(selector, most):
    for n_visual in (most, most + 1):
        sample = make_sample(range(n_visual), [n_visual, n_visual + 1], counts=(n_visual // 4,))
        request = make_request(sample, target_layers=(-1,), selector=SELECTORS[selector]())
        assert chooses_on_device(request, None) is (n_visual == most)
