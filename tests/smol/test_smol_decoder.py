"""A GGUF file gives the Llama that it was made from, and that Llama within a Qwen2.5-VL writes the same text."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.smol.decoder import read_decoder
from sparsevlm.smol.model import VISION_TOKENS, build_model, bundled_tower, make_tokenizer
from tiny_gguf import CONFIG, make_llama, write_gguf

pytest.importorskip("gguf")

IDS = torch.randint(3, CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama():
    return make_llama()


@pytest.fixture(scope="module")
def decoder(llama, tmp_path_factory):
    return read_decoder(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama))


@pytest.fixture(scope="module")
def model(decoder):
    return build_model(decoder, bundled_tower() | {"depth": 1, "fullatt_block_indexes": [0]})


def test_weights_and_sizes_are_those_of_the_llama(llama, decoder):
    assert set(decoder.weights) == set(llama.model.state_dict())
    for name, weight in llama.model.state_dict().items():
        assert torch.equal(decoder.weights[name], weight), name
    theirs, ours = CONFIG.to_dict(), decoder.config.to_dict()
    same = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert ours["rope_parameters"]["rope_theta"] == 1e5
    assert ours["rms_norm_eps"] == pytest.approx(1e-6)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantised_weights_are_those_of_gguf(kind, llama, tmp_path):
    import gguf

    weights = read_decoder(write_gguf(tmp_path / "tiny.gguf", llama, kind)).weights
    name = "layers.1.mlp.down_proj.weight"
    of_gguf = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(llama.model.get_parameter(name).detach().numpy(), of_gguf), of_gguf)
    assert torch.equal(weights[name], torch.from_numpy(expected))


@torch.no_grad()
def test_text_is_that_of_the_llama(llama, model):
    """Positions of text are the same on the three axes of M-RoPE, given or not."""
    expected = llama(input_ids=IDS).logits
    positions = torch.arange(IDS.shape[1]).expand(3, *IDS.shape)
    for given in ({}, {"position_ids": positions}, {"position_ids": torch.cat([positions[:1], positions])}):
        ours = model(input_ids=IDS, **given).logits[..., : CONFIG.vocab_size]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    turned = positions.clone()
    turned[2] += torch.arange(IDS.shape[1])
    other = model(input_ids=IDS, position_ids=turned).logits[..., : CONFIG.vocab_size]
    assert not torch.allclose(other, expected, atol=1e-3), "the third axis turns channels, too"


def test_new_rows_are_the_mean_and_biases_are_zero(decoder, model):
    text = model.model.language_model
    rows = text.embed_tokens.weight[CONFIG.vocab_size :]
    assert rows.shape[0] >= len(VISION_TOKENS)
    torch.testing.assert_close(rows, decoder.weights["embed_tokens.weight"].mean(0).expand_as(rows))
    assert model.lm_head.weight is text.embed_tokens.weight
    biases = [weight for name, weight in text.named_parameters() if name.endswith("bias")]
    assert len(biases) == 3 * CONFIG.num_hidden_layers
    assert not any(bias.any() for bias in biases)


def test_tokenizer_splits_digits_and_knows_the_tokens_of_images(decoder, model):
    tokenizer = make_tokenizer(decoder)
    assert tokenizer.tokenize("in the  12") == ["in", "Ġth", "e", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("Größe, 漢字\n 12").input_ids) == "Größe, 漢字\n 12"
    config = model.config
    ids = [config.vision_start_token_id, config.vision_end_token_id, config.image_token_id, config.video_token_id]
    assert tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)) == ids
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text).input_ids
    assert [ids.count(i) for i in (0, 1, 2, config.image_token_id)] == [0, 3, 2, 1]


def test_damaged_and_other_files_are_named(llama, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"no GGUF")
    with pytest.raises(ValueError, match=r"broken\.gguf is no GGUF file that can be read"):
        read_decoder(path)
    whole = write_gguf(tmp_path / "whole.gguf", llama).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        read_decoder(path)
    with pytest.raises(ValueError, match="a model of type bloom with tokenizer smollm, not a SmolLM2"):
        read_decoder(write_gguf(tmp_path / "bloom.gguf", llama, architecture="bloom"))
    lacking = read_decoder(write_gguf(tmp_path / "lacking.gguf", llama, left_out="blk.1.ffn_up.weight"))
    with pytest.raises(ValueError, match=r"lacks weights of a SmolLM2: \['layers.1.mlp.up_proj.weight'\]"):
        build_model(lacking, bundled_tower())
