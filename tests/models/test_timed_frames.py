"""Videos whose frames stand apart in the prompt, each behind a written time, and sound between frames."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.models import adapter_for
from sparsevlm.request.inputs import visual_grids
from toys import AUDIO, IMAGE, VIDEO, make_inputs, tiny_model

ROWS = [
    [("image", 2, 3), ("text", 2), ("video", 3, 2, 4), ("text", 2), ("video", 2, 3, 2), ("text", 4)],
    [("text", 3), ("video", 2, 4, 3), ("text", 9)],
]
TIMED = ("qwen3_vl", "qwen3_vl_moe")


class Spy:
    def __init__(self):
        self.seen = {}

    def select(self, context, n_keep):
        self.seen.setdefault(context.sample, context)
        return torch.arange(n_keep)


@pytest.mark.parametrize("name", TIMED)
def test_a_video_is_one_input_with_coordinates_of_time_row_and_column(name):
    model, spy = tiny_model(name), Spy()
    inputs = make_inputs(*ROWS, family=name)
    ids = inputs["input_ids"][0]
    assert (
        len((ids == VIDEO).nonzero().squeeze().diff().unique()) == 3
    )  # within a frame, to the next, to the next video
    state = apply_sparsevlm(model, keep=0.9, min_keep=3, selector=spy, target_layers=[2])
    for call in (lambda: model.generate(**inputs, max_new_tokens=2), lambda: model(**inputs)):
        spy.seen.clear()
        call()
        first, second = state.report.samples
        assert first.grids == ((1, 2, 3), (3, 2, 4), (2, 3, 2))
        assert first.images == (6, 24, 12)
        assert (second.grids, second.images) == (((2, 4, 3),), (24,))
        wanted, start = [], 0
        for t, h, w in first.grids:
            wanted += [(start + k, i, j) for k in range(t) for i in range(h) for j in range(w)]
            start += t
        assert list(zip(*spy.seen[0].coordinates.tolist(), strict=True)) == wanted
        assert spy.seen[0].image_idx.tolist() == [0] * 6 + [1] * 24 + [2] * 12


@pytest.mark.parametrize("copies", [1, 2])
def test_grids_of_beams(copies):
    adapter = adapter_for(tiny_model("qwen3_vl"))
    ids = make_inputs(*ROWS, family="qwen3_vl")["input_ids"].repeat_interleave(copies, dim=0)
    grids = {"image": [(1, 2, 3)], "video": [(3, 2, 4), (2, 3, 2), (2, 4, 3)]}
    found = visual_grids(adapter, grids, ids)
    assert found[::copies] == found[copies - 1 :: copies] == [[(1, 2, 3), (3, 2, 4), (2, 3, 2)], [(2, 4, 3)]]
    assert visual_grids(adapter, {**grids, "video": [(3, 2, 4), (2, 3, 2), (2, 4, 4)]}, ids) == []


def test_coordinates_where_grids_are_not_known_come_from_positions():
    """Positions of a frame begin anew where it stands."""
    model = tiny_model("qwen3_vl")
    adapter, inputs = adapter_for(model), make_inputs(ROWS[1], family="qwen3_vl")
    tokens = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    positions, _ = model.model.get_rope_index(**tokens)
    visual = (inputs["input_ids"][0] == VIDEO).nonzero().squeeze()
    time, row, column = adapter.family.coordinates((), positions[:, 0], visual)
    assert len(time.unique()) == 2
    assert row.tolist() == [i for _ in range(2) for i in range(4) for _ in range(3)]
    assert column.tolist() == [j for _ in range(8) for j in range(3)]
    by_grids = adapter.family.coordinates([(2, 4, 3)], positions[:, 0], visual)
    assert torch.equal(by_grids[1:], torch.stack((row, column)))
    assert by_grids[0].tolist() == [0] * 12 + [1] * 12


def test_sound_stands_between_frames():
    adapter = adapter_for(tiny_model("qwen2_5_omni_thinker"))
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, VIDEO, VIDEO, AUDIO, AUDIO, VIDEO, VIDEO, AUDIO, 3]])
    assert visual_grids(adapter, {"image": [(1, 1, 2)], "video": [(2, 1, 2)]}, ids) == [[(1, 1, 2), (2, 1, 2)]]
    broken = torch.tensor([[1, IMAGE, 2, IMAGE, 3]])
    assert visual_grids(adapter, {"image": [(1, 1, 2)]}, broken) == []


@pytest.mark.parametrize("name", [*TIMED, "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_the_family_has_an_example(name):
    model = tiny_model(name)
    adapter = adapter_for(model)
    inputs = adapter.family.example(adapter, (1, 4, 6), 10)
    assert inputs["input_ids"].shape == (1, 34)
    state = apply_sparsevlm(model, keep=0.5, min_keep=3)
    model.generate(**inputs, max_new_tokens=2)
    assert state.report.n_visual == 24
    assert state.report.samples[0].grids == ((1, 4, 6),)
