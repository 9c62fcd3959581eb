"""Images that are kept over calls: what is encoded, what is not confused, and what clears them."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import Report, apply_sparsevlm, remove_sparsevlm
from sparsevlm.engine.text import prefill
from sparsevlm.engine.vision.image_cache import ImageCache, PixelDigest
from sparsevlm.engine.vision.program import VisionPrograms
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6, "engine": True}
GREEDY = {"max_new_tokens": 3, "do_sample": False}
ONE = PROMPTS["one image"]
ROW_BYTES = 64 * 4  # of a visual token of the tiny model
IMAGE_BYTES = 24 * ROW_BYTES


@pytest.fixture
def encoded(monkeypatch):
    """Grids of the images that the tower has encoded."""
    seen, call = [], VisionPrograms.__call__

    def counted(self, patches, grids, *rest):
        seen.extend(grids)
        return call(self, patches, grids, *rest)

    monkeypatch.setattr(VisionPrograms, "__call__", counted)
    return seen


def applied(model=None, **options):
    return apply_sparsevlm(model or tiny_model(), **{**OPTIONS, "image_cache": 1 << 20, **options})


def ask(state, inputs, n_cached):
    """The answer, which the cache does not change."""
    model = state.adapter.model
    with state.options(image_cache=0):
        wanted = model.generate(**inputs, **GREEDY)
    found = model.generate(**inputs, **GREEDY)
    assert torch.equal(found, wanted)
    assert (state.report.path, state.report.images_cached) == ("engine", n_cached), state.report.path_reason
    return state.report


def test_what_the_decoder_adds_behind_its_first_layers_is_kept_too(encoded):
    model = tiny_model("qwen3_vl")
    state = applied(model)
    for prompt, n_cached in (("two images", 0), ("two images", 2), ("image and video", 0), ("image and video", 2)):
        before, inputs = len(encoded), make_inputs(*PROMPTS[prompt], family="qwen3_vl", seed=len(prompt))
        with state.options(engine=False, image_cache=0):
            wanted = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        assert (state.report.path, state.report.images_cached) == ("engine", n_cached)
        assert len(encoded) - before == 2 - n_cached


@pytest.mark.parametrize("prompt", ["one image", "two images", "video", "image and video", "batch, unequal counts"])
def test_what_was_encoded_is_not_encoded_again(prompt, encoded):
    state, inputs = applied(), make_inputs(*PROMPTS[prompt])
    model = state.adapter.model
    first = model.generate(**inputs, **GREEDY)
    n = len(encoded)
    assert (state.report.images_cached, n) == (0, sum(kind != "text" for row in PROMPTS[prompt] for kind, *_ in row))
    assert torch.equal(model.generate(**inputs, **GREEDY), first)
    assert (state.report.images_cached, len(encoded)) == (n, n)
    report = state.report
    assert f"kept from earlier calls: {n}" in str(report)
    assert Report.from_dict(report.to_dict()) == report
    old = report.to_dict()
    del old["images_cached"]
    assert Report.from_dict(old).images_cached == 0
    assert torch.equal(ask(state, inputs, n) and model.generate(**inputs, **GREEDY), first)


def test_images_are_not_confused(encoded):
    state, inputs = applied(), make_inputs(*ONE)
    ask(state, inputs, 0)
    for row, column in ((0, 0), (95, 1175), (50, 600)):
        other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        other["pixel_values"][row, column] *= -1
        ask(state, other, 0)
        ask(state, other, 1)
    turned = {**inputs, "image_grid_thw": torch.tensor([[1, 12, 8]])}  # the same pixels, 6 x 4 tokens
    ask(state, turned, 0)
    ask(state, inputs, 1)


def test_an_image_among_others_is_taken_out(encoded):
    state, inputs = applied(), make_inputs(*PROMPTS["two images"])
    second = {**make_inputs([("text", 4), ("image", 3, 6), ("text", 5)])}
    second["pixel_values"] = inputs["pixel_values"][-72:]
    ask(state, second, 0)
    encoded.clear()
    assert state.adapter.model.generate(**inputs, **GREEDY) is not None
    assert (encoded, state.report.images_cached) == ([(1, 4, 4)], 1)
    ask(state, inputs, 2)


def test_an_image_that_comes_twice_in_a_call_is_encoded_once(encoded):
    state, inputs = applied(), make_inputs(*PROMPTS["batch, same size"])
    pixels = inputs["pixel_values"]
    pixels[pixels.shape[0] // 2 :] = pixels[: pixels.shape[0] // 2]
    state.adapter.model.generate(**inputs, **GREEDY)
    assert (len(encoded), state.report.images_cached) == (1, 1)
    ask(state, inputs, 2)


def test_the_bytes_bound_what_is_kept():
    state = applied(image_cache=2 * IMAGE_BYTES)
    model, images = state.adapter.model, [make_inputs(*ONE, seed=seed) for seed in range(3)]
    held = lambda: state._engine._runner.images  # noqa: E731
    for inputs, n in zip(images, (1, 2, 2), strict=True):
        ask(state, inputs, 0)
        assert (len(held()), held().n_bytes) == (n, n * IMAGE_BYTES)
    ask(state, images[1], 1)
    ask(state, images[0], 0)  # used longest ago, and in the place of the third from now on
    ask(state, images[1], 1)
    ask(state, images[2], 0)
    with state.options(image_cache=IMAGE_BYTES - 1):
        model.generate(**images[2], **GREEDY)
        assert (state.report.images_cached, len(held())) == (1, 0)
        model.generate(**images[2], **GREEDY)
        assert (state.report.images_cached, len(held())) == (0, 0)


def written(model, how):
    weight = model.model.visual.blocks[0].attn.proj.weight
    with torch.no_grad():
        if how == "in place":
            weight[1:].mul_(1.5)
        elif how == "past torch's count":
            weight.data += 0.1
        elif how == "replaced":
            weight.data = weight.data * 1.5
        elif how == "dtype":
            model.double()


@pytest.mark.parametrize("how", ["in place", "past torch's count", "replaced", "dtype"])
def test_other_weights_are_other_images(how):
    state, inputs = applied(), make_inputs(*ONE)
    ask(state, inputs, 0)
    ask(state, inputs, 1)
    written(state.adapter.model, how)
    if how == "dtype":
        inputs["pixel_values"] = inputs["pixel_values"].double()
    ask(state, inputs, 0)
    ask(state, inputs, 1)


@pytest.mark.parametrize("what", ["asked for", "memory", "applied again"])
def test_what_clears_them(what, monkeypatch):
    state, inputs = applied(), make_inputs(*ONE)
    ask(state, inputs, 0)
    if what == "asked for":
        state.clear_image_cache()
    elif what == "memory":
        with monkeypatch.context() as patch:
            patch.setattr(prefill.Prefill, "run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
            state.adapter.model.generate(**inputs, **GREEDY)
        assert state._engine._runner.images is None
    else:
        model = state.adapter.model
        remove_sparsevlm(model)
        assert state._engine._runner.images is None
        state = applied(model)
    ask(state, inputs, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vision_keep": 0.5}, "image_cache was not asked"),
        ({"selector": "hiprune", "target_layers": None, "keep": 0.5}, "image_cache was not asked"),
        ({"engine": False}, "image_cache is the engine's"),
    ],
)
def test_where_they_are_not_used_the_report_says_so(options, said):
    state, inputs = applied(**options), make_inputs(*ONE)
    for _ in range(2):
        state.adapter.model.generate(**inputs, **GREEDY)
        assert said in state.report.path_reason
        assert state.report.images_cached == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("sizes", [[1], [5, 3, 5], [64]])
def test_sums_differ_where_pixels_do(sizes, dtype, monkeypatch):
    monkeypatch.setattr("sparsevlm.engine.vision.image_cache._CHUNK_BYTES", 8 * 90 * 7)  # several parts
    digest, patches = PixelDigest(torch.device("cpu")), torch.randn(sum(sizes), 90).mul(30).to(dtype)
    sums = digest.sums(patches, sizes)
    assert sums.shape == (len(sizes), 4)
    for one, image in zip(sums, patches.split(sizes), strict=True):  # alone as among others, and again
        assert torch.equal(digest.sums(image, [len(image)])[0], one)
    for row, column in ((0, 0), (sum(sizes) - 1, 89)):
        for mask in (1, 1 << 7):  # the last bit and the sign
            changed = patches.clone()
            words = changed.view(torch.uint8)
            words[row, (column + 1) * changed.element_size() - 1] ^= mask
            differs = (digest.sums(changed, sizes) != sums).all(dim=1)
            assert differs.tolist() == [bool(i == (0 if row == 0 else len(sizes) - 1)) for i in range(len(sizes))]
    if sizes[0] > 1:
        swapped = patches.clone()
        swapped[:2] = patches[:2].flip(0)
        assert (digest.sums(swapped, sizes)[0] != sums[0]).all()


@pytest.mark.gpu
def test_digests_on_the_gpu_are_those_sums():
    patches = torch.randn(4096, 1176, device="cuda")
    digest = PixelDigest(patches.device)
    found, flag = digest(patches, [1024, 3072], torch.ones((), dtype=torch.bool, device="cuda"))
    on_host = PixelDigest(torch.device("cpu"))
    on_host._of_words, on_host._of_rows = digest._of_words.cpu(), digest._of_rows.cpu()
    wanted = on_host.sums(patches.cpu(), [1024, 3072])
    assert flag
    assert found == [row.numpy().tobytes() for row in wanted]


def test_no_cache_is_made_where_none_is_asked_for(monkeypatch):
    monkeypatch.setattr(ImageCache, "__init__", lambda *_: pytest.fail("made"))
    state, inputs = applied(image_cache=0), make_inputs(*ONE)
    state.adapter.model.generate(**inputs, **GREEDY)
    assert state.report.path == "engine"
