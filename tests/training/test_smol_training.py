"""Training of smol: only what is stored changes, text stays what it was, and a run goes on from what it wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sparsevlm.bundled import bundled_path
from sparsevlm.scenes import NO_PIECE, PIECES, QUESTION_TEXTS, ask, holdout_seeds, sample_specs
from sparsevlm.smol.model import build_model, bundled_tower, make_tokenizer
from sparsevlm.smol.parts import Parts
from tiny_gguf import CONFIG

sys.path.insert(0, str(Path(__file__).parents[2]))

from training.adapters import LowRank, Rows
from training.forward import TextForward
from training.optimiser import Optimiser, Trained
from training.replay import TextReplay, perplexity
from training.sequences import IGNORE, SequenceBuilder
from training.smol.model import SmolModel, begin_tower, deeper_tower
from training.smol.settings import SmolSettings
from training.smol.text import text_windows
from training.smol.train import train

pytest.importorskip("gguf")

CPU = torch.device("cpu")
TINY = {"mix": "small:1", "questions": 1, "tail": 160, "tower_depth": 6, "steps": 1, "auxiliary_until": 0.0}
DRAWN = {"drawn": "reading:1", "drawn_tokens": 704, "drawn_longest": 352, "drawn_questions": 2}
TEXTS = [f"The text number {i}.\n\nIt is long enough: " + "in the " * 60 for i in range(12)]


def test_sequences_equal_the_chat_template_where_pieces_are_several_tokens(decoder):
    tokenizer = make_tokenizer(decoder)
    builder = SequenceBuilder(tokenizer, CPU)
    questions = ask(sample_specs(holdout_seeds(5, 2)), torch.tensor([[0, 7, 2], [3, 8, 4]]))
    sequences = builder(questions, 900)
    for row in range(2):
        messages, answers = [], []
        for turn in range(3):
            text = QUESTION_TEXTS[int(questions.text_ids[row, turn])]
            pieces = [PIECES[piece] for piece in questions.pieces[row, turn].tolist() if piece != NO_PIECE]
            answers.append("".join(pieces))
            image = [{"type": "image"}] if turn == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
            messages.append({"role": "assistant", "content": answers[-1]})
        whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ours = [*builder.head_ids.tolist(), image_id, *sequences.input_ids[row].tolist()]
        length = len(tokenizer(whole).input_ids)
        assert tokenizer.decode(ours[:length]) == whole
        assert ours[length:] == [tokenizer.pad_token_id] * (len(ours) - length)
        for turn, answer in enumerate(answers):
            mine = (sequences.owner[row] == turn) & (sequences.targets[row] != IGNORE)
            assert tokenizer.decode(sequences.targets[row][mine]) == answer + "<|im_end|>"
    assert bool(sequences.complete.all())


@torch.no_grad()
def test_text_forward_equals_hugging_face(decoder):
    model = build_model(decoder, deeper_tower(6))
    ids = torch.randint(3, CONFIG.vocab_size, (3, 30))
    expected = model(input_ids=ids).logits
    ours = TextForward(model.model.language_model, 3, 30)(ids).view_as(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    losses = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert perplexity(model.model.language_model, ids, at_once=2) == pytest.approx(float(losses.exp()), rel=1e-4)


@torch.no_grad()
def test_deeper_tower_begins_as_the_bundled_one(decoder):
    """The merged tokens before the one projection of another size."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    bundled = Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_path(), dtype="float32").model.visual
    model = build_model(decoder, deeper_tower(9))
    begin_tower(model)
    assert deeper_tower(9)["fullatt_block_indexes"] == [3, 7]
    grid, pixels = torch.tensor([[1, 16, 8]]), torch.randn(128, 3 * 2 * 14 * 14)
    seen = []
    for visual in (bundled, model.model.visual):
        visual.merger.mlp[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        visual(pixels, grid)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    tokens = model.model.visual.merger.mlp[2](seen[0])
    rows = model.lm_head.weight
    assert 0.1 < float(tokens.square().mean() / rows.square().mean()) < 10
    with pytest.raises(ValueError, match="tower_depth must be at least 6"):
        deeper_tower(5)


def test_adapters_have_the_gradients_of_what_they_stand_for():
    torch.manual_seed(0)
    whole = {name: torch.nn.Parameter(torch.randn(6, 5)) for name in "xy"}
    embedding = torch.nn.Parameter(torch.randn(8, 5))
    inputs = torch.randn(7, 5)
    low_rank = LowRank(whole, 2, 0.5, {"y": (torch.randn(2, 5), torch.randn(6, 2))})
    base = whole["x"].detach().clone()
    rows = Rows(embedding, 6, 2)

    def loss(x, y, rows):
        return (inputs @ x.T @ (inputs @ y.T).T).tanh().sum() + (inputs @ rows.T).sin().sum()

    total = loss(whole["x"], whole["y"], embedding[6:])
    gradients = torch.autograd.grad(total, [*low_rank.weights, embedding])
    low_rank.take(gradients[:2])
    rows.take(gradients[2:])
    a, b = low_rank.masters
    y_base = whole["y"].detach() - 0.5 * (b[1] @ a[1]).detach()
    again = loss(base + 0.5 * b[0] @ a[0], y_base + 0.5 * b[1] @ a[1], rows.masters[0])
    for got, expected in zip(
        (a.grad, b.grad, rows.masters[0].grad), torch.autograd.grad(again, [a, b, rows.masters[0]]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_optimiser_changes_only_rows_and_low_rank():
    torch.manual_seed(0)
    matrix, embedding, bias = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((6, 5), (8, 5), (3,)))
    before = matrix.detach().clone(), embedding.detach().clone()
    adapters = [Rows(embedding, 6, 2), LowRank({"m": matrix}, 1, 1.0, {})]
    optimiser = Optimiser(Trained([], [bias], adapters), decay=0.0, clip=1.0)
    optimiser.rate.fill_(0.1)
    for _ in range(3):
        loss = (matrix * torch.arange(5)).square().sum() + embedding.square().sum() + bias.square().sum()
        optimiser.step(torch.autograd.grad(loss, optimiser.weights))
    assert torch.equal(embedding[:6], before[1][:6])
    assert not torch.equal(embedding[6:], before[1][6:])
    assert torch.linalg.matrix_rank(matrix.detach() - before[0], atol=1e-4) == 1


def test_replay_is_zero_for_the_original_and_takes_all_windows(decoder):
    smol = SmolModel(SmolSettings(lora_rank=2, **TINY), CPU, torch.float32, decoder)
    text = smol.model.model.language_model
    windows = torch.arange(3, 3 + 3 * 8).view(3, 8)
    replay = TextReplay(text, smol.original, windows, 2, 1.0)
    assert float(replay.loss().detach()) == pytest.approx(0.0, abs=1e-6)
    assert replay._next.tolist() == [2, 0]
    with torch.no_grad():
        text.layers[0].mlp.down_proj.weight.add_(0.1)
    assert float(replay.loss().detach()) > 0.01
    with pytest.raises(ValueError, match="3 windows of text are too few for 4"):
        TextReplay(text, smol.original, windows, 4, 1.0)


def test_text_is_there_and_none_of_it_is_in_both_sets(decoder):
    tokenizer = make_tokenizer(decoder)
    replayed, held_out = text_windows(tokenizer, 64, TEXTS)
    of_held_out = tokenizer.decode(held_out.flatten())
    of_replayed = tokenizer.decode(replayed.flatten())
    assert [i for i in range(12) if f"number {i}." in of_held_out] == [0, 10]
    assert not [i for i in (0, 10) if f"number {i}." in of_replayed]
    assert "<|im_start|>user\nThe text number 1.<|im_end|>\n<|im_start|>assistant\nIt is long" in of_replayed
    assert "number 2.\n\nIt is long" in of_replayed


def test_stages_train_what_they_say_and_go_on(decoder, tmp_path):
    """Frozen decoder, then low rank with replay, then once more from what that wrote."""
    first = SmolSettings(**TINY | {"auxiliary_until": 0.5})
    train(first, tmp_path / "1", 0, CPU, decoder)
    one = Parts.load(tmp_path / "1")
    assert one.lora == {}
    assert one.tower["depth"] == bundled_tower()["depth"]
    assert not torch.equal(one.rows, decoder.weights["embed_tokens.weight"].mean(0).expand(4, -1).bfloat16())
    frozen = SmolModel(first, CPU, torch.float32, decoder)
    assert not any(weight.requires_grad for weight in frozen.model.model.language_model.layers.parameters())

    second = SmolSettings(
        init=str(tmp_path / "1"), lora_rank=2, replay_windows=1, replay_length=32, text_windows=2, **TINY | DRAWN
    )
    result = train(second, tmp_path / "2", 0, CPU, decoder, TEXTS)
    assert result["perplexity_original"] > 1
    assert result["perplexity"] != result["perplexity_original"]
    two = Parts.load(tmp_path / "2")
    assert len(two.lora) == 7 * CONFIG.num_hidden_layers
    assert all(b.any() for _, b in two.lora.values())
    rows = [line for line in (tmp_path / "2" / "log.jsonl").read_text().splitlines() if "replay_loss" in line]
    assert rows
    assert 0 < json.loads(rows[-1])["drawn_loss"] < 20
    assert "reading" in json.loads(rows[-1])

    third = SmolSettings(**vars(second) | {"init": str(tmp_path / "2")})
    again = SmolModel(third, CPU, torch.float32, decoder)
    merged = build_model(decoder, two.tower)
    two.put_into(merged)
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(again.original.layers[0].mlp.up_proj.weight, decoder.weights["layers.0.mlp.up_proj.weight"])
    saved = again.parts()
    for name, (a, b) in two.lora.items():
        assert torch.equal(saved.lora[name][0], a.float())
        assert torch.equal(saved.lora[name][1], b.float())
    for rank in (0, 3):
        with pytest.raises(ValueError, match="was trained with"):
            SmolModel(SmolSettings(**vars(third) | {"lora_rank": rank}), CPU, torch.float32, decoder)
    with pytest.raises(ValueError, match="lora_rank must be 0 or more"):
        SmolSettings(lora_rank=-1)
