"""What the lmms-eval plugin makes of arguments, generation options and messages; lmms-eval itself is not needed."""

import subprocess
import sys

import pytest
from PIL import Image

from sparsevlm import Report, SparseVLMConfig
from sparsevlm.plugins.lmms_arguments import ModelArguments, parse_arguments
from sparsevlm.plugins.lmms_generation import MAX_NEW_TOKENS, cut_at, generation_options, unused_options
from sparsevlm.plugins.lmms_inputs import nearest_grid, read_conversation, with_n_visual
from sparsevlm.plugins.lmms_totals import RunTotals, dense_total, merged, pruned_total
from sparsevlm.report_sample import SampleReport
from sparsevlm.report_total import Cost


def parsed(**given):
    return parse_arguments({"pretrained": "model", **given})


def test_nothing_of_the_host_loads_early():
    code = (
        "import sparsevlm, sparsevlm.plugins.lmms_eval, sparsevlm.plugins.lmms_arguments, sys; "
        "assert not {'lmms_eval', 'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_the_library_s():
    assert parsed() == ModelArguments(pretrained="model", pruning=SparseVLMConfig())


@pytest.mark.parametrize(
    ("given", "keep"),
    [(0.25, 0.25), ("0.25", 0.25), (64, 64), ("64", 64), ("adaptive", None), (None, None), ("none", None)],
)
def test_budgets(given, keep):
    assert parsed(keep=given).pruning == SparseVLMConfig(keep=keep)


@pytest.mark.parametrize("given", ["dense", 1.0, "1.0"])
def test_a_dense_run_applies_nothing(given):
    assert parsed(keep=given, selector="random", target_layers="2;6").pruning is None


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({"target_layers": "2;6;10"}, {"target_layers": (2, 6, 10)}),
        ({"target_layers": "[2,6]"}, {"target_layers": (2, 6)}),
        ({"target_layers": 3}, {"target_layers": (3,)}),
        ({"target_layers": [1, 2]}, {"target_layers": (1, 2)}),
        ({"target_layers": "none"}, {}),
        ({"schedule": "single", "keep": 0.5}, {"schedule": "single", "keep": 0.5}),
        ({"schedule": "300;200;110"}, {"schedule": (300, 200, 110)}),
        ({"schedule": "0.5;0.3"}, {"schedule": (0.5, 0.3)}),
        ({"schedule": 0.5}, {"schedule": (0.5,)}),
        ({"preset": "paper-128"}, {"preset": "paper-128"}),
        (
            {"recycle": "false", "strict": True, "tau": "0.3", "seed": "7"},
            {"recycle": False, "strict": True, "tau": 0.3, "seed": 7},
        ),
        ({"selector": "grid", "raters": "embedding", "merge": "sum", "min_keep": 8, "n_vis": 256, "heads": "visual"},)
        * 2,
        ({"rank_tolerance": "machine", "rank_lambda": 1}, {"rank_tolerance": "machine", "rank_lambda": 1}),
    ],
    ids=",".join,
)
def test_options_of_the_pruning(given, config):
    assert parsed(**given).pruning == SparseVLMConfig(**config)


@pytest.mark.parametrize(("keep", "budget"), [(64, 64), ("0.25", 0.25), ("dense", None), (1.0, None)], ids=str)
def test_smaller_images_prune_nothing(keep, budget):
    found = parsed(selector="downsample", keep=keep)
    assert (found.pruning, found.downsample) == (None, budget)


