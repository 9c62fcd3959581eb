"""Training: its fast paths compute what the Hugging Face classes compute, and growing changes nothing."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from sparsevlm.bundled import __file__ as bundled_file
from sparsevlm.scenes import (
    ANSWER_TEXTS,
    QUESTION_TEXTS,
    ask,
    cell_contents,
    draw_scene,
    holdout_seeds,
    render,
    sample_specs,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

from training.architecture import build_model, cast_weights, grow
from training.forward import SceneForward
from training.objective import TokenHead, score_answers, token_labels
from training.pixels import Patchifier, full_patches
from training.sequences import IGNORE, SequenceBuilder
from training.settings import TrainSettings
from training.step import TrainStep
from training.train import auxiliary_weight, learning_rate

FOLDER = Path(bundled_file).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_model(layers=2, mlp=32).eval()


def test_patches_equal_the_image_processor():
    scene = draw_scene(3)
    processor = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
    expected = processor(images=[scene.image], return_tensors="pt")
    assert expected.image_grid_thw.tolist() == [[1, 32, 32]]
    images = render(sample_specs(torch.tensor([3])))
    ours = full_patches(Patchifier(CPU)(images, torch.float32))
    torch.testing.assert_close(ours, expected.pixel_values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", [*QUESTION_TEXTS[::40], *ANSWER_TEXTS[-3:], "Größe 漢字 — 2024!\n tab\t", ""])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_and_answer_words_are_single_tokens(tokenizer):
    assert [len(tokenizer(a).input_ids) for a in ("427", "red", "yes", "left")] == [3, 1, 1, 1]


def test_sequences_equal_the_chat_template(tokenizer):
    builder = SequenceBuilder(tokenizer, CPU)
    spec = sample_specs(holdout_seeds(5, 3))
    tasks = torch.tensor([[0, 3, 2], [1, 4, 0], [4, 2, 0]])
    questions = ask(spec, tasks)
    sequences = builder(questions)
    for row in range(3):
        messages = []
        for turn in range(3):
            text = QUESTION_TEXTS[int(questions.text_ids[row, turn])]
            image = [{"type": "image"}] if turn == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
            messages.append({"role": "assistant", "content": ANSWER_TEXTS[int(questions.answer_ids[row, turn])]})
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(whole).input_ids[:-1]  # the line end after the last turn is never asked for
        ours = [*builder.head_ids.tolist(), tokenizer.convert_tokens_to_ids("<|image_pad|>")]
        tail = sequences.input_ids[row].tolist()
        assert (ours + tail)[: len(ids)] == ids
        used = sequences.targets[row] != IGNORE
        assert [tail[i + 1] for i in sequences.answer_rows[row][used]] == sequences.targets[row][used].tolist()


def test_forward_equals_hugging_face(tiny, tokenizer):
    builder, patchify = SequenceBuilder(tokenizer, CPU), Patchifier(CPU)
    spec = sample_specs(holdout_seeds(0, 2))
    sequences = builder(ask(spec, torch.tensor([[0, 1], [2, 3]])))
    patches = patchify(render(spec), torch.float32)
    rows = torch.arange(sequences.input_ids.shape[1]).expand(2, -1)
    pad = torch.full((2, 256), tiny.config.image_token_id)
    input_ids = torch.cat([builder.head_ids.expand(2, -1), pad, sequences.input_ids], dim=1)
    with torch.no_grad():
        fast = SceneForward(tiny, builder.head_ids, (32, 32))
        ours = fast.answer_logits(fast.visual_features(patches), sequences.input_ids, rows)
        expected = tiny(
            input_ids=input_ids,
            pixel_values=full_patches(patches),
            image_grid_thw=torch.tensor([[1, 32, 32]] * 2),
            mm_token_type_ids=(input_ids == tiny.config.image_token_id).long(),
            logits_to_keep=sequences.input_ids.shape[1],
        ).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_growing_keeps_the_function(tiny):
    grown = grow(tiny, 5).eval()
    assert len(grown.model.language_model.layers) == 5
    ids = torch.arange(7, 40)[None]
    with torch.no_grad():
        assert torch.equal(tiny(input_ids=ids).logits, grown(input_ids=ids).logits)
    with pytest.raises(ValueError, match="cannot grow"):
        grow(grown, 4)


def test_casting_keeps_rotary_frequencies():
    model = cast_weights(build_model(layers=1, mlp=16), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_step_moves_weights_and_counts_questions(tokenizer):
    torch.manual_seed(0)
    model = build_model(layers=1, mlp=16)
    step = TrainStep(model, tokenizer, TrainSettings(batch=2, questions=3))
    before, seeds = model.lm_head.weight.detach().clone(), step.seeds.clone()
    step.run(rate=1e-3, auxiliary_weight=1.0)
    assert not torch.equal(before, model.lm_head.weight)
    assert float(step.metrics.asked.sum()) == 6
    assert torch.equal(step.seeds, seeds + 2)
    assert step.metrics.read()["loss"] > 0
    assert float(step.metrics.totals.sum()) == 0


def test_score_counts_whole_answers():
    targets = torch.tensor([[[1, 2], [3, IGNORE]]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 0, 3, 0]]), 4).float()
    score = score_answers(logits, targets, torch.tensor([[0, 1]]))
    assert score.hits.tolist()[:2] == [0.0, 1.0]
    assert score.asked.tolist()[:2] == [1.0, 1.0]


def test_token_labels_are_where_the_pixels_are():
    spec = sample_specs(holdout_seeds(0, 8))
    labels = token_labels(spec)
    assert labels.shape == (8, 16, 16, 5)
    assert ((labels[..., 2:] != IGNORE).sum((1, 2)) == 3).all(), "each digit slot is labelled once per card"
    kinds, _ = cell_contents(spec)
    assert torch.equal((labels[..., 0] != 9).any(2), kinds >= 0)
    on_card = labels[..., 0] == 8
    assert on_card[labels[..., 2] != IGNORE].all(), "digits lie on cards"
    loss, _ = TokenHead(8)(torch.zeros(8, 256, 8), spec)
    assert torch.isfinite(loss)


def test_schedules():
    settings = TrainSettings(warmup=10, auxiliary_until=0.5)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(1e-4)
    assert learning_rate(settings, 1000, 1.0) == pytest.approx(1e-5)
    assert [auxiliary_weight(settings, p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="auxiliary_until"):
        TrainSettings(auxiliary_until=2.0)
