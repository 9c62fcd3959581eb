"""Overlay pictures: states, shading, which image belongs to which grid, and lawful odd reports."""

import dataclasses
import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from sparsevlm.inputs import identified
from sparsevlm.report import Report
from sparsevlm.report_sample import SampleReport, StageReport
from sparsevlm.report_total import Cost
from sparsevlm.visualization import Row, draw_report, draw_rows, heading, save_picture
from sparsevlm.visualization.overlay import DROPPED, KEPT, RECYCLED, shade, token_states
from sparsevlm.visualization.page import Page, Panel


def stage(layer, n_in, kept=(), recycled=(), skipped=None):
    n_kept = n_in if skipped else len(kept)
    return StageReport(layer, n_in, n_kept, len(recycled), kept=kept, recycled=recycled, skipped_because=skipped)


def sample_of(grids, stages, n_layers=8):
    n_visual = sum(t * h * w for t, h, w in grids)
    return SampleReport(n_visual, 12, (n_visual,) * n_layers, n_visual, grids=grids, stages=stages)


def report_of(*samples, skipped=None):
    return Report("Model", "sparsevlm", "plain", "hooks", skipped, samples, Cost(2, 1), Cost(2, 1))


def plain(width, height, colour=(200, 100, 50)):
    return Image.new("RGB", (width, height), colour)


def texts(figure):
    return [text.get_text() for text in figure.texts]


def halved(n_visual, layer=2):
    return stage(layer, n_visual, kept=tuple(range(n_visual // 2)), recycled=(n_visual // 2,))


def test_states_follow_the_stages_and_skipped_ones_keep_the_last():
    stages = (stage(2, 6, (0, 1, 4), (5,)), stage(4, 4, skipped="rank"), stage(6, 4, (1,), ()))
    states = token_states(sample_of(((1, 2, 3),), stages))
    first = [KEPT, KEPT, DROPPED, DROPPED, KEPT, RECYCLED]
    assert [list(one) for one in states] == [first, first, [DROPPED, KEPT, *[DROPPED] * 4]]


def test_shading_keeps_tints_and_darkens():
    states = np.array([[KEPT, KEPT], [RECYCLED, DROPPED]], dtype=np.uint8)
    painted = shade(plain(56, 56), states)
    side = painted.shape[0] // 2
    middle = side // 2
    assert painted.shape == (2 * side, 2 * side, 3)
    assert tuple(painted[middle, middle]) == (200, 100, 50)
    assert tuple(painted[middle + side, middle]) == (222, 129, 30)
    dropped = painted[middle + side, middle + side].astype(int)
    assert dropped.max() < 80
    assert np.ptp(dropped) < 15


def test_everything_kept_is_the_image_itself():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 480, 3), dtype=np.uint8))
    painted = shade(noise, np.full((4, 4), KEPT, dtype=np.uint8))
    assert np.array_equal(painted, np.asarray(noise))


def test_one_panel_per_change_with_counts():
    sample = sample_of(
        ((1, 4, 6),), (halved(24), stage(6, 13, skipped="at most min_keep=32 tokens"), stage(7, 13, (0,)))
    )
    figure = draw_report(report_of(sample), [plain(168, 112)], title="How many?\ndense: 3")
    assert len(figure.axes) == 3
    written = "\n".join(texts(figure))
    for expected in ("How many?", "dense: 3", "original", "24 visual tokens", "layer 2", "12 kept, 1 recycled of 24"):
        assert expected in written
    assert "of 24; layer 6 unchanged: at most min_keep=32 tokens" in written.replace("\n", " ")
    assert "1 kept of 24" in written


def test_a_stage_before_the_decoder_comes_first():
    sample = sample_of(((1, 2, 3),), (stage(-1, 6, (0, 1, 4, 5)), stage(2, 4, (1, 4)), stage(6, 2, skipped="few")))
    figure = draw_report(report_of(sample), [plain(84, 56)])
    written = [text for text in texts(figure) if text.startswith(("before", "layer", "original"))]
    assert written == ["original", "before the decoder", "layer 2"]
    assert any(text.endswith("; layer 6 unchanged: few") for text in texts(figure))
    first, second, third = token_states(sample)
    assert list(first) == [KEPT, KEPT, DROPPED, DROPPED, KEPT, KEPT]
    assert list(second) == list(third) == [DROPPED, KEPT, DROPPED, DROPPED, KEPT, DROPPED]