def test_options_of_the_model():
    found = parsed(device="cpu", dtype="float32", batch_size="4", n_visual=256, max_num_frames="8", system_prompt="Hi")
    assert (found.device, found.dtype, found.batch_size, found.n_visual) == ("cpu", "float32", 4, 256)
    assert (found.max_num_frames, found.system_prompt) == (8, "Hi")
    assert (parsed(min_pixels="3136").min_pixels, parsed(max_pixels=802816).max_pixels) == (3136, 802816)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"kepe": 0.5}, TypeError, r"unknown model argument kepe\. Did you mean keep\?.*n_visual.*target_layers"),
        ({"device_map": "auto"}, TypeError, "unknown model argument device_map"),
        ({"pretrained": None}, ValueError, "pretrained is missing"),
        ({"keep": 1}, ValueError, r"keep=1\.0 or keep=dense"),
        ({"keep": "half"}, ValueError, "fraction .* adaptive or dense, got 'half'"),
        ({"keep": True}, ValueError, "got True"),
        ({"keep": "0.5;0.25"}, ValueError, "got '0.5;0.25'"),
        ({"keep": [0.5, 0.25]}, ValueError, "got .0.5"),
        ({"keep": 2.0}, ValueError, "for a number of tokens pass an int"),
        ({"keep": "dense", "preset": "paper-64"}, ValueError, "is itself a budget"),
        ({"preset": "paper-96"}, ValueError, "paper-192"),
        ({"target_layers": "2;x"}, TypeError, "target_layers must be a whole number, got 'x'"),
        ({"recycle": 1}, TypeError, "recycle must be True or False"),
        ({"batch_size": "auto"}, ValueError, "got 'auto'; there is no automatic batch size"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1"),
        ({"selector": "downsample"}, ValueError, "selector=downsample wants keep="),
        ({"selector": "downsample", "keep": "adaptive"}, ValueError, "selector=downsample wants keep="),
        ({"selector": "downsample", "keep": 2.0}, ValueError, "for a number of tokens pass an int"),
        ({"selector": "downsample", "keep": 64, "tau": 0.3}, ValueError, "prunes nothing, so that tau would have no"),
        ({"n_visual": 25.6}, ValueError, "n_visual must be a whole number"),
        ({"n_visual": 256, "max_pixels": 1000}, ValueError, "leave min_pixels and max_pixels out"),
        ({"min_pixels": 2000, "max_pixels": 1000}, ValueError, "min_pixels=2000 is more than max_pixels=1000"),
    ],
    ids=str,
)
def test_what_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        parsed(**given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 3},
            {"max_new_tokens": 16, "num_beams": 3},
        ),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False, "temperature": None}),
        ({"do_sample": True}, {"do_sample": True}),
    ],
    ids=str,
)
def test_generation_options(given, expected):
    options, _ = generation_options(given)
    assert {name: options[name] for name in expected} == expected
    assert ("temperature" in options) == (not options["do_sample"] or "temperature" in given)


def test_stop_texts():
    assert generation_options({"until": "ASSISTANT:"})[1] == ("ASSISTANT:",)
    assert generation_options({"until": ["\n\n", "", "A", "B"]})[1] == ("A", "B")
    assert cut_at("1 B 2 A 3", ("A", "B")) == "1 "
    with pytest.raises(ValueError, match="until must be a text or a list of texts, got 5"):
        generation_options({"until": 5})


def test_options_without_effect_are_found():
    assert unused_options({"image_aspect_ratio": "pad", "temperature": 0}) == ["image_aspect_ratio"]
    assert unused_options({"temperature": 0.5, "do_sample": False}) == ["temperature"]
    assert unused_options({"temperature": 0.5}) == []


@pytest.mark.parametrize(
    ("size", "n_visual", "grid"),
    [
        ((500, 500), 256, (16, 16)),
        ((640, 480), 256, (18, 14)),
        ((480, 640), 256, (14, 18)),
        ((1920, 1080), 256, (21, 12)),
        ((3000, 100), 256, (87, 3)),
        ((100, 9000), 16, (1, 16)),
        ((3, 5), 1, (1, 1)),
    ],
)
def test_the_grid_nearest_to_a_number_of_tokens(size, n_visual, grid):
    assert nearest_grid(*size, n_visual) == grid
    assert with_n_visual(Image.new("RGB", size), n_visual, 28).size == (28 * grid[0], 28 * grid[1])


def test_messages_of_every_kind(tmp_path):
    picture = Image.new("RGBA", (60, 40), "red")
    picture.save(tmp_path / "a.png")
    content = [
        {"type": "image", "url": picture},
        {"type": "text", "text": "one"},
        {"type": "image", "url": str(tmp_path / "a.png")},
        {"type": "video", "url": [picture, picture, picture]},
        {"type": "video", "url": str(tmp_path)},
    ]
    found = read_conversation([{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}], 8)
    assert found.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part["type"] for part in found.messages[1]["content"]] == ["image", "text", "image", "video", "video"]
    assert [image.mode for image in found.images] == ["RGB", "RGB"]
    assert [(len(clip.frames), clip.n_total, clip.fps) for clip in found.clips] == [(3, 3, 2.0), (1, 1, 2.0)]


