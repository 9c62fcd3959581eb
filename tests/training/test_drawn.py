"""Drawn tasks in training: what a packed batch says equals what transformers says of each conversation by itself."""

from __future__ import annotations

import collections
import itertools
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sparsevlm.bundled import bundled_path
from sparsevlm.material import TRAINING, Example, Turn, draw

sys.path.insert(0, str(Path(__file__).parents[2]))

from training.drawn.conversations import encode, patches_of, windows_of
from training.drawn.forward import PackedForward
from training.drawn.packing import Limits, Packed, Packer, empty
from training.drawn.reading import READING, draw_reading
from training.drawn.stream import DrawnBatches, parse_drawn, stream
from training.drawn.tasks import DrawnTasks, LetterReadout, shown_loss
from training.drawn.vocabulary import vocabulary
from training.drawn.written import (
    CELL_COLUMNS,
    CELL_ROWS,
    CELLS,
    LETTERS,
    UNKNOWN,
    letters_shown,
    pieces_shown,
    recorded,
)
from training.forward import Starts, attend
from training.pixels import full_patches
from training.sequences import IGNORE

SIDE = 4
LIMITS = Limits(800, SIDE, longest=160)
WORDS = vocabulary(["some words to write on a page, of no meaning", "with others behind them"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_path())


@pytest.fixture(scope="module")
def model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_path(), dtype="float32").eval()


def example(*sizes: tuple[int, int], turns: int = 2) -> Example:
    """Noise of sizes in tokens, with questions and answers."""
    generator = torch.Generator().manual_seed(len(sizes) + turns)
    images = [torch.randint(256, (28 * h, 28 * w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes]
    asked = tuple(Turn(f"What is number {i}?", (f"the word {i * 37}",)) for i in range(turns))
    return Example("whole", "colour", tuple(Image.fromarray(image.numpy()) for image in images), asked)


def to_tensors(batch: Packed) -> Packed:
    return Packed(*(torch.from_numpy(array) for array in batch))


@torch.no_grad()
def test_a_packed_batch_equals_transformers(model, tokenizer):
    """Pictures whose windows are cut off at the edges, two in one chat, a turn and several."""
    examples = [example((5, 6)), example((4, 4), (7, 3), turns=1), example((9, 2), turns=3)]
    packer, processor = Packer(LIMITS, ["whole"]), Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=10**6)
    conversations = [encode(one, tokenizer, SIDE) for one in examples]
    assert all(packer.add(one) for one in conversations)
    batch = to_tensors(packer.pack())
    forward = PackedForward(model, LIMITS)
    ours, row = forward.decode(batch, forward.visual_tokens(batch)), 0
    for one, conversation in zip(examples, conversations, strict=True):
        pictures = processor([*one.images], do_resize=False, return_tensors="pt")
        ids = torch.from_numpy(conversation.ids)[None]
        pictures["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, **pictures).logits[0]
        for first, stop in conversation.answers:
            expected = logits[first - 1 : stop - 1]
            torch.testing.assert_close(ours[row : row + stop - first], expected, rtol=1e-4, atol=1e-4)
            assert batch.targets[row : row + stop - first].tolist() == ids[0, first:stop].tolist()
            row += stop - first
    assert row > 20
    assert bool((batch.targets[row:] == IGNORE).all())


def test_a_conversation_is_what_the_chat_template_tells(tokenizer):
    one = example((4, 5), turns=3)
    conversation = encode(one, tokenizer, SIDE)
    messages = []
    for index, turn in enumerate(one.turns):
        picture = [{"type": "image"}] if index == 0 else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answers[0]})
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert tokenizer.decode(conversation.ids) == whole.replace("<|image_pad|>", "<|image_pad|>" * 20)
    told = [tokenizer.decode(conversation.ids[first:stop]) for first, stop in conversation.answers]
    assert told == [turn.answers[0] + "<|im_end|>" for turn in one.turns]
    assert int(conversation.is_visual.sum()) == 20


