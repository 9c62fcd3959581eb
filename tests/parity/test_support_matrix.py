"""Every family in every mode a user may ask for, by itself: what is found makes docs/support_matrix.csv.

They are collected where ``--support-matrix FILE`` says where the rows go: ``nox -s support_matrix``.
"""

from __future__ import annotations

import csv

import flash_emulation
import pytest
import transformers
from benchmark.support_matrix import COLUMNS, REFUSED, SUPPORTED, UNKNOWN
from runs import take_second_turn
from ways import ATTENTIONS, TURNS, made, not_asked, not_known_to_transformers, not_run_by_family, try_case

from places import CPU
from toys import FAMILIES, PROMPTS, tiny_model

# By mode: prompt, way of asking, cache.
MODES = {
    "greedy": ("one image", "greedy", "dynamic"),
    "sampling": ("one image", "sampling", "dynamic"),
    "several sequences": ("one image", "several sequences", "dynamic"),
    "beams": ("one image", "beams", "dynamic"),
    "left-padded batch": ("batch, left padding", "greedy", "dynamic"),
    "two images": ("two images", "greedy", "dynamic"),
    "video": ("video", "greedy", "dynamic"),
    "second turn": ("one image", "turn of text", "dynamic"),
    "second turn, new image": ("one image", "turn with image", "dynamic"),
    "static cache": ("one image", "greedy", "static"),
    "no cache": ("one image", "greedy", "none"),
    "prompt lookup": ("one image", "prompt lookup", "dynamic"),
    "direct call": ("one image", "direct call", "dynamic"),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell(family, mode, attention, request):
    prompt, way, cache = MODES[mode]
    case = {"family": family, "prompt": prompt, "way": way, "cache": cache, "attention": attention, "mask": "mask"}
    case["variant"] = "by attention"
    path, status, reason = "", UNKNOWN, not_known_to_transformers(case) or not_run_by_family(case)
    assert not not_asked(case)
    if not reason:
        path, status, reason = outcome(case)
    elif not not_known_to_transformers(case) and FAMILIES[family].takes(PROMPTS[prompt]):
        refused = refusal(case)
        status, reason = (REFUSED, refused) if refused else (status, reason)
    row = {
        "family": family,
        "class": type(tiny_model(family)).__name__,
        "transformers": transformers.__version__,
        "mode": mode,
        "attention": attention.replace(flash_emulation.NAME, "flash"),
        "path": path,
        "status": status,
        "reason": reason.replace(flash_emulation.NAME, "flash"),
    }
    with open(
        request.config.getoption("--support-matrix"), "a", newline="", encoding="utf-8"
    ) as file:  # one short write: processes may share it
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def outcome(case) -> tuple[str, str, str]:
    """Path, status and reason; by the engine where it takes the case, and by the hooks."""
    try:
        run = try_case(case, CPU, engine=True)
        if case["way"].startswith("turn"):  # of which the comparison hooks the model, so that the engine leaves it
            run = made(case, CPU, engine=True)
            take_second_turn(run, *TURNS[case["way"]], watched=False)
        path, reason = run.state.report.path, run.state.report.path_reason
        if path == "engine":
            try_case(case, CPU, engine=False)
            reason = ""
    except NotImplementedError as error:
        return "", REFUSED, str(error)
    reason = reason.removeprefix("hooks on the model's own modules (").removesuffix(")")
    return {"plain": "hooks"}.get(path, path), SUPPORTED, reason


def refusal(case) -> str:
    """What is said to a case that is not compared; empty: it is not refused, whatever comes of it."""
    try:
        try_case(case, CPU)
    except NotImplementedError as error:
        return str(error)
    except Exception:
        return ""
    return ""
