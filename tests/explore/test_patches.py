"""Patches by layer, what is said beside an answer, and colours that everybody can tell apart."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from sparsevlm.explore.answers import ANSWERING, DENSE, DONE, STOPPED, Answer
from sparsevlm.explore.drawing import draw_patches, legend, numbers, patches_behind
from sparsevlm.report import Report
from sparsevlm.report_sample import SampleReport, StageReport
from sparsevlm.report_total import Cost
from sparsevlm.visualization.overlay import DROPPED, KEPT, LEGEND, RECYCLED

PICTURE = Image.new("RGB", (40, 20), (200, 40, 40))
STAGES = (
    StageReport(2, 8, 3, 1, kept=(0, 1, 2), recycled=(7,)),
    StageReport(6, 4, 4, 0, skipped_because="the <budget> is met"),
)


def answer(stages=STAGES, **changes):
    sample = SampleReport(8, 5, (8, 8, 8, 4, 4, 4, 4, 4), 4, grids=((1, 2, 4),), stages=stages)
    report = Report("Model", "span", "plain", "hooks & more", None, (sample,), Cost(2, 1), Cost(4_000_000, 1_500_000))
    return Answer(DENSE, **{"state": DONE, "report": report, "n_tokens": 3, **changes})


@pytest.mark.parametrize(("layer", "states"), [(-1, [KEPT] * 8), (1, [KEPT] * 8), (2, None), (5, None), (7, None)])
def test_a_layer_shows_what_the_last_target_layer_has_left(layer, states):
    sample = answer().report.samples[0]
    wanted = states or [KEPT, KEPT, KEPT, DROPPED, DROPPED, DROPPED, DROPPED, RECYCLED]
    assert patches_behind(sample, layer)[1].tolist() == wanted


def test_what_goes_before_the_decoder_is_gone_at_minus_one():
    stages = (StageReport(-1, 8, 2, 0, kept=(4, 5)),)
    drawing, caption = draw_patches(PICTURE, answer(stages), -1)
    assert caption == "Before the decoder: 2 kept, 0 recycled, 6 dropped of 8."
    pixels = np.asarray(drawing)
    cell = pixels.shape[0] // 2
    assert pixels[cell // 2, cell // 2].max() < 90  # the first patch is dark
    assert pixels[cell + cell // 2, cell // 2].tolist() == [200, 40, 40]  # the fifth is as it was


def test_the_caption_counts_and_says_why_nothing_was_dropped():
    assert draw_patches(PICTURE, answer(), 3)[1] == "Behind layer 3: 3 kept, 1 recycled, 4 dropped of 8."
    assert draw_patches(PICTURE, answer(), 6)[1].endswith(
        "dropped of 8. Nothing was dropped here: the <budget> is met."
    )


def test_a_picture_that_does_not_fit_is_counted_and_not_drawn():
    drawing, caption = draw_patches(Image.new("RGB", (20, 200)), answer(), 3)
    assert drawing is None
    assert caption.startswith("Behind layer 3: 3 kept, 1 recycled, 4 dropped of 8. The patches cannot be drawn: ")


def test_views_of_a_picture_stand_one_below_the_other():
    sample = SampleReport(
        8, 5, (8,) * 4, 8, grids=((2, 2, 2),), images=(8,), views=(((1, 1, 2, 2), (1, 1, 2, 2)),), stages=()
    )
    report = Report("Model", "span", "plain", "hooks", None, (sample,), Cost(2, 1), Cost(2, 1))
    drawing, _ = draw_patches(PICTURE, Answer(DENSE, DONE, report=report), 0)
    assert drawing.height > 1.9 * drawing.width


def test_numbers_are_those_of_the_report():
    html = numbers(answer(first_token_ms=12.4, total_ms=99.6))
    rows = dict(re.findall(r"<th scope='row'>(.*?)</th><td>(.*?)</td>", html))
    assert rows == {
        "visual tokens in": "8",
        "kept": "5.5 averaged over the layers, 4 at the end",
        "KV cache": "1.50 of 4.00 MB (1,500,000 of 4,000,000 bytes)",
        "first token": "12 ms",
        "whole answer": "100 ms, 3 tokens",
        "path": "plain: hooks &amp; more",
    }
    assert "answering" in numbers(Answer(DENSE, ANSWERING))
    assert "stopped" in numbers(answer(state=STOPPED))


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_differ_without_any_sight_of_colour():
    for one, other in itertools.combinations([colour for colour, _ in LEGEND], 2):
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 2
    assert all(text in legend() for _, text in LEGEND)
