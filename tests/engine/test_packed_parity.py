"""The packed decoder against the plain path: same tokens kept, same logits, same answers."""

from __future__ import annotations

import contextlib
import copy

import torch

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from sparsevlm.engine.fused_weights import FusedWeights
from sparsevlm.engine.text.decode_graph import begin_decode, decode_step
from sparsevlm.engine.text.prefill import pack, prefill
from sparsevlm.request.reporting import make_report
from toys import ON_ENGINE, PROMPTS, make_inputs, relative_error, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
SELECTORS = {
    "span": {},
    "random": {"selector": "random"},
    "divprune before the decoder": {"selector": "divprune", "target_layers": None},
    "v2drop": {"selector": "v2drop"},
    "tome": {"selector": "tome", "target_layers": None},
    "nothing dropped": {"keep": 1.0},
}
NEW_TOKENS = 5


@contextlib.contextmanager
def captured(model, state):
    """What the decoder is given in the first pass, and the request as it is then."""
    seen = {}

    def hook(module, args, kwargs):
        if not seen:
            seen.update(embeds=kwargs["inputs_embeds"], positions=kwargs["position_ids"][-3:])
            seen["request"] = copy.deepcopy(state._hooks._forward.request)
            seen["request"].features = kwargs["inputs_embeds"]

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@parametrize_pairs(prompt=list(PROMPTS), name=list(SELECTORS), family=ON_ENGINE)
def test_the_engine_says_what_the_plain_path_says(prompt, name, family):
    model, inputs = tiny_model(family), make_inputs(*PROMPTS[prompt])
    if family == "qwen2_vl":
        inputs.pop("second_per_grid_ts", None)  # it does not take that
    state = apply_sparsevlm(model, **{**OPTIONS, **SELECTORS[name]})
    options = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}
    with captured(model, state) as seen:
        wanted = model.generate(**inputs, **options)
    report = state.report
    with torch.no_grad():
        request = seen["request"]
        weights = FusedWeights(state.adapter)
        packed = pack(state.adapter, request, seen["embeds"], seen["positions"])
        hidden, caches = prefill(state.adapter, weights, request, packed)
        logits = [model.lm_head(hidden)]
        first = seen["positions"].amax(dim=(0, 2)).expand(3, -1) + 1
        decoding = begin_decode(caches, first.shape[1], NEW_TOKENS - 1)
        weights.fuse_decoder()  # nothing changes by that
        for _ in range(NEW_TOKENS - 1):
            logits.append(decode_step(state.adapter, weights, decoding, logits[-1].argmax(dim=-1), first))
    found = make_report(state.adapter, request)
    assert found.samples == report.samples
    new = wanted.sequences[:, inputs["input_ids"].shape[1] :]
    for step, one in enumerate(logits):
        assert relative_error(one, wanted.logits[step]) < 5e-6
        assert torch.equal(one.argmax(dim=-1), new[:, step])