def test_patches_are_those_of_the_image_processor_by_windows():
    image = example((5, 6)).images[0]
    windows = windows_of(6, 5, SIDE)
    assert windows.sizes.tolist() == [16, 4, 8, 2]
    processor = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=10**6)
    expected = processor([image], do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt")
    ours = full_patches(torch.from_numpy(patches_of(image, SIDE))[None].float())
    raster = expected["pixel_values"].view(30, 4, -1)[torch.from_numpy(windows.order)].flatten(0, 1)
    assert torch.equal(ours, raster.float())
    with pytest.raises(ValueError, match="multiples of 28 pixels, got 30x28"):
        encode(Example("whole", "colour", (Image.new("RGB", (30, 28)),), ()), None, SIDE)


def test_attention_of_any_lengths_equals_that_of_equal_ones():
    torch.manual_seed(0)
    query, key = torch.randn(24, 4, 8), torch.randn(24, 2, 8)
    starts = Starts(torch.tensor([0, 8, 16, 24, 24], dtype=torch.int32), 8)
    for causal in (False, True):
        torch.testing.assert_close(attend(query, key, key, starts, causal), attend(query, key, key, ((3, 8),), causal))


def test_what_does_not_fit_waits_and_every_place_is_in_one_sequence(tokenizer):
    packer, added = Packer(LIMITS, ["whole"]), 0
    one = encode(example((10, 12)), tokenizer, SIDE)
    while packer.add(one):
        added += 1
    assert added == min(LIMITS.tokens // one.ids.size, LIMITS.visual // 120)
    for batch in (packer.pack(), packer.pack()):
        assert batch.window_starts[-1] == batch.picture_starts[-1] == LIMITS.visual * 4
        assert batch.chat_starts[-1] == LIMITS.tokens
        assert (batch.window_starts[1:] - batch.window_starts[:-1]).max() <= 64
        shapes = [(array.shape, array.dtype) for array in batch]
        assert shapes == [(array.shape, array.dtype) for array in empty(LIMITS, 1)]
    with pytest.raises(ValueError, match="fits no batch"):
        packer.add(encode(example((20, 12)), tokenizer, SIDE))
    with pytest.raises(ValueError, match="at least 320 tokens"):
        Limits(300, SIDE, longest=160)


def test_pages_to_read_say_what_they_show():
    pages = [draw_reading(WORDS, seed, 5) for seed in range(30)]
    assert {page.task for page in pages} == {"lines", "entries"}
    assert pages[3].turns == draw_reading(WORDS, 3, 5).turns
    for page in pages:
        assert page.family == READING
        assert page.turns
        assert all(side % 28 == 0 for side in page.images[0].size)
        assert all(turn.answers[0].strip() for turn in page.turns)


def test_pieces_of_text_lie_on_the_tokens_that_show_them(tokenizer):
    """Where a piece is said to be there is ink, and the pieces are those of the lines written."""
    write = ImageDraw.ImageDraw.text
    with recorded() as lines:
        page = draw("screens", "menu", 1_000_005, TRAINING, 3)
    assert ImageDraw.ImageDraw.text is write
    image, chosen = page.images[0], random.Random(0)
    pieces = pieces_shown(lines, image.size, tokenizer, 1000, chosen)
    texts = [tokenizer(line.text, add_special_tokens=False).input_ids for line in lines]
    assert sorted(pieces[:, 1].tolist()) == sorted(itertools.chain(*texts))
    columns = image.width // 28
    for at in pieces[:, 0].tolist():
        left, top = at % columns * 28, at // columns * 28
        assert len(image.crop((left, top, left + 28, top + 28)).getcolors(1000)) > 4
    some = pieces_shown(lines, image.size, tokenizer, 5, chosen)
    assert len(some) == 5
    assert {*map(tuple, some.tolist())} <= {*map(tuple, pieces.tolist())}
    assert not len(pieces_shown(lines, (image.width, image.height + 28), tokenizer, 5, chosen))


def test_letters_of_a_page_stand_in_the_cells_where_they_are_written():
    """Read cell by cell, a page is its lines but for letters that share a cell; a cell with a letter has ink."""
    for seed in range(2, 6):
        with recorded() as lines:
            page = draw_reading(WORDS, seed, 3).images[0]
        columns, rows = page.width // 28, page.height // 28
        letters = letters_shown(lines, page.size)
        assert letters.shape == (columns * rows, CELLS)
        cells = letters.reshape(rows, columns, CELL_ROWS, CELL_COLUMNS).transpose(0, 2, 1, 3)
        cells = cells.reshape(rows * CELL_ROWS, columns * CELL_COLUMNS)
        written = sorted("".join(line.text for line in lines).replace(" ", ""))
        read = [chr(ord("!") + number - 1) for number in cells[(cells > 0) & (cells < UNKNOWN)].tolist()]
        assert not collections.Counter(read) - collections.Counter(written)
        assert len(read) > 0.8 * len(written)
        height, width = 28 // CELL_ROWS, 28 / CELL_COLUMNS
        for row, column in np.argwhere((cells > 0) & (cells < UNKNOWN)).tolist():
            left = int(column * width)
            box = (left - 3, (row - 1) * height, left + 7, (row + 2) * height)
            assert len(page.crop(box).getcolors(1000)) > 1
    with recorded() as lines:
        page = draw("screens", "menu", 1_000_005, TRAINING, 3).images[0]
    assert bool((letters_shown(lines, (page.width, page.height + 28)) == UNKNOWN).all())


def test_words_of_a_chart_stand_where_matplotlib_writes_them():
    """Nothing is drawn but text: all ink lies near the letters, and each letter has ink."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
    from matplotlib.figure import Figure

    plot = RendererAgg.draw_text
    figure = Figure(figsize=(4.48, 2.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    texts = [(0.1, 0.8, "Sales of 2024"), (0.3, 0.5, "apples"), (0.6, 0.2, "pears: 48.5")]
    for x, y, text in texts:
        figure.text(x, y, text, fontsize=15)
    with recorded() as lines:
        canvas.draw()
    assert RendererAgg.draw_text is plot
    assert [line.text for line in lines] == [text for *_, text in texts]
    ink = np.asarray(canvas.buffer_rgba())[..., 0] < 128
    assert ink.shape[::-1] == lines[0].size == (448, 280)
    cells = letters_shown(lines, (448, 280)).reshape(10, 16, CELL_ROWS, CELL_COLUMNS).transpose(0, 2, 1, 3)
    cells = cells.reshape(20, 112)
    near = np.zeros_like(ink)
    for row, column in np.argwhere(cells > 0).tolist():
        part = np.s_[max(0, (row - 1) * 14) : (row + 2) * 14, max(0, column * 4 - 8) : column * 4 + 12]
        near[part] = True
        assert ink[part].any()
    assert not (ink & ~near).any()
    assert (cells > 0).sum() > 0.85 * sum(len(text.replace(" ", "")) for *_, text in texts)


def test_packed_letters_are_those_of_the_token(model, tokenizer):
    letters = np.arange(30 * CELLS, dtype=np.int64).reshape(30, CELLS) % LETTERS
    packer = Packer(LIMITS, ["whole"])
    packer.add(encode(example((4, 4)), tokenizer, SIDE))
    packer.add(encode(example((5, 6)), tokenizer, SIDE, letters=letters.astype(np.uint8)))
    batch = packer.pack()
    places = batch.take[batch.take >= LIMITS.tokens] - LIMITS.tokens
    assert bool((batch.letters[places[:16]] == UNKNOWN).all())
    assert bool((batch.letters[places[16:46]] == letters).all())
    assert bool((batch.letters[46:] == UNKNOWN).all())


def test_letters_are_learnt_from_tokens_that_have_them():
    torch.manual_seed(0)
    letters = torch.randint(0, 4, (64, CELLS), dtype=torch.uint8)
    letters[::8] = UNKNOWN
    tokens = torch.nn.functional.one_hot(letters.long().clamp(max=3), 4).flatten(1).float()
    readout = LetterReadout(tokens.shape[1])
    optimiser = torch.optim.Adam(readout.parameters(), lr=0.1)
    first, unread = readout(tokens, letters)
    for _ in range(30):
        optimiser.zero_grad()
        readout(tokens, letters)[0].backward()
        optimiser.step()
    last, read = readout(tokens, letters)
    assert float(unread) < 0.1
    assert float(read) == 1
    assert float(last.detach()) < 0.05 * float(first.detach())
    nothing = readout(tokens, torch.full_like(letters, UNKNOWN))
    assert [float(one.detach()) for one in nothing] == [0, 0]


def test_a_packed_piece_points_to_the_token_that_shows_it(model, tokenizer):
    packer = Packer(LIMITS, ["whole"])
    packer.add(encode(example((4, 4)), tokenizer, SIDE))
    packer.add(encode(example((5, 6)), tokenizer, SIDE, np.array([[4, 300], [29, 301]])))
    batch = to_tensors(packer.pack())
    forward = PackedForward(model, LIMITS)
    with torch.no_grad():
        found = forward.visual_tokens(batch)[batch.shown_at[:2]]
        places = batch.take[batch.take >= LIMITS.tokens] - LIMITS.tokens
        expected = forward.visual_tokens(batch)[places[[16 + 4, 16 + 29]]]
    assert torch.equal(found, expected)
    assert batch.shown[:2].tolist() == [300, 301]
    assert bool((batch.shown[2:] == IGNORE).all())


def test_a_token_that_points_to_its_piece_costs_little():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(100, 64), dim=-1)
    ids = torch.tensor([5, 9, IGNORE])
    loss, right = shown_loss(3 * directions[[5, 9, 7]], directions, ids)
    assert float(loss) < 1e-3
    assert float(right) == 1
    off, wrong = shown_loss(directions[[6, 9, 7]], directions, ids)
    assert float(off) > 5
    assert float(wrong) == 0.5
    assert [float(one) for one in shown_loss(directions[:3], directions, torch.full((3,), IGNORE))] == [0, 0]


def test_processes_draw_different_seeds_and_the_loss_counts_by_family(model, tokenizer, monkeypatch):
    mix = parse_drawn("grounds:1,reading:2", photographs=False)
    limits = Limits(1400, SIDE, longest=352)
    batches = DrawnBatches(mix, tokenizer, limits, WORDS, 3, seed=1)
    alone = list(itertools.islice(batches, 2))
    for here, there in zip(itertools.islice(batches, 9), stream(batches, 1), strict=False):
        assert all((one == other).all() for one, other in zip(here, there, strict=True))
    seeds = []
    workers = iter([SimpleNamespace(id=0, num_workers=2), SimpleNamespace(id=1, num_workers=2)])
    monkeypatch.setattr("training.drawn.stream.get_worker_info", lambda: next(workers))
    monkeypatch.setattr(batches, "_draw", lambda seed: seeds.append(seed) or draw_reading(WORDS, seed, 1))
    for _ in range(2):
        next(iter(batches))
    assert len(set(seeds)) == len(seeds)
    tasks = DrawnTasks(model, iter(alone), limits, mix.families, ahead=1, weight=1.0)
    tasks.load()
    loss = tasks.loss(0).answers
    (gradient,) = torch.autograd.grad(loss, [model.model.visual.merger.mlp[2].weight])
    assert float(gradient.abs().max()) > 0
    assert tasks.read()["drawn_wait"] > 0
    assert tasks.read() == {"grounds": 0.0, "reading": 0.0, "pieces": 0.0, "letters": 0.0, "drawn_wait": 0.0}
    tasks.load()
    assert float(tasks.loss(0).answers.detach()) != float(loss.detach())


def test_a_right_answer_counts(model, tokenizer):
    """The bundled model answers questions about its own scenes."""
    limits = Limits(1600, SIDE, longest=256)
    packer = Packer(limits, ["grounds"])
    for seed in range(4):
        packer.add(encode(draw("grounds", "gradient", 1_000_000 + seed, turns=4), tokenizer, SIDE))
    tasks = DrawnTasks(model, iter([packer.pack()]), limits, ["grounds"], ahead=1, weight=1.0)
    tasks.load()
    with torch.no_grad():
        loss = float(tasks.loss(0).answers)
    assert tasks.read()["grounds"] > 0.5
    assert loss < 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("documents", "must look like"),
        ("documents:0", "must look like"),
        ("pictures:1", "got 'pictures:1'"),
    ],
)
def test_a_mix_is_checked(text, message):
    with pytest.raises(ValueError, match=message):
        parse_drawn(text)


@pytest.mark.gpu
def test_a_graph_takes_batches_whose_sequences_are_of_any_lengths(model, tokenizer):
    """Loss and gradients of a replayed step equal those of single steps, and about those in float32 on the CPU."""

    def total(tasks):
        loss = tasks.loss(0)
        return loss.answers + loss.shown

    limits, families, batches = Limits(1600, SIDE, longest=256), ["whole"], []
    shown = np.array([[7, 300], [11, 301], [11, 302]])
    packer = Packer(limits, families)
    for more in range(3):
        packer.add(encode(example((5, 6 + more), turns=1 + more), tokenizer, SIDE, shown[: 1 + more]))
        packer.add(encode(example((4, 4), (7, 3)), tokenizer, SIDE))
        batches.append(packer.pack())
    expected = []
    for batch in batches:
        alone = DrawnTasks(model, iter([batch]), limits, families, ahead=1, weight=1.0)
        alone.load()
        expected.append(float(total(alone).detach()))

    on_gpu = Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_path(), dtype=torch.bfloat16).eval().cuda()
    tasks = DrawnTasks(on_gpu, itertools.cycle(batches), limits, families, ahead=1, weight=1.0)
    weight = on_gpu.model.visual.blocks[0].attn.qkv.weight
    tasks.load()
    for _ in range(2):  # what is made at the first use
        torch.autograd.grad(total(tasks), [weight])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = total(tasks)
        (gradient,) = torch.autograd.grad(loss, [weight])
    for index in (1, 2, 0):
        tasks.load()
        graph.replay()
        single = total(tasks)
        (its_gradient,) = torch.autograd.grad(single, [weight])
        torch.testing.assert_close(loss, single, rtol=1e-3, atol=1e-4)
        assert float((gradient - its_gradient).norm()) < 0.02 * float(its_gradient.norm())
        assert float(loss.detach()) == pytest.approx(expected[index], rel=0.05)
