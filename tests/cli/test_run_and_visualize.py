"""The command line on a randomly initialised Qwen2.5-VL of its own shape, with its own tokenizer, and a photograph."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from typer.testing import CliRunner

import sparsevlm.inputs
from sparsevlm import Report, apply_sparsevlm
from sparsevlm.cli import app
from sparsevlm.cli.asking import build_inputs
from sparsevlm.cli.terminal import reports_errors
from sparsevlm.cli.visuals import read_visuals
from sparsevlm.inputs import load_image, load_model, load_processor
from tiny_checkpoint import save_tiny_checkpoint

PROMPT = "What is in the picture?"
BUDGET = ["--keep", "0.45", "--min-keep", "8", "--max-new-tokens", "6", "--device", "cpu"]


def photograph(width, height, seed=5):
    """A landscape with haze, blur and sensor noise."""
    rows = np.arange(height)[:, None, None] / height
    sky = np.array([120, 160, 220]) + np.array([60, 40, -20]) * rows
    image = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    ridge = [(0, 0.8), (0.27, 0.4), (0.55, 0.8), (0.75, 0.47), (1, 0.8), (1, 1), (0, 1)]
    draw.polygon([(x * width, y * height) for x, y in ridge], fill=(60, 80, 60))
    draw.ellipse([0.77 * width, 0.1 * height, 0.88 * width, 0.27 * height], fill=(255, 230, 120))
    draw.rectangle([0.36 * width, 0.69 * height, 0.52 * width, 0.9 * height], fill=(170, 60, 40))
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5))) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a checkpoint, photographs, a video, and things that are none of these."""
    desk = tmp_path_factory.mktemp("desk")
    save_tiny_checkpoint(desk / "model")
    photograph(560, 364).save(desk / "photo.jpg", quality=88)
    photograph(200, 300, 6).save(desk / "portrait.jpg", quality=88)
    (desk / "video").mkdir()
    for number in range(5):
        photograph(224, 168, number).save(desk / "video" / f"frame_{number}.jpg")
    frames = [photograph(224, 168, number) for number in range(5)]
    frames[0].save(desk / "pages.tif", save_all=True, append_images=frames[1:])
    (desk / "video" / "._frame_0.jpg").write_bytes(b"\x00\x05\x16\x07 metadata of macOS")
    Image.new("RGB", (603, 3)).save(desk / "strip.png")
    photograph(56, 56).save(desk / "own.png")
    photograph(56, 56).save(desk / "a.eps")
    (desk / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (desk / "a.pdf").write_bytes(b"%PDF-1.7\n%\xe2\xe3")
    (desk / "a.heic").write_bytes(b"\x00\x00\x00\x20ftypheic\x00\x00\x00\x00mif1heic")
    (desk / "nothing.jpg").write_bytes(b"")
    (desk / "link.jpg").symlink_to("gone.jpg")
    os.mkfifo(desk / "pipe.jpg")
    (desk / "empty").mkdir()
    (desk / "text.jpg").write_text("no picture")
    (desk / "text.json").write_text("no json")
    (desk / "other.json").write_text('{"version": 99}')
    (desk / "llama").mkdir()
    (desk / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return desk


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_on(desk, *arguments, model="model"):
    return call("run", "--model", desk / model, "--prompt", PROMPT, *arguments)


@pytest.fixture(scope="module")
def saved(desk):
    """One request with everything it can write."""
    out = desk / "out"
    result = run_on(
        desk,
        "--image",
        desk / "photo.jpg",
        *BUDGET,
        "--compare",
        "--report",
        out / "r.json",
        "--picture",
        out / "r.png",
    )
    assert result.exit_code == 0, result.stderr
    return result, Report.from_json(out / "r.json"), out


def test_run_prints_both_answers_and_the_report(saved):
    result, report, out = saved
    assert "dense (" in result.stdout
    assert "pruned (" in result.stdout
    assert str(report) in result.stdout
    assert f"wrote {out / 'r.json'}" in result.stdout
    assert "not meaningful" not in result.stderr


def test_run_is_what_the_library_does(saved, desk):
    result, _, _ = saved
    model, processor = load_model(desk / "model", device="cpu"), load_processor(desk / "model")
    inputs = build_inputs(processor, PROMPT, images=[load_image(desk / "photo.jpg")])

    def answer():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()

    dense = answer()
    with apply_sparsevlm(model, keep=0.45, min_keep=8, processor=processor):
        pruned = answer()
    lines = [line.partition(": ") for line in result.stdout.splitlines()]
    said = {name.partition(" ")[0]: text for name, _, text in lines}
    assert (said["dense"], said["pruned"]) == (dense, pruned)


def test_report_of_run(saved):
    _, report, _ = saved
    (sample,) = report.samples
    assert sample.grids == ((1, 7, 12),)
    assert sample.n_visual == 84
    assert report.average_in <= 0.45 * 84 + 1
    assert report.kv_bytes.sparse < report.kv_bytes.dense
    (stage,) = sample.stages
    assert (stage.layer, stage.n_in) == (-1, 84)
    assert len(stage.kept) == stage.n_kept
    assert sorted(set(stage.kept)) == list(stage.kept)
    assert stage.n_kept + stage.n_recycled == sample.final_tokens


def test_overlay_of_run_shows_what_the_report_says(saved, desk):
    _, report, out = saved
    picture = np.asarray(Image.open(out / "r.png").convert("RGB")).astype(int)
    assert picture.shape[1] > 500
    # In the right panel, dropped cells are dark and grey; the photograph has no such colours.
    panel = picture[:, picture.shape[1] // 2 :]
    dark = (panel.max(axis=2) < 95) & (np.ptp(panel, axis=2) < 20)
    (stage,) = report.samples[0].stages
    dropped = 84 - stage.n_kept - stage.n_recycled
    cells = dark.sum() / (dark.shape[1] / 12) ** 2
    assert cells == pytest.approx(dropped, rel=0.2)


def test_visualize_draws_the_same_picture(saved, desk):
    result, _, out = saved
    answers = [
        line.split(": ", 1)[1] for line in result.stdout.splitlines() if line.startswith(("dense (", "pruned ("))
    ]
    title = f"{PROMPT}\ndense: {answers[0]}\npruned: {answers[1]}"
    arguments = ["--image", desk / "photo.jpg", "--out", out / "new" / "v.png", "--title", title]
    drawn = call("visualize", out / "r.json", *arguments)
    assert drawn.exit_code == 0, drawn.stderr
    assert (out / "new" / "v.png").read_bytes() == (out / "r.png").read_bytes()


def test_visualize_refuses_another_picture(saved, desk, tmp_path):
    """Of the same size: the report knows the picture."""
    _, report, out = saved
    assert [picture[:2] for picture in report.samples[0].pictures] == [Image.open(desk / "photo.jpg").size]
    Image.open(desk / "photo.jpg").rotate(180).save(tmp_path / "other.png")
    refused = call("visualize", out / "r.json", "--image", tmp_path / "other.png", "--out", tmp_path / "v.png")
    assert refused.exit_code == 2
    assert "is not the one that the report was made with" in refused.stderr
    assert not (tmp_path / "v.png").exists()


def test_visualize_warns_where_a_report_does_not_know_its_pictures(saved, desk, tmp_path):
    """As of one that Python has written; the warning's own words record it."""
    _, report, _ = saved
    unknown = Report(**{**vars(report), "samples": (dataclasses.replace(report.samples[0], pictures=()),)})
    unknown.to_json(tmp_path / "r.json")
    place = ["--image", desk / "photo.jpg", "--out", tmp_path / "v.png"]
    told = call("visualize", tmp_path / "r.json", *place)
    assert told.exit_code == 0
    (line,) = [line for line in told.stderr.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: {tmp_path / 'r.json'} does not say of which pictures it is")
    (code,) = re.findall(r"report\.of_pictures.*\(path\)", line)
    names = {"report": unknown, "sparsevlm": sparsevlm, "image": load_image(desk / "photo.jpg")}
    exec(code, {**names, "path": tmp_path / "r.json"})
    assert "warning" not in call("visualize", tmp_path / "r.json", *place).stderr
    refused = call("visualize", tmp_path / "r.json", "--image", desk / "strip.png", *place[2:])
    assert refused.exit_code == 2


def test_several_images(desk, tmp_path):
    images = ["--image", desk / "photo.jpg", "--image", desk / "portrait.jpg"]
    result = run_on(desk, *images, *BUDGET, "--report", tmp_path / "r.json", "--picture", tmp_path / "r.png")
    assert result.exit_code == 0, result.stderr
    assert Report.from_json(tmp_path / "r.json").samples[0].grids == ((1, 7, 12), (1, 11, 7))
    swapped = [*images[2:], *images[:2]]
    refused = call("visualize", tmp_path / "r.json", *swapped, "--out", tmp_path / "v.png")
    assert refused.exit_code == 2
    assert "visual 1 (200x300 pixels) does not fit" in refused.stderr


def test_video(desk, tmp_path):
    video = ["--video", desk / "video"]
    result = run_on(desk, *video, *BUDGET, "--report", tmp_path / "r.json", "--picture", tmp_path / "r.png")
    assert result.exit_code == 0, result.stderr
    assert Report.from_json(tmp_path / "r.json").samples[0].grids == ((3, 6, 8),)
    assert call("visualize", tmp_path / "r.json", *video, "--out", tmp_path / "v.png").exit_code == 0


def test_a_file_with_several_frames(desk, tmp_path):
    """As a video it is what a folder of its frames is, and each of its frames is what a file of it is."""
    for source in ("pages.tif", "video", (desk / "video").as_uri()):
        result = run_on(
            desk, "--video", desk / source if "://" not in source else source, *BUDGET, "--report", tmp_path / "r.json"
        )
        assert result.exit_code == 0, result.stderr
        assert Report.from_json(tmp_path / "r.json").samples[0].grids == ((3, 6, 8),)
    one = run_on(desk, "--image", desk / "pages.tif", "--frame", 3, *BUDGET, "--picture", tmp_path / "one.png")
    photograph(224, 168, 3).save(tmp_path / "3.png")
    other = run_on(desk, "--image", tmp_path / "3.png", *BUDGET, "--picture", tmp_path / "other.png")
    assert one.exit_code == other.exit_code == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_the_first_of_several_frames_is_said(desk):
    with pytest.warns(
        UserWarning, match=r"^sparsevlm: .*pages\.tif has 5 frames or pages, and the first is read.* --frame"
    ):
        assert len(read_visuals([str(desk / "pages.tif")], None, None)[0]) == 1


def test_black_ink_on_a_transparent_ground(tmp_path):
    layer = Image.new("RGBA", (224, 224), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (80, 80, 160, 160))
    layer.save(tmp_path / "ink.png")
    layer.save(tmp_path / "ink.webp", lossless=True)
    (tmp_path / "video").mkdir()
    layer.save(tmp_path / "video" / "0.png")
    images, _ = read_visuals([str(tmp_path / "ink.png"), str(tmp_path / "ink.webp")], None, None)
    _, frames = read_visuals(None, str(tmp_path / "video"), None)
    for image in (*images, *frames):
        assert np.unique(np.asarray(image)).tolist() == [0, 255]


def test_adaptive(desk, monkeypatch):
    monkeypatch.setattr("sparsevlm.cli.busy.busy_advice", lambda threads, *_: f"{threads} thread waits")
    result = run_on(
        desk, "--image", desk / "photo.jpg", "--max-new-tokens", "2", "--attn", "eager", "--dtype", "bfloat16"
    )
    assert result.exit_code == 0, result.stderr
    assert f"model {desk / 'model'}, device cpu, dtype bfloat16" in result.stdout
    assert "warning: 1 thread waits" in result.stderr


def test_preset(desk, tmp_path):
    deep = save_tiny_checkpoint(tmp_path / "deep", n_layers=17)
    preset = ["--preset", "paper-64", "--max-new-tokens", "2", "--report", tmp_path / "r.json"]
    result = run_on(desk, "--image", desk / "photo.jpg", *preset, model=deep)
    assert result.exit_code == 0, result.stderr
    stages = Report.from_json(tmp_path / "r.json").samples[0].stages
    assert [stage.layer for stage in stages] == [2, 6, 15]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --image FILE"),
        (["--image", "photo.jpg", "--video", "video"], "give either --image FILE"),
        (["--image", "missing.jpg"], "missing.jpg does not exist"),
        (["--image", "text.jpg"], "is not an image"),
        (["--image", "video"], "is a folder, not a picture"),
        (["--video", "empty"], "holds no pictures"),
        (["--video", "missing"], "does not exist"),
        (["--image", "photo.jpg", "--keep", "0.01", "--selector", "span"], "Feasible"),
        (["--image", "photo.jpg", "--keep", "1.5"], "must be in (0, 1]"),
        (["--image", "photo.jpg", "--keep", "-3"], "must be at least 1"),
        (["--image", "photo.jpg", "--keep", "half"], "got 'half'"),
        (["--image", "photo.jpg", "--target-layers", "2,99"], "[99] are out of range"),
        (["--image", "photo.jpg", "--target-layers", "2,2"], "holds a layer twice"),
        (["--image", "photo.jpg", "--target-layers", "two"], "must be layer numbers"),
        (["--image", "photo.jpg", "--tau", "2"], "tau must be in [0, 1]"),
        (["--image", "photo.jpg", "--preset", "paper-1"], "preset must be one of"),
        (["--image", "photo.jpg", "--turns", "last"], "turns must be one of 'first', 'refresh', 'agnostic'"),
        (["--image", "photo.jpg", "--turns", "agnostic", "--selector", "fastv", "--keep", "0.5"], "'fastv' reads"),
        (["--image", "photo.jpg", "--preset", "paper-64"], "[6, 15] are out of range"),
        (["--image", "photo.jpg", "--selector", "best"], "there is no selector 'best'"),
        (["--image", "photo.jpg", "--dtype", "int4"], "dtype must be one of"),
        (["--image", "photo.jpg", "--device", "toaster"], "unknown device"),
        (["--image", "photo.jpg", "--device", "mps"], "torch cannot use the device 'mps'"),
        (["--image", "photo.jpg", "--device", "cuda:99"], "device cuda:99 was asked for, but torch finds"),
        (["--image", "photo.jpg", "--attn", "flash_attention_2", "--device", "cpu"], "(--attn) needs a GPU"),
        (
            ["--image", "photo.jpg", "--attn", "flash"],
            "attn_implementation 'flash' (--attn) does not exist; use one of sdpa",
        ),
        (["--image", "https://example.org/a.png"], "https://example.org/a.png is on the network; download it"),
        (["--video", "https://example.org/a.mp4"], "https://example.org/a.mp4 is on the network; download it"),
        (["--image", "strip.png"], "strip.png has 603x3 pixels, and the model takes sides of up to 200 to 1; crop it"),
        (["--image", "a.eps"], "a.eps is an EPS drawing, which is not decoded here; save it as PNG"),
        (["--image", "a.svg"], "a.svg is not an image that Pillow can read: it is an SVG drawing; save it as PNG"),
        (
            ["--image", "a.pdf"],
            "a.pdf is not an image that Pillow can read: it is a PDF document; save the page as PNG",
        ),
        (["--image", "a.heic"], "a.heic is not an image that Pillow can read: it is a HEIC image; save it as JPEG"),
        (["--image", "nothing.jpg"], "nothing.jpg is not an image that Pillow can read: it is empty"),
        (["--image", "text.jpg"], "text.jpg is not an image that Pillow can read: it is a text file"),
        (
            ["--image", "gone.jpg"],
            "gone.jpg does not exist; check the path, which starts at the working directory, or give an image file",
        ),
        (["--image", "link.jpg"], "link.jpg is a symbolic link to gone.jpg, which does not exist; mend the link"),
        (["--image", "pipe.jpg"], "pipe.jpg is a named pipe, not a picture"),
        (["--video", "photo.jpg"], "photo.jpg is a file with one image; give a folder with one image per frame, or an"),
        (["--image", "pages.tif", "--frame", "5"], "pages.tif has 5 frames, numbered from 0; there is no frame 5"),
        (["--image", "photo.jpg", "--frame", "1"], "photo.jpg has one frame, number 0; there is no frame 1"),
        (["--video", "pages.tif", "--frame", "1"], "--frame picks a frame of an --image file"),
        (["--image", "own.png", "--picture", "own.png"], "--picture own.png would overwrite what is read, own.png"),
        (["--video", "video", "--picture", "video/new.png"], "would overwrite what is read, video"),
        (
            ["--image", "file:own.png", "--picture", "own.png"],
            "--picture own.png would overwrite what is read, own.png",
        ),
        (["--image", "photo.jpg", "--report", "out.txt"], "must end in .json"),
        (["--image", "photo.jpg", "--picture", "text.jpg/out.png"], "a file is in its place"),
    ],
)
def test_mistakes_in_run(desk, monkeypatch, arguments, message):
    monkeypatch.chdir(desk)
    assert_one_line(run_on(desk, *arguments), message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing", "neither a folder nor a hub id"),
        ("video", "no config.json"),
        ("photo.jpg", "is a file"),
        ("llama", "'llama'; supported are qwen2_vl, qwen2_5_vl"),
    ],
)
def test_mistakes_in_the_model(desk, model, message):
    assert_one_line(run_on(desk, "--image", desk / "photo.jpg", model=model), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json", "--image", "photo.jpg"], "missing.json does not exist"),
        (
            ["video", "--image", "photo.jpg"],
            "report video is a folder, not a report; give the JSON file that --report wrote",
        ),
        (["text.json", "--image", "photo.jpg"], "is not a JSON file"),
        (["other.json", "--image", "photo.jpg"], "not a sparsevlm report"),
        (["out/r.json"], "give the pictures"),
        (["out/r.json", "--image", "portrait.jpg"], "does not fit the report"),
        (["out/r.json", "--image", "photo.jpg", "--image", "photo.jpg"], "1 images or videos, but 2"),
        (["out/r.json", "--image", "photo.jpg", "--sample", "3"], "no sample 3"),
        (["out/r.json", "--image", "https://example.org/a.png"], "is on the network; download it"),
        (["out/r.json", "--image", "pages.tif", "--frame", "5"], "there is no frame 5"),
        (["out/r.json", "--image", "own.png", "--out", "own.png"], "--out own.png would overwrite what is read"),
    ],
)
def test_mistakes_in_visualize(saved, desk, monkeypatch, arguments, message):
    monkeypatch.chdir(desk)
    assert_one_line(call("visualize", *(["--out", "v.png"] if "--out" not in arguments else []), *arguments), message)


