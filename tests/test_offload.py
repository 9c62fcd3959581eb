"""Models whose weights are on the disk, or on the host, until they are needed: pruned by hooks, as in memory."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from toys import PROMPTS, make_inputs, tiny_model

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


def pruned(model):
    state = apply_sparsevlm(model, **OPTIONS)
    answer = model.generate(**make_inputs(*PROMPTS["one image"]), **GREEDY)
    state.detach()
    return answer


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
