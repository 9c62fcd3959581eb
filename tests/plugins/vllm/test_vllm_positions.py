"""Positions of pruned prompts against those of transformers, without vLLM."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.plugins.vllm.positions import (
    from_channels,
    grid_coordinates,
    place_visual,
    prompt_positions,
    to_channels,
)
from toys import tiny_model
from toys.kinds import IMAGE, VIDEO, VISION_END, VISION_START


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_coordinates_are_exact_in_every_dtype(dtype):
    coordinates = torch.tensor([[0, 257, 301, 513, 65_535, 70_001, 256**3 - 1]]).repeat(3, 1)
    coordinates[1] //= 3
    assert torch.equal(from_channels(to_channels(coordinates, dtype)), coordinates)


GRIDS = {"landscape": [(1, 4, 9)], "portrait": [(1, 9, 2)], "two": [(1, 9, 2), (1, 2, 3)], "video": [(3, 5, 7)]}


def _prompt(grids):
    """Ids of a prompt, and which image each visual token is of."""
    ids, kinds = [1, 2], []
    for grid in grids:
        kinds.append(VIDEO if grid[0] > 1 else IMAGE)
        ids += [VISION_START, *[kinds[-1]] * (grid[0] * grid[1] * grid[2]), VISION_END, 3]
    return ids, kinds


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("n_computed", [0, 4, 9, 30])
def test_kept_tokens_have_the_positions_of_transformers(grids, n_computed):
    """Of a prompt that is cut anywhere, as a prefix cache and chunks do."""
    ids, kinds = _prompt(grids)
    dense = torch.tensor([ids])
    patches = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids])
    given = {
        "image_grid_thw": patches[[kind == IMAGE for kind in kinds]],
        "video_grid_thw": patches[[kind == VIDEO for kind in kinds]],
    }
    given = {name: value for name, value in given.items() if len(value)}
    types = (dense == IMAGE).long() + 2 * (dense == VIDEO).long()
    model = tiny_model("qwen2_5_vl")
    model.config.vision_config.tokens_per_second = 2
    kwargs = {"second_per_grid_ts": torch.tensor([1.0])} if VIDEO in kinds else {}
    wanted, deltas = model.model.get_rope_index(dense, mm_token_type_ids=types, **given, **kwargs)

    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(len(ids), generator=generator) < 0.4
    is_visual = types[0] > 0
    starts = is_visual & ~torch.cat([torch.tensor([False]), is_visual[:-1]])
    kept |= ~is_visual | starts
    coordinates = [grid_coordinates(grid, 2.0 if grid[0] > 1 else 1.0) for grid in grids]
    extents = [int(one.max()) + 1 for one in coordinates]
    visual = is_visual[kept]
    positions, delta = prompt_positions(visual.tolist(), extents)
    of_text = wanted[:, 0, kept][:, ~visual]
    assert torch.equal(positions[:, ~visual], of_text)
    rows = torch.cat(coordinates, dim=1)[:, kept[is_visual]]
    later = visual.nonzero().squeeze(-1) >= n_computed
    placed = place_visual(positions, visual, rows[:, later], n_computed)
    expected = wanted[:, 0, kept]
    expected[:, :n_computed] = positions[:, :n_computed]
    assert torch.equal(placed, expected)
    again = place_visual(placed, visual, rows[:, later], n_computed)  # after preemption
    assert torch.equal(again, placed)
    assert delta == int(deltas) + len(ids) - int(kept.sum())
    assert int(placed[0, -1]) + 1 - placed.shape[1] == delta


def test_chunks_place_what_they_bring():
    visual = torch.tensor([False, True, True, True, False, True, True, False])
    positions, _ = prompt_positions(visual.tolist(), [5, 9])
    rows = torch.arange(5).repeat(3, 1)
    whole = place_visual(positions, visual, rows, 0)
    in_chunks = place_visual(positions, visual, rows[:, :2], 0)
    in_chunks = place_visual(in_chunks, visual, rows[:, 2:4], 3)
    in_chunks = place_visual(in_chunks, visual, rows[:, 4:], 6)
    assert torch.equal(in_chunks, whole)


def test_an_image_at_the_very_front():
    visual = torch.tensor([True, True, False])
    positions, delta = prompt_positions(visual.tolist(), [4])
    assert positions[0].tolist() == [0, 0, 4]
    assert delta == 2
    assert place_visual(positions, visual, torch.tensor([[0, 3]] * 3), 0)[0].tolist() == [0, 3, 4]


def test_prompt_of_text_alone():
    positions, delta = prompt_positions([False] * 3, [])
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert delta == 0
