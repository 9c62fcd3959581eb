"""Decode steps that read float8 copies of the decoder's weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.kernels.skinny_linear import FLOAT8, round_to_float8
from toys import PROMPTS, family_of, make_inputs, of_each_decoder, relative_error
from toys import tiny_model as model_without_biases

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6, "engine": True}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
PICTURE, BATCH = PROMPTS["one image"], PROMPTS["batch, left padding"]


def tiny_model(family="qwen2_5_vl"):
    model = model_without_biases(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in family_of(model).decoder_of(model).named_parameters():
            if name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


class Scores(LogitsProcessor):
    """Notes the scores of every step, does something behind the prompt, and may say the same whatever they are."""

    def __init__(self, behind_prompt=lambda: None, says=None):
        self.seen, self._behind_prompt, self._says = [], behind_prompt, says

    def __call__(self, input_ids, scores):
        if not self.seen:
            self._behind_prompt()
        self.seen.append(scores.clone())
        if self._says is None:
            return scores
        said = torch.full_like(scores, -torch.inf)
        said[:, self._says + len(self.seen)] = 0.0
        return said


def run(model, inputs, **options):
    scores = Scores(**options)
    answer = model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([scores]))
    return answer, scores.seen


def linears(model):
    decoder = [module for module in family_of(model).decoder_of(model).layers.modules() if type(module) is nn.Linear]
    return [*decoder, model.lm_head]


@torch.no_grad()
def round_in_place(model):
    """Put in the place of every weight what its float8 copy stands for; embeddings stay, tied to the head or not."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    for module in linears(model):
        weight = module.weight
        rounded, scale = torch.empty(weight.shape, dtype=FLOAT8), torch.empty(weight.shape[0])
        round_to_float8(weight, rounded, scale)
        weight.copy_(rounded.float() * scale[:, None])


def copies_of(state):
    return state._engine._made.weights._float8


@pytest.mark.parametrize("family", of_each_decoder())
@pytest.mark.parametrize("prompt", [PICTURE, BATCH], ids=["one", "batch"])
def test_steps_are_those_of_a_model_whose_weights_were_rounded(prompt, family):
    """The prompt reads the model's own, and so does the rounded one, which is rounded once its prompt has run."""
    inputs, model, other = make_inputs(*prompt, family=family), tiny_model(family), tiny_model(family)
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    answer, found = run(model, inputs)
    assert state.report.path == "engine"
    assert "float8 copies" in state.report.path_reason
    apply_sparsevlm(other, **OPTIONS)
    wanted_answer, wanted = run(other, inputs, behind_prompt=lambda: round_in_place(other))
    assert torch.equal(answer, wanted_answer)
    for one, rounded in zip(found, wanted, strict=True):
        assert relative_error(one, rounded) < 1e-5
    with state.options(weights="model"):
        _, exact = run(model, inputs)
    assert "float8" not in state.report.path_reason
    assert torch.equal(found[0], exact[0])
    assert relative_error(found[1], exact[1]) > 1e-3


def test_options_of_one_request():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    state = apply_sparsevlm(model, **OPTIONS)
    own, _ = run(model, inputs)
    assert copies_of(state) is None
    with state.options(weights="fp8"):
        _, rounded = run(model, inputs)
        assert "float8 copies" in state.report.path_reason
        copies = copies_of(state)
        with state.options(weights=None):
            assert torch.equal(run(model, inputs)[0], own)
        _, again = run(model, inputs)
    assert copies_of(state) is copies
    assert all(map(torch.equal, rounded, again))
    assert torch.equal(run(model, inputs)[0], own)