def test_places_where_nothing_may_be_written(desk, monkeypatch):
    """As for another user than root, who may write everywhere."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert_one_line(
        run_on(desk, "--image", "photo.jpg", "--report", "out/x.json"), "cannot write to folder out: permission"
    )

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(desk), "mkdir", read_only)
    assert_one_line(
        run_on(desk, "--image", "photo.jpg", "--report", "new/x.json"),
        "cannot make folder new: Read-only file system; name another",
    )
    monkeypatch.setattr(type(desk), "mkdir", refuse)
    assert_one_line(
        run_on(desk, "--image", "photo.jpg", "--report", "new/x.json"), "cannot make folder new: permission"
    )


def test_a_reader_that_has_gone_is_no_error(capsys):
    """As ``head`` has, once it has its lines: click ends the command without a word."""

    @reports_errors
    def command(debug):
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        command()
    assert capsys.readouterr().err == ""


def assert_one_line(result, message):
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], "nothing comes after it"
    assert message in errors[0]
    assert "Traceback" not in result.output


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_debug_shows_the_traceback(desk):
    arguments = ["run", "--model", desk / "missing", "--image", desk / "photo.jpg", "--prompt", "x"]
    short, long = call(*arguments), call(*arguments, "--debug")
    assert short.exit_code == 2
    assert "Traceback" not in short.output
    assert long.exit_code != 0
    assert isinstance(long.exception, FileNotFoundError), "which Python shows"


def test_help_and_version_load_no_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from sparsevlm.cli import app\n"
        "outputs = [CliRunner().invoke(app, words.split()).output for words in ('--help', 'run --help', '--version')]\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "print(outputs, heavy)\n"
        "sys.exit(bool(heavy) or 'visualize' not in outputs[0] or '--compare' not in outputs[1])\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_json_of_a_report_is_what_visualize_reads(saved):
    _, report, out = saved
    assert json.loads((out / "r.json").read_text())["n_visual"] == report.n_visual
