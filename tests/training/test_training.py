"""Training: its fast paths compute what the Hugging Face classes compute, and growing changes nothing."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from sparsevlm.bundled import __file__ as bundled_file
from sparsevlm.scenes import (
    CARD,
    DEFAULT_LAYOUT,
    NO_PIECE,
    PIECES,
    QUESTION_TEXTS,
    SINGLE_TASKS,
    TASKS,
    Layout,
    ask,
    draw_scene,
    holdout_seeds,
    picture_boxes,
    render,
    sample_specs,
)
from sparsevlm.scenes.vocabulary import COLOUR_RGB

sys.path.insert(0, str(Path(__file__).parents[2]))

from training.architecture import build_model, cast_weights, grow
from training.evaluate import evaluate
from training.forward import SceneForward
from training.groups import draw_group, parse_mix
from training.objective import PLACE_SIZES, TOKEN_SIZES, Readout, place_labels, score_answers, token_labels
from training.optimiser import Optimiser, Trained, orthogonalised, whole_model
from training.pixels import Patchifier, full_patches
from training.sequences import IGNORE, SequenceBuilder, Sequences
from training.settings import TrainSettings
from training.step import TrainStep
from training.train import auxiliary_weight, rate_factor

FOLDER = Path(bundled_file).parent
CPU = torch.device("cpu")
TAIL = 120


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


@pytest.mark.parametrize("text", [*QUESTION_TEXTS[::40], "pink TUNA, red 120", "Größe 漢字 — 2024!\n tab\t", ""])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_piece_of_an_answer_is_a_token(tokenizer):
    assert [len(tokenizer(piece).input_ids) for piece in PIECES] == [1] * len(PIECES)


def answer_text(questions, row, turn):
    return "".join(PIECES[piece] for piece in questions.pieces[row, turn].tolist() if piece != NO_PIECE)


def test_sequences_equal_the_chat_template(tokenizer):
    """For every task, in any turn; targets are the answers, and what does not fit is no target."""
    builder = SequenceBuilder(tokenizer, CPU)
    spec = sample_specs(holdout_seeds(5, 3))
    tasks = torch.tensor([[0, 7, 2], [1, 4, 8], [3, 6, 5]])
    questions = ask(spec, tasks)
    sequences = builder(questions, TAIL)
    for row in range(3):
        messages = []
        for turn in range(3):
            text = QUESTION_TEXTS[int(questions.text_ids[row, turn])]
            image = [{"type": "image"}] if turn == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
            messages.append({"role": "assistant", "content": answer_text(questions, row, turn)})
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(whole).input_ids[:-1]  # the line end after the last turn is never asked for
        ours = [*builder.head_ids.tolist(), tokenizer.convert_tokens_to_ids("<|image_pad|>")]
        tail = sequences.input_ids[row].tolist()
        assert (ours + tail)[: len(ids)] == ids
        for turn in range(3):
            mine = (sequences.owner[row] == turn) & (sequences.targets[row] != IGNORE)
            got = sequences.targets[row][mine].tolist()
            assert tokenizer.decode(got) == answer_text(questions, row, turn) + "<|im_end|>"
            assert [tail[i + 1] for i in mine.nonzero().flatten().tolist()] == got
    assert bool(sequences.complete.all())
    short = builder(questions, 40)
    assert torch.equal(short.input_ids, sequences.input_ids[:, :40])
    for row in range(3):
        for turn in range(3):
            mine = (short.owner[row] == turn) & (short.targets[row] != IGNORE)
            assert bool(mine.any()) == bool(short.complete[row, turn])
    assert not bool(short.complete.all())


def test_forward_equals_hugging_face(tiny, tokenizer):
    """Packed groups of unlike pictures against the model's own forward pass, group by group."""
    builder, patchify = SequenceBuilder(tokenizer, CPU), Patchifier(CPU)
    groups = parse_mix("tall:2,pair:2,square:1")
    table = torch.arange(len(SINGLE_TASKS))
    batches = [draw_group(group, holdout_seeds(9, group.count), table, 2) for group in groups]
    tails = [builder(batch.questions, TAIL).input_ids for batch in batches]
    pixels = [torch.stack([render(spec) for spec in batch.specs], dim=1).flatten(0, 1) for batch in batches]
    patches = [patchify(picture, torch.float32) for picture in pixels]
    fast = SceneForward(tiny, builder.head_ids, builder.between_ids, groups, TAIL)
    with torch.no_grad():
        decoded = fast.decode(fast.visual_features(patches), tails)
        for group, tail, patch, ours in zip(groups, tails, patches, decoded, strict=True):
            pad = torch.full((group.count, group.tokens), tiny.config.image_token_id)
            parts = [builder.head_ids.expand(group.count, -1), pad]
            parts += [builder.between_ids.expand(group.count, -1), pad] * group.is_pair
            input_ids = torch.cat([*parts, tail], dim=1)
            layout = group.layouts[0]
            expected = tiny(
                input_ids=input_ids,
                pixel_values=full_patches(patch),
                image_grid_thw=torch.tensor([[1, layout.height // 14, layout.width // 14]] * group.n_images),
                mm_token_type_ids=(input_ids == tiny.config.image_token_id).long(),
                logits_to_keep=TAIL,
                output_hidden_states=True,
            )
            torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=2e-5)


def test_places_are_those_of_the_visual_tokens(tiny, tokenizer):
    """Rows that are asked for places stand for the token they are labelled as."""
    builder = SequenceBuilder(tokenizer, CPU)
    groups = parse_mix("wide:2")
    fast = SceneForward(tiny, builder.head_ids, builder.between_ids, groups, TAIL)
    rows, cols = 12, 20
    raster = torch.arange(rows * cols, dtype=torch.float32)[None, :, None].expand(2, -1, 8)
    start = builder.head_ids.shape[0]
    whole = torch.nn.functional.pad(raster, (0, 0, start, TAIL), value=-1.0)
    seen = fast._visual_rows(groups[0], whole)[..., 0]
    labels = place_labels(sample_specs(holdout_seeds(0, 2), groups[0].layouts[0]))
    assert torch.equal(labels[..., 0] * cols + labels[..., 1], seen.long())


def test_evaluation_counts_every_task(tiny, tokenizer):
    accuracy = evaluate(tiny, tokenizer, 2, ["wide"])
    assert set(accuracy) == {"wide", "pair"}
    assert set(accuracy["wide"]) == set(SINGLE_TASKS)
    assert all(0.0 <= share <= 1.0 for tasks in accuracy.values() for share in tasks.values())


def test_growing_keeps_the_function(tiny):
    grown = grow(tiny, 5).eval()
    layers = grown.model.language_model.layers
    assert [bool(layer.mlp.down_proj.weight.any()) for layer in layers] == [True, False, True, False, False]
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
    settings = TrainSettings(mix="wide:2,pair:1", questions=3, draw_ahead=2)
    step = TrainStep(model, tokenizer, settings, whole_model(model))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    seeds = step.seeds.clone()
    step.run(factor=1.0, auxiliary_weight=1.0)
    still = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert not still
    assert float(step.metrics.asked.sum()) == 18
    assert torch.equal(step.seeds, seeds + 6)
    assert step.steps_done == 2
    assert step.metrics.read()["loss"] > 0
    assert float(step.metrics.totals.sum()) == 0


def test_orthogonalised_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.4


def test_optimiser_descends():
    torch.manual_seed(0)
    matrix, bias = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.zeros(6))
    target, inputs = torch.randn(6, 4), torch.randn(64, 4)
    optimiser = Optimiser(Trained([matrix], [bias], []), decay=0.0, clip=1.0)

    def loss():
        return (torch.nn.functional.linear(inputs, matrix, bias) - inputs @ target.T - 1.0).square().mean()

    first = float(loss().detach())
    for step in range(400):
        optimiser.rate.fill_(0.05 * (1 - step / 400))
        optimiser.matrix_rate.fill_(0.05 * (1 - step / 400))
        optimiser.step(torch.autograd.grad(loss(), optimiser.weights))
    assert float(loss().detach()) < 0.05 * first


def test_mix_is_checked():
    assert [(group.count, group.tokens) for group in parse_mix("square:3,huge:1")] == [(3, 256), (1, 1024)]
    for mix in ("square", "square:0", "round:3", ""):
        with pytest.raises(ValueError, match="mix must look like"):
            parse_mix(mix)


def test_score_counts_whole_answers():
    """Two questions of two and one tokens; the first has one wrong token, so that only the second is a hit."""
    sequences = Sequences(
        input_ids=torch.zeros(1, 4, dtype=torch.int64),
        targets=torch.tensor([[1, 2, IGNORE, 3]]),
        owner=torch.tensor([[0, 0, 0, 1]]),
        complete=torch.tensor([[True, True]]),
    )
    logits = 9.0 * torch.nn.functional.one_hot(torch.tensor([[1, 0, 2, 3]]), 4).float()
    score = score_answers(logits, sequences, torch.tensor([[0, 1]]))
    assert score.hits.tolist()[:2] == [0.0, 1.0]
    assert score.asked.tolist()[:2] == [1.0, 1.0]
    assert float(score.weight) == pytest.approx(2 * 2**-0.5 + 1)
    assert float((score + score).loss) == pytest.approx(2 * float(score.loss))


LOOSE = Layout(rows=4, cols=4, cell=104, margin=(32, 32))


@pytest.mark.parametrize("layout", [DEFAULT_LAYOUT, LOOSE], ids=["aligned", "loose"])
def test_token_labels_are_where_the_pixels_are(layout):
    spec = sample_specs(holdout_seeds(0, 8), layout)
    labels = token_labels(spec)
    assert labels.shape == (8, 256, len(TOKEN_SIZES))
    glyphs = labels[..., 2:6]
    assert ((glyphs[..., :3] != IGNORE).sum(1) == 3).all(), "each of three places is labelled once per card"
    assert torch.equal((glyphs[..., 3] != IGNORE).sum(1), (spec.card_glyphs[..., 3] != NO_PIECE).sum(1))
    on_card = labels[..., 0] == CARD
    assert on_card[glyphs[..., 0] != IGNORE].float().mean() > 0.9, "glyphs lie on cards"
    loss, accuracy = Readout(8, TOKEN_SIZES)(torch.zeros(8 * 256, 8), labels.flatten(0, 1))
    assert torch.isfinite(loss)
    assert accuracy.shape == (len(TOKEN_SIZES),)

    pixels, seen = render(spec).float(), []
    for row, token in (labels[..., 0] < CARD).nonzero().tolist():
        y, x = token // 16 * 28, token % 16 * 28
        patch = pixels[row, :, y : y + 28, x : x + 28].flatten(1)
        colour = torch.tensor(COLOUR_RGB[int(labels[row, token, 1])])
        seen.append(float((patch - colour[:, None]).abs().sum(0).amin()) < 100)
    assert sum(seen) > 0.85 * len(seen), "most tokens of a shape show its colour; the others lie in a box's corner"


@pytest.mark.parametrize("layout", [DEFAULT_LAYOUT, LOOSE], ids=["aligned", "loose"])
def test_edges_agree_with_the_boxes(layout):
    spec = sample_specs(holdout_seeds(0, 4), layout)
    near, places = token_labels(spec)[..., 6:], place_labels(spec)
    boxes = picture_boxes(spec)
    assert places.shape[-1] == len(PLACE_SIZES)
    for row, token in (places[..., 2] != IGNORE).nonzero().tolist():
        y, x = places[row, token, :2].tolist()
        assert token == 16 * y + x
        edges = places[row, token, 2:6]
        mine = [
            box
            for box in boxes[row].tolist()
            if [box[0] // 14, box[1] // 14, -(-box[2] // 14), -(-box[3] // 14)] == edges.tolist()
        ]
        assert mine
        assert any(
            box[0] < 28 * x + 28 and box[2] > 28 * x and box[1] < 28 * y + 28 and box[3] > 28 * y for box in mine
        )
        assert torch.equal(near[row, token] - 8, edges - torch.tensor([2 * x, 2 * y, 2 * x, 2 * y]))
    assert int(near[near != IGNORE].min()) >= 0
    assert int(near.max()) < TOKEN_SIZES[-1]


def test_schedules():
    settings = TrainSettings(warmup=10, auxiliary_until=0.5)
    assert rate_factor(settings, 0, 0.0) == pytest.approx(0.1)
    assert rate_factor(settings, 1000, 1.0) == pytest.approx(0.01)
    assert [auxiliary_weight(settings, p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    late = TrainSettings(auxiliary_from=0.4, auxiliary_until=0.8)
    assert [auxiliary_weight(late, p) for p in (0.2, 0.4, 0.6, 0.9)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="auxiliary_until"):
        TrainSettings(auxiliary_until=2.0)
    with pytest.raises(ValueError, match="auxiliary_from"):
        TrainSettings(auxiliary_from=0.6, auxiliary_until=0.5)


def test_tasks_of_pairs_come_last():
    assert TASKS[: len(SINGLE_TASKS)] == SINGLE_TASKS
