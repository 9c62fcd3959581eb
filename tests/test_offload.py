"""Models whose weights are on the disk, or on the host, until they are needed: pruned by hooks, as in memory."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from toys import PROMPTS, family_of, make_inputs, relative_error, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
PARTS = ("model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head")
LAYERS = tuple(f"model.language_model.layers.{i}" for i in range(6))
PLACES = {
    "some layers": LAYERS[2:],
    "the embeddings": PARTS[1:2],
    "the vision tower": PARTS[:1],
    "all": (*PARTS, *LAYERS),
}


BATCH = PROMPTS["batch, unequal counts"]
CUT = 3  # the first layer on the second device: a target layer, whose input comes from the first
SELECTED = {
    "states": {**OPTIONS, "selector": "span"},
    "states before and after": {**OPTIONS, "selector": "v2drop"},
    "attention of the text": {**OPTIONS, "selector": "sparsevlm"},
    "attention of the last token": {**OPTIONS, "selector": "fastv"},
    "attention in the tower": {"keep": 0.5, "min_keep": 3, "selector": "visionzip"},
    "rank of the attention": {**OPTIONS, "keep": None, "rank_tolerance": 0.3},
}


def pruned(model):
    return answer(model, OPTIONS, make_inputs(*PROMPTS["one image"]))[0].sequences


def answer(model, options, inputs):
    """What ``generate`` returns, and what was kept."""
    with apply_sparsevlm(model, **options) as state:
        output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        samples = state.report.samples
    assert any(sample.final_tokens < sample.n_visual for sample in samples)
    return output, samples


def check(model, wanted):
    """All ways of asking a model with weights that are not there."""
    assert any(weight.is_meta for weight in model.parameters())
    inputs = make_inputs(*PROMPTS["one image"])
    for engine in (None, False, True):
        state = apply_sparsevlm(model, **OPTIONS, engine=engine)
        model.model.rope_deltas = None
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        assert state.report.path == "plain"
    if model.get_input_embeddings().weight.is_meta:
        assert "offloaded weights" in state.report.path_reason
    kept = state.report.samples[0].stages
    with torch.no_grad():
        model.model.rope_deltas = None
        model(**inputs)
        assert state.report.samples[0].stages == kept
        model.model.rope_deltas = None
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "mm_token_type_ids")}
        model(inputs_embeds=embeds, **rest)
        assert state.report.final_tokens < state.report.n_visual
    state.detach()


def test_embeddings_that_are_fetched_when_they_are_needed():
    """As accelerate does: the parameter is on the meta device, the module's ``forward`` is another."""
    model = tiny_model()
    wanted = pruned(model)
    embedding = model.get_input_embeddings()
    weight = embedding.weight.data
    embedding.weight = torch.nn.Parameter(weight.to("meta"))
    embedding.forward = lambda ids: torch.nn.functional.embedding(ids, weight)
    check(model, wanted)


@pytest.mark.parametrize("what", PLACES)
def test_disk(what, tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_model()
    wanted = pruned(model)
    model.save_pretrained(tmp_path / "model")
    places = {part: "disk" if part in PLACES[what] else "cpu" for part in (*PARTS, *LAYERS)}
    places["model.language_model.rotary_emb"] = "cpu"
    offloaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    offloaded.generation_config = model.generation_config
    check(offloaded.eval(), wanted)


@pytest.mark.parametrize("name", ["cpu_offload", "disk_offload"])
def test_all_of_a_model(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    wanted = pruned(model)
    more = (tmp_path,) if name == "disk_offload" else ()
    getattr(accelerate, name)(model, *more, execution_device=torch.device("cpu"))
    check(model, wanted)


def places_of(model, first, second):
    """Device map that cuts the decoder at a target layer; all that is not in its second half is on the first place."""
    places, path = {}, f"{family_of(model).decoder}.layers"
    for name, _ in model.named_modules():
        parent, _, own = name.rpartition(".")
        if name and (path == parent or path.startswith(parent)) and not path.startswith(name):
            places[name] = second if parent == path and int(own) >= CUT else first
    return places


@pytest.mark.parametrize("case", SELECTED)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_half_of_a_decoder_is_dispatched_to_the_disk(family, case, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    inputs = make_inputs(*BATCH, family=family)
    wanted, samples = answer(tiny_model(family), SELECTED[case], inputs)
    model = tiny_model(family)
    accelerate.dispatch_model(model, places_of(model, "cpu", "disk"), main_device="cpu", offload_dir=tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    output, found = answer(model, SELECTED[case], inputs)
    assert found == samples
    assert torch.equal(torch.stack(output.logits), torch.stack(wanted.logits))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SELECTED)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_5"])
def test_a_decoder_on_two_gpus(family, case):
    accelerate = pytest.importorskip("accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = {name: value.to("cuda:0") for name, value in make_inputs(*BATCH, family=family).items()}
    options = {**SELECTED[case], "engine": False}
    wanted, samples = answer(tiny_model(family).to("cuda:0"), options, inputs)
    model = tiny_model(family)
    accelerate.dispatch_model(model, places_of(model, 0, 1))
    assert {weight.device.index for weight in model.parameters()} == {0, 1}
    output, found = answer(model, options, inputs)
    assert found == samples
    assert relative_error(torch.stack(output.logits), torch.stack(wanted.logits)) <= 1e-5
    state = apply_sparsevlm(model, **SELECTED[case])
    model.generate(**inputs, **GREEDY)
    assert (state.report.path, state.report.samples) == ("plain", samples)
    assert min(state.report.wall_ms[phase] for phase in ("prefill", "decode")) > 0  # begun on one, ended on the other