def test_removal_frees_the_copies_and_leaves_the_weights_alone():
    model, inputs = tiny_model(), make_inputs(*PICTURE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**inputs).logits
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    run(model, inputs)
    copies = weakref.ref(copies_of(state))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    remove_sparsevlm(model)
    gc.collect()
    assert copies() is None
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def change(model, how):
    """Halve the weights of the second layer's MLP and the biases of its queries."""
    layer = model.model.language_model.layers[1]
    for weight in (layer.mlp.down_proj.weight, layer.mlp.gate_proj.weight, layer.self_attn.q_proj.bias):
        if how == "in place":
            with torch.no_grad():
                weight.mul_(0.5)
        elif how == "by data":
            weight.data.mul_(0.5)
        else:
            weight.data = weight.data * 0.5


@pytest.mark.parametrize("how", ["in place", "other tensors", "by data"])
def test_weights_that_change(how):
    model, other, inputs = tiny_model(), tiny_model(), make_inputs(*PICTURE)
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    run(model, inputs)
    change(model, how)
    if how == "by data":  # which torch does not tell
        state.detach()
        state.attach()
    change(other, how)
    apply_sparsevlm(other, **OPTIONS, weights="fp8")
    for one, wanted in zip(run(model, inputs)[1], run(other, inputs)[1], strict=True):
        assert torch.equal(one, wanted)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    for _ in range(2):
        run(model, make_inputs(*PICTURE))
        assert "float8 copies" in state.report.path_reason


@pytest.mark.parametrize("n_samples", [16, 17])
def test_large_batches_read_the_weights_of_the_model(n_samples):
    model, inputs = tiny_model(), make_inputs(*PICTURE * n_samples)
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    answer, _ = run(model, inputs)
    reason = state.report.path_reason
    assert ("by float8 copies" in reason, "16 samples at most" in reason) == (n_samples == 16, n_samples == 17)
    if n_samples == 17:
        with state.options(weights="model"):
            assert torch.equal(run(model, inputs)[0], answer)


def test_a_head_of_another_kind_is_called():
    class Twice(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight, self.calls = head, head.weight, 0

        def forward(self, hidden):
            self.calls += 1
            return 2 * self.head(hidden)

    model, inputs = tiny_model(), make_inputs(*PICTURE)
    model.lm_head = Twice(model.lm_head)
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    run(model, inputs)
    assert (state.report.path, model.lm_head.calls) == ("engine", GREEDY["max_new_tokens"])


def test_calls_on_hooks_read_the_weights_of_the_model():
    model, inputs = tiny_model(), make_inputs(*PICTURE)
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    found = model.generate(**inputs, **GREEDY, num_beams=2)
    assert "weights='fp8' is the engine's" in state.report.path_reason
    with state.options(engine=False, weights="model"):
        assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=2), found)
    assert "fp8" not in state.report.path_reason


def test_where_it_cannot_work():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"weights='fp8' is read by the engine, .* is on cpu: move it"):
        apply_sparsevlm(model, weights="fp8")
    with pytest.raises(ValueError, match=r"engine=False switches it off"):
        apply_sparsevlm(model, weights="fp8", engine=False)
    state = apply_sparsevlm(model, **OPTIONS, weights="fp8")
    with pytest.raises(ValueError, match=r"weights='model'"), state.options(engine=False):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prompt", [PICTURE, BATCH], ids=["one", "batch"])
def test_on_a_gpu(prompt, dtype):
    """Steps by graphs and kernels are those of the reference on a CPU in float32."""
    inputs, model, other = make_inputs(*prompt), tiny_model().to("cuda", dtype), tiny_model()
    other.load_state_dict({name: weight.float().cpu() for name, weight in model.state_dict().items()})
    options = {**OPTIONS, "keep": 1.0, "weights": "fp8"}
    state = apply_sparsevlm(model, **options)
    apply_sparsevlm(other, **options)
    _, wanted = run(other, inputs, says=5)
    for _ in range(3):
        _, found = run(model, {name: value.to("cuda") for name, value in inputs.items()}, says=5)
        assert "float8 copies" in state.report.path_reason
        for one, exact in zip(found, wanted, strict=True):
            assert relative_error(one.float().cpu(), exact) < (6e-2 if dtype == torch.bfloat16 else 1e-2)