def test_deep_greys_are_scaled():
    deep = Image.new("I;16", (4, 4), 128 * 257)
    content = [{"type": "image", "url": deep}, {"type": "video", "url": [deep]}]
    found = read_conversation([{"role": "user", "content": content}], 8)
    assert [image.getpixel((0, 0)) for image in (*found.images, *found.clips[0].frames)] == [(128, 128, 128)] * 2


def test_black_ink_on_a_transparent_ground_and_addresses(tmp_path):
    layer = Image.new("RGBA", (224, 224), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (80, 80, 160, 160))
    layer.save(tmp_path / "ink.png")
    content = [
        {"type": "image", "url": layer},
        {"type": "image", "url": (tmp_path / "ink.png").as_uri()},
        {"type": "video", "url": [layer]},
        {"type": "video", "url": tmp_path.as_uri()},
    ]
    found = read_conversation([{"role": "user", "content": content}], 8)
    for image in (*found.images, *(frame for clip in found.clips for frame in clip.frames)):
        assert sorted(image.getcolors()) == [(80 * 80, (0, 0, 0)), (224 * 224 - 80 * 80, (255, 255, 255))]


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ({"type": "video", "url": "https://example.org/a.mp4"}, ValueError, "only local files"),
        ({"type": "audio", "url": "a.wav"}, NotImplementedError, "got a part of type 'audio'"),
        ({"type": "image", "url": None}, TypeError, "got NoneType"),
        ({"type": "image", "url": "https://example.org/a.png"}, ValueError, "only local files"),
        ({"type": "image", "url": "missing.png"}, FileNotFoundError, "missing.png does not exist"),
        ({"type": "video", "url": "missing.mp4"}, FileNotFoundError, "missing.mp4 does not exist"),
        ({"type": "video", "url": {"url": "a.mp4", "video_start": 1}}, NotImplementedError, "cut the clip out"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, NotImplementedError, "cut the clip out"),
        ({"type": "video", "url": []}, TypeError, "got list"),
    ],
    ids=str,
)
def test_content_that_is_refused(part, error, words):
    with pytest.raises(error, match=words):
        read_conversation([{"role": "user", "content": [part]}], 8)


def sample(n_visual, *layer_tokens, clamped=None):
    return SampleReport(n_visual, 5, layer_tokens, layer_tokens[-1], budget_clamped=clamped)


def report(*samples):
    return Report("m", "s", "plain", "", None, samples, Cost(10.0, 5.0), Cost(1.0, 1.0))


def test_totals_of_two_processes_and_two_tasks():
    first, second = RunTotals(seconds=2.0, new_tokens=7), RunTotals(seconds=3.0, new_tokens=1)
    first.add("a", pruned_total(report(sample(100, 100, 20), sample(50, 50, 50)), [True, True]))
    second.add("a", pruned_total(report(sample(100, 100, 40, clamped="too few")), [True]))
    second.add("b", pruned_total(report(sample(10, 10, 10)), [True]))
    whole = merged([first, second])
    assert (whole.seconds, whole.new_tokens, whole.clamped()) == (3.0, 8, (1, 3))
    figures = whole.figures()
    assert figures["kept_tokens_layer_input/a"] == pytest.approx((60 + 50 + 70) / 3)
    assert figures["visual_tokens/b"] == figures["kept_tokens_layer_output/b"] == 10
    assert figures["visual_tokens"] == 65
    assert figures["prefill_flops_ratio"] == 0.5
    assert set(RunTotals(tasks={"a": whole.tasks["a"]}).figures()) == {
        "visual_tokens",
        "kept_tokens_layer_input",
        "kept_tokens_layer_output",
        "prefill_flops_ratio",
    }


def test_totals_count_a_request_once():
    """Beams repeat a request in the report; lmms-eval repeats one to fill up a process; some have no picture."""
    total = pruned_total(
        report(*[sample(8, 8, 4)] * 2, *[sample(0, 0, 0)] * 2, *[sample(6, 6, 6)] * 2), [True, True, False]
    )
    assert (total.n_samples, total.n_visual_sum, total.average_in) == (1, 8, 6)
    total = dense_total([8, 0, 6], [True, True, False])
    assert (total.n_samples, total.n_visual_sum, total.average_in, total.average_out) == (1, 8, 8, 8)
    assert total.flops.ratio == 1
    assert RunTotals().figures() == {}
    text_only = RunTotals()
    text_only.add("text", dense_total([0], [True]))
    assert text_only.figures() == {}
