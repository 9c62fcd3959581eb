"""The program of a bucket against the packed decoder with exact shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from test_packed_parity import captured

from sparsevlm import apply_sparsevlm
from sparsevlm.engine.call import Prompt
from sparsevlm.engine.fused_weights import FusedWeights
from sparsevlm.engine.text import bucketed_prefill
from sparsevlm.engine.text.prefill import pack, prefill
from sparsevlm.request.reporting import make_report
from toys import PROMPTS, make_inputs, relative_error, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}


def both(prompt, **options):
    model, inputs = tiny_model(), make_inputs(*prompt)
    state = apply_sparsevlm(model, **{**OPTIONS, **options})
    with captured(model, state) as seen, torch.no_grad():
        model(**inputs)
    twin = copy.deepcopy(seen["request"])
    kinds = {kind for kind in ("image", "video") if f"{kind}_grid_thw" in inputs}
    prompt = Prompt.of(state.adapter, inputs["input_ids"], seen["positions"], kinds)
    weights = FusedWeights(state.adapter)
    with torch.no_grad():
        packed = pack(state.adapter, seen["request"], seen["embeds"], seen["positions"])
        hidden, caches = prefill(state.adapter, weights, seen["request"], packed)
        bucket, counts = bucketed_prefill.plan(twin)
        features = seen["embeds"].new_zeros((bucket.n_features, seen["embeds"].shape[-1]))
        visual = prompt.feature_rows >= 0
        features[prompt.feature_rows[visual]] = seen["embeds"][visual]
        integers = bucketed_prefill.make_integers(twin, prompt, bucket, counts)
        given = bucketed_prefill.Inputs.of(bucket, integers, features)
        found = bucketed_prefill.run(state.adapter, weights, bucket, twin.selector, given)
        exact = model.lm_head(hidden), caches
    bucketed_prefill.record(twin, bucket, counts, found.kept, state.adapter.n_layers)
    reports = [make_report(state.adapter, request) for request in (seen["request"], twin)]
    return exact, found, reports


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 0.9},
        {"keep": 1.0},
        {"keep": [0.5, 0.9, 1.0][:1]},
        {"min_keep": 18},
        {"keep": 0.35},
        {"min_keep_per_image": 9},
    ],
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_program_does_what_exact_shapes_do(prompt, options):
    if isinstance(options.get("keep"), list):
        options = {"keep": ([0.5, 0.9, 1.0] * 2)[: len(PROMPTS[prompt])]}
    (logits, caches), found, (wanted, report) = both(PROMPTS[prompt], **options)
    assert report.samples == wanted.samples
    assert relative_error(found.logits, logits) < 5e-6
    for mine, exact in zip(found.caches, caches, strict=True):
        n_rows = exact.keys.shape[0]
        assert mine.cu_seqlens.tolist() == exact.cu_seqlens.tolist()
        torch.testing.assert_close(mine.keys[:n_rows], exact.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values[:n_rows], exact.values, rtol=1e-4, atol=1e-5)


def test_requests_of_like_size_share_a_bucket():
    plans = []
    for n_text, height in ((7, 6), (8, 6), (7, 6), (60, 6), (7, 12)):
        model, inputs = tiny_model(), make_inputs([("text", 3), ("image", 6, height), ("text", n_text)])
        state = apply_sparsevlm(model, **OPTIONS)
        with captured(model, state) as seen, torch.no_grad():
            model(**inputs)
        plans.append(bucketed_prefill.plan(seen["request"])[0])
    assert plans[0] == plans[1] == plans[2]
    assert len(set(plans)) == 3


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