def test_pixels_of_a_panel_show_the_right_tokens():
    sample = sample_of(((1, 2, 3),), (stage(2, 6, (2,)),))
    figure = draw_report(report_of(sample), [plain(84, 56)])
    pixels = figure.axes[1].images[0].get_array()
    cell = pixels.shape[0] // 2
    bright = [[pixels[r * cell + cell // 2, c * cell + cell // 2].max() > 150 for c in range(3)] for r in range(2)]
    assert bright == [[False, False, True], [False, False, False]]


def test_several_images_take_their_own_tokens():
    sample = sample_of(((1, 2, 2), (1, 4, 2)), (stage(2, 12, (4, 5, 6)),))
    figure = draw_report(report_of(sample), [plain(56, 56), plain(56, 112)])
    written = texts(figure)
    assert "image 1" in written
    assert "image 2" in written
    assert "0 kept of 4" in written
    assert "3 kept of 8" in written


def test_video_shows_a_spread_of_frames():
    frames = [plain(84, 56, (shade_of, 0, 0)) for shade_of in range(0, 170, 10)]
    sample = sample_of(((9, 2, 3),), (halved(54),))
    figure = draw_report(report_of(sample), [frames], max_frames=4)
    assert [text for text in texts(figure) if text.startswith("frame")] == [
        "frame 1",
        "frame 7",
        "frame 11",
        "frame 17",
    ]
    assert len(figure.axes) == 8
    assert figure.axes[2].images[0].get_array()[20, 20, 0] == 60


def test_transparency_is_white():
    clear = Image.new("RGBA", (168, 112), (0, 0, 0, 0))
    figure = draw_report(report_of(sample_of(((1, 4, 6),), (halved(24),))), [clear])
    assert figure.axes[0].images[0].get_array()[10, 10].tolist() == [255, 255, 255]


def test_second_sample():
    report = report_of(sample_of(((1, 2, 2),), (halved(4),)), sample_of(((1, 3, 2),), (halved(6),)))
    assert "3 kept, 1 recycled of 6" in texts(draw_report(report, [plain(56, 84)], sample=1))
    with pytest.raises(IndexError, match="2 samples"):
        draw_report(report, [plain(56, 84)], sample=2)


def test_a_request_left_dense_is_drawn_with_its_reason():
    report = report_of(sample_of(((1, 2, 2),), ()), skipped="no budget was set")
    figure = draw_report(report, [plain(56, 56)])
    assert len(figure.axes) == 1
    assert any("no budget was set" in text for text in texts(figure))


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no image or video"):
        draw_report(report_of(skipped="no image or video in the input"), [])
    with pytest.raises(ValueError, match="no images to draw"):
        draw_report(report_of(sample_of((), ())), [])


@pytest.mark.parametrize(
    ("visuals", "message"),
    [
        ([], "1 images or videos, but 0"),
        ([plain(112, 168)], "does not fit the report"),
        ([plain(1000, 1000)], "24 visual tokens"),
        ([[plain(168, 112)] * 3], "3 frames"),
    ],
)
def test_pictures_of_another_request_are_refused(visuals, message):
    report = report_of(sample_of(((1, 4, 6),), (halved(24),)))
    with pytest.raises(ValueError, match=message):
        draw_report(report, visuals)


@pytest.mark.parametrize("size", [(168, 112), (160, 120), (1680, 1120), (175, 105), (3000, 2000)])
def test_sizes_that_are_rounded_to_the_grid_fit(size):
    report = report_of(sample_of(((1, 4, 6),), (halved(24),)))
    assert draw_report(report, [plain(*size)]).axes


def test_saved_png_is_the_same_each_time_and_makes_its_folder(tmp_path):
    report = report_of(sample_of(((1, 4, 6),), (halved(24),)))
    files = [tmp_path / "new" / "folder" / name for name in ("a.png", "b.png")]
    for file in files:
        save_picture(draw_report(report, [plain(168, 112)], title="cost $5 and $6"), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Image.open(io.BytesIO(files[0].read_bytes())).width > 500


def test_rows_with_many_target_layers_wrap():
    stages = tuple(stage(layer, 16, tuple(range(16 - layer // 2))) for layer in range(2, 26, 2))
    row = Row(plain(56, 56), sample_of(((1, 4, 4),), stages), 0, 4, 4, "a question")
    figure = draw_rows([row, row], title="title")
    assert len(figure.axes) == 26
    assert max(axes.get_position().x1 for axes in figure.axes) <= 1
    assert min(axes.get_position().y0 for axes in figure.axes) >= 0


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        ({"budget": 6.0}, ", keep 0.25"),
        ({"stages": (dataclasses.replace(halved(24), rank=5),)}, ", keep adaptive"),
        ({}, ", keep by schedule"),
        ({"stages": (stage(2, 24, skipped="few"),)}, ""),
    ],
)
def test_every_picture_says_what_ran(changes, keep):
    """Beneath its title, or in its place."""
    sample = dataclasses.replace(sample_of(((1, 4, 6),), (halved(24),)), layer_tokens=(24, 24, 6, 6), **changes)
    report = report_of(sample)
    said = f"Model, selector sparsevlm{keep}: 15 of 24 visual tokens, averaged over the 4 decoder layers"
    assert heading([report]) == said
    other = dataclasses.replace(sample, layer_tokens=(24, 8, 6, 6))
    assert ": 13 of 24 visual tokens" in heading([report, report_of(other)]), "the mean of several"
    for title in ("", "What is it?"):
        written = " ".join(texts(draw_report(report, [plain(84, 56)], title=title)))
        assert written.startswith(f"{title} {said}".strip())


def test_no_global_state():
    before = dict(matplotlib.rcParams)
    draw_report(report_of(sample_of(((1, 2, 2),), (halved(4),))), [plain(56, 56)])
    assert dict(matplotlib.rcParams) == before


def test_pyplot_stays_out():
    code = "import sys, sparsevlm.visualization; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_request_that_failed_is_said_to_have():
    failed = dataclasses.replace(report_of(sample_of(((1, 4, 6),), (halved(24),))), failed="RuntimeError: too late")
    assert "The request failed: RuntimeError: too late." in " ".join(texts(draw_report(failed, [plain(84, 56)])))
    with pytest.raises(ValueError, match=r"no samples to draw \(RuntimeError: too late\)"):
        draw_report(dataclasses.replace(failed, samples=()), [])


def test_a_kept_set_is_drawn_once():
    """With the target layers at which nothing more happens, and why at the first."""
    all_kept = [stage(layer, 3, (0, 1, 2)) for layer in (6, 10)]
    stages = (stage(2, 6, (0, 1, 2)), stage(4, 3, skipped="the budget is met"), *all_kept)
    for pictures in ([plain(84, 56)], [plain(56, 28), plain(56, 28), plain(56, 28)]):
        grids = ((1, 2, 3),) if len(pictures) == 1 else ((1, 1, 2),) * 3
        figure = draw_report(report_of(sample_of(grids, stages)), pictures)
        assert len(figure.axes) == 2 * len(pictures)
        assert "layer 4 to 10 unchanged: the budget is met" in " ".join(texts(figure)).replace("\n", " ")
    untouched = draw_report(report_of(sample_of(((1, 2, 3),), (stage(2, 6, skipped="few"),))), [plain(84, 56)])
    assert len(untouched.axes) == 1
    assert "6 visual tokens; layer 2 unchanged: few" in " ".join(texts(untouched)).replace("\n", " ")


def test_another_picture_of_the_same_shape_is_refused():
    picture, other = plain(168, 112), plain(168, 112, (200, 100, 51))
    report = report_of(sample_of(((1, 4, 6),), (halved(24),))).of_pictures(identified([picture]))
    report = Report.from_dict(report.to_dict())
    assert draw_report(report, [picture]).axes
    with pytest.raises(ValueError, match=r"picture 1 \(168x112 pixels, digest \w{16}\) is not the one that the report"):
        draw_report(report, [other])
    video = [plain(84, 56, (n, 0, 0)) for n in range(2)]
    report = report_of(sample_of(((2, 2, 3),), (halved(12),))).of_pictures(identified([video]))
    assert draw_report(report, [video]).axes
    with pytest.raises(ValueError, match="picture 1 "):
        draw_report(report, [video[::-1]])


def test_a_long_note_at_the_foot_stays_on_the_page():
    page = Page(4.0)
    page.place([Panel("kept", "8 of 24", np.zeros((28, 28, 3), np.uint8))], 2.0, 2.0)
    note = "the least that the layers and min_keep allow, as the budget is an average over all of the layers, " * 2
    figure = page.figure([("#000000", "kept")], note)
    (written,) = (text for text in figure.texts if "min_keep" in text.get_text())
    assert written.get_text().split() == note.split()
    extent = written.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert extent.x1 < figure.bbox.width
    (axes,) = figure.axes
    assert extent.y1 < axes.get_window_extent().y0
