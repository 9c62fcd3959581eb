"""The real processor of every family: what it makes is found as it lies, and keeping all of it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sparsevlm import Report, SparseVLMConfig, apply_sparsevlm
from sparsevlm.cli import app
from sparsevlm.cli.asking import build_inputs
from sparsevlm.evaluation.execution.generation import BatchGenerator
from sparsevlm.evaluation.settings import EvalConfig, Setting
from sparsevlm.evaluation.suites.suite import Sample
from sparsevlm.inputs import load_processor
from sparsevlm.inputs.downsample import VisualCounter
from sparsevlm.visualization.overlay import rows_of
from toys import FAMILIES, IS_OLD, tiny_model
from toys.processors import PROCESSED, missing_packages, save_processor

# By family, parts (t, h, w) of a picture of 168 x 112 and of one of 84 x 84, where they are no 4 x 6 and 3 x 3.
GRIDS = [[(1, 4, 6)], [(1, 3, 3)]]
SQUASHED = [[(1, 3, 3)], [(1, 3, 3)]]
WITHOUT_MARGINS = [[(1, 3, 3), (1, 4, 6)], [(1, 3, 3), (1, 6, 6)]]
PARTS = {
    "llava": [[(1, 4, 4)], [(1, 4, 4)]],
    "gemma3": [[(1, 4, 4)], [(1, 4, 4)]],
    "gemma4": [[(1, 6, 10)], [(1, 8, 8)]],
    "gemma4_unified": [[(1, 6, 10)], [(1, 8, 8)]],
    "minicpmv4_6": [[(1, 3, 5), (6, 4, 4)], [(1, 4, 4), (2, 3, 6)]],
    "paligemma": SQUASHED,
    "paligemma2": SQUASHED,
    "deepseek_vl": SQUASHED,
    "llava_next": WITHOUT_MARGINS,
    "llava_onevision": SQUASHED,  # several images are not cut
    "internvl": [[(7, 2, 2)], [(5, 2, 2)]],
    "idefics3": [[(7, 2, 2)], [(10, 2, 2)]],
    "smolvlm": [[(7, 2, 2)], [(10, 2, 2)]],
    "ovis2": [[(7, 2, 2)], [(5, 2, 2)]],
}
# Views (rows, columns, height, width) of both; Ovis2 stretches a wide picture over a tall arrangement.
VIEWS = {
    "llava_next": [((1, 1, 3, 3), (1, 1, 4, 6)), ((1, 1, 3, 3), (1, 1, 6, 6))],
    "llava_onevision": [((1, 1, 3, 3),), ((1, 1, 3, 3),)],
    "internvl": [((6, 0, 2, 2), (1, 1, 2, 2)), ((4, 0, 2, 2), (1, 1, 2, 2))],
    "idefics3": [((2, 3, 2, 2), (1, 1, 2, 2)), ((3, 3, 2, 2), (1, 1, 2, 2))],
    "smolvlm": [((2, 3, 2, 2), (1, 1, 2, 2)), ((3, 3, 2, 2), (1, 1, 2, 2))],
    "ovis2": [((1, 1, 2, 2), (3, 2, 2, 2)), ((1, 1, 2, 2), (2, 2, 2, 2))],
    "minicpmv4_6": [((1, 1, 3, 5), (2, 3, 4, 4)), ((1, 1, 4, 4), (2, 1, 3, 6))],
}
# Of a video of four frames where no input names its grid: images that it is, and their parts.
VIDEOS = {
    "llava_onevision": [[(4, 2, 2)]],
    "internvl": [[(1, 2, 2)]] * 4,
    "smolvlm": [[(1, 2, 2)]] * 4,
    "gemma4": [[(4, 6, 10)]],
    "gemma4_unified": [[(4, 6, 10)]],
    "minicpmv4_6": [[(1, 3, 5)] if IS_OLD else [(1, 3, 5), (6, 4, 4)]] * 4,
}
VIEWS_OF_VIDEOS = {} if IS_OLD else {"minicpmv4_6": [VIEWS["minicpmv4_6"][0]] * 4}


class Looks:
    """A selector that remembers where the tokens are."""

    placement, needs = "before_decoder", frozenset()

    def select(self, context, n_keep):
        self.coordinates, self.image_idx = context.coordinates, context.image_idx
        return torch.arange(n_keep)


@pytest.fixture(params=FAMILIES)
def family(request):
    if missing := missing_packages(request.param):
        pytest.skip(f"the processor of {request.param} needs {', '.join(missing)}: nox -s processors")
    if (
        request.param == "minicpmv4_6"
        and IS_OLD
        and request.function
        in (
            test_images_of_a_processor,
            test_evaluation_takes_any_family,
        )
    ):
        pytest.skip("this transformers does not encode pictures of two sizes in one prompt of MiniCPM-V")
    return request.param


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def places(parts):
    """Time, row and column of each token of an image that begins at zero."""
    found, start = [], 0
    for t, h, w in parts:
        found += [(start + i, y, x) for i in range(t) for y in range(h) for x in range(w)]
        start += t
    return found


def from_zero(coordinates):
    """The same of what was read: rows and columns from the first of the image, times as steps."""
    time, height, width = coordinates
    steps = torch.unique(time, return_inverse=True)[1]
    return [tuple(place) for place in torch.stack((steps, height - height[0], width - width[0])).T.tolist()]


def with_logits(model, inputs):
    output = model.generate(**inputs, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits)


def check(model, inputs, images, views=()):
    dense = with_logits(model, inputs)
    with apply_sparsevlm(model, keep=1.0):
        assert torch.equal(with_logits(model, inputs), dense)
    looks = Looks()
    with apply_sparsevlm(model, selector=looks, keep=0.5, min_keep=1, min_keep_per_image=0) as state:
        assert not torch.equal(with_logits(model, inputs), dense)
    (sample,) = state.report.samples
    wanted = [places(parts) for parts in images]
    assert list(sample.images) == [len(one) for one in wanted]
    assert sample.n_visual == sum(sample.images)
    got = [from_zero(looks.coordinates[:, looks.image_idx == i]) for i in range(len(images))]
    assert got == wanted
    assert sample.views == tuple(views)
    return sample


def placeholders(inputs, family, kind):
    return int((inputs["input_ids"] == FAMILIES[family].kinds[kind].token).sum())


def test_images_of_a_processor(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    processor = load_processor(save_processor(family, tmp_path))
    assert type(processor).__name__ == PROCESSED[family].name
    inputs = build_inputs(processor, "what is in the picture", images=[picture(168, 112), picture(84, 84, 1)])
    parts = PARTS.get(family, GRIDS)
    sample = check(model, inputs, parts, VIEWS.get(family, ()))
    newlines = {"llava_next": 4 + 6, "llava_onevision": 2}.get(family, 0)
    assert placeholders(inputs, family, "image") == sample.n_visual + newlines
    if not newlines and family != "minicpmv4_6":  # whose slices are not as large as the whole
        assert sample.grids == tuple((sum(t for t, _, _ in own), *own[0][1:]) for own in parts)


@pytest.mark.parametrize("family", [name for name, one in PROCESSED.items() if one.video], indirect=True)
def test_a_video_of_a_processor(family, tmp_path):
    if family == "kimi_k25" and IS_OLD:
        pytest.skip("this transformers does not run videos of Kimi K2.5")
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    processor = load_processor(save_processor(family, tmp_path))
    frames = [picture(168, 112, seed) for seed in range(4)]
    inputs = build_inputs(processor, "what is in the video", frames=frames)
    images = VIDEOS.get(family)
    if images is None:
        t, h, w = inputs["video_grid_thw"][0].tolist()
        images = [[(1 if family == "kimi_k25" else t, h // 2, w // 2)]]
        assert len(inputs["video_grid_thw"]) == 1
    sample = check(model, inputs, images, VIEWS_OF_VIDEOS.get(family, ()))
    if (kind := "video") in FAMILIES[family].kinds:
        assert placeholders(inputs, family, kind) == sample.n_visual + (family == "llava_onevision")


@pytest.fixture
def checkpoint(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    picture(168, 112).save(tmp_path / "picture.png")
    return save_processor(family, tmp_path / "model")


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


# What is drawn of the others is tested below; a drawing takes a second.
DRAWN = ("llava", "llava_next", "internvl", "qwen3_vl", "mistral3")


def test_commands_take_any_family(family, checkpoint, tmp_path):
    attention = "eager" if FAMILIES[family].attentions == ("eager",) else "sdpa"
    image, drawn, again = (tmp_path / name for name in ("picture.png", "drawn.png", "again.png"))
    options = ["--keep", "0.6", "--min-keep", 4, "--max-new-tokens", 2, "--device", "cpu", "--attn", attention]
    files = ["--report", tmp_path / "report.json", *(["--picture", drawn] if family in DRAWN else [])]
    call("run", "--model", checkpoint, "--prompt", "what is in the picture", "--image", image, *options, *files)
    report = Report.from_json(tmp_path / "report.json")
    assert report.samples[0].stages[0].n_kept < report.n_visual
    if family == "llava":
        call("visualize", tmp_path / "report.json", "--image", image, "--out", again, "--model", checkpoint)
        assert again.read_bytes()[:4] == drawn.read_bytes()[:4] == b"\x89PNG"


def colours(family, inputs, height, width):
    """Pixels of every tile or slice, (3, height, width) each, and of how many a side the tower makes a token; of packed
    ones the mean colours of patches."""
    pixels = inputs["pixel_values"].float()
    if family.startswith("gemma4"):
        places = inputs["image_position_ids"][0]
        across, down = (places.amax(dim=0) + 1).tolist()
        patches = pixels[0, : across * down].unflatten(-1, (-1, 3)).mean(dim=1)
        return [patches.T.unflatten(-1, (down, across))], down // height
    if family == "minicpmv4_6":
        patches, sizes = pixels[0].unflatten(-1, (-1, 4)).mean(dim=(1, 3)), inputs["target_sizes"]
        parts = patches.split(sizes.prod(dim=1).tolist(), dim=1)
        return [part.unflatten(-1, size.tolist()) for part, size in zip(parts, sizes, strict=True)], 4
    tiles = pixels.flatten(0, -4)
    return list(tiles), tiles.shape[-1] // width


def seen_cells(maps, side):
    """Mean colours of the cells of tiles, (n_tokens, 3)."""
    means = [torch.nn.functional.avg_pool2d(one, side) for one in maps]
    return torch.cat([one.flatten(1) for one in means], dim=1).T.numpy()


# Whose processors make as many tokens of any picture, or as its aspect says.
SIZELESS = {"llava", "gemma3", "gemma4", "gemma4_unified", "paligemma", "paligemma2", "deepseek_vl"}
SIZELESS |= {"internvl", "idefics3", "smolvlm"}
WITH_WHOLE = {"llava_next", "llava_onevision"}  # whose tokens are never fewer
TILED = ("llava", "gemma3", "paligemma", "deepseek_vl", "internvl", "idefics3", "smolvlm", "ovis2")
PACKED = ("gemma4", "gemma4_unified", "minicpmv4_6")


@pytest.mark.parametrize("family", TILED + PACKED, indirect=True)
@pytest.mark.parametrize("size", [(168, 112), (84, 168), (280, 84)])
def test_overlays_show_what_the_tower_sees(family, size, tmp_path):
    """Colours of the patches behind each token are those of the picture where the overlay has it."""
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    processor, image = load_processor(save_processor(family, tmp_path)), picture(*size)
    inputs = build_inputs(processor, "what is in the picture", images=[image])
    with apply_sparsevlm(model, keep=0.5, min_keep=1) as state:
        model.generate(**inputs, max_new_tokens=1)
    rows = rows_of(state.report.samples[0], [image], processor=processor)
    first = rows[0]
    cells = seen_cells(*colours(family, inputs, first.height // first.tiles[0], first.width // first.tiles[1]))
    assert len(cells) == state.report.n_visual
    for row in rows:
        seen = np.stack([row.arranged(channel) for channel in cells.T], axis=-1)
        shown = np.asarray(row.image.convert("RGB").resize((row.width, row.height), Image.Resampling.BOX), dtype=float)
        for channel in range(3):
            alike = np.corrcoef(seen[..., channel].ravel(), shown[..., channel].ravel())[0, 1]
            assert alike > 0.97, (row.tiles, channel)


def test_evaluation_takes_any_family(family, checkpoint):
    attention = "eager" if FAMILIES[family].attentions == ("eager",) else "sdpa"
    config = EvalConfig("demo", str(checkpoint), device="cpu", attn=attention)
    generator = BatchGenerator(config, max_new_tokens=2)
    samples = [
        Sample((picture(168, 112),), "what", ("x",), "exact"),
        Sample((picture(84, 84), picture(168, 112, 1)), "what is", ("x",), "exact"),
    ]
    dense = generator.generate(Setting("dense"), samples)
    assert all(answer.n_visual == answer.avg_tokens > 0 for answer in dense)
    smaller = generator.generate(Setting("downsample", 0.5), samples)
    counter = VisualCounter(generator._adapter, generator.processor)
    if family in SIZELESS:
        assert "of a picture of any size" in counter.unsupported_reason()
    else:
        assert counter.unsupported_reason() is None
        assert smaller[0].n_visual < dense[0].n_visual
        assert smaller[0].n_visual <= dense[0].n_visual / 2 or family in WITH_WHOLE
    pruning = SparseVLMConfig(keep=0.6, min_keep=4, target_layers=(1, 3))
    pruned = generator.generate(Setting("span", 0.6, None, pruning), samples)
    assert [answer.n_visual for answer in pruned] == [answer.n_visual for answer in dense]
    assert all(answer.avg_tokens < answer.n_visual for answer in pruned)
