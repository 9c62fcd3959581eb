"""The tower of Qwen3-VL by the engine's program: learned positions, and features of several blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from sparsevlm import apply_sparsevlm
from sparsevlm.engine.vision.position_table import interpolated
from toys import relative_error, tiny_model

GRIDS = {
    "smaller than the table": [[1, 4, 4]],
    "larger than the table": [[1, 20, 14]],
    "of one row of tokens": [[1, 2, 30], [1, 30, 2]],
    "several sizes": [[1, 6, 6], [1, 8, 12], [1, 4, 10]],
    "a video": [[3, 6, 8]],
    "videos and images": [[2, 4, 8], [1, 12, 6], [4, 4, 4]],
}


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolated(grids, dtype):
    torch.manual_seed(0)
    table, grids = nn.Embedding(48 * 48, 24, dtype=dtype), torch.tensor(GRIDS[grids])
    index, weight = get_vision_interpolation_indices_and_weights(grids, 48, align_corners=True, spatial_merge_size=2)
    sizes = torch.repeat_interleave(grids[:, 1:], grids.prod(dim=1), dim=0)
    with torch.no_grad():
        found = interpolated(table, get_vision_position_ids(grids, 2), sizes)
        wanted = (table(index) * weight[..., None]).sum(1)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def encoded(state, pixels, grids):
    """Visual tokens and what follows them, by the program."""
    in_tokens = tuple((t, h // 2, w // 2) for t, h, w in grids)
    with state._engine._runner.open():
        state._engine._runner.quick_check()
        found = state._engine._runner.vision(pixels, in_tokens)
    return torch.stack([found.tokens, *found.late])


def by_the_modules(model, pixels, grids):
    with torch.no_grad():
        found = model.model.visual(pixels, grid_thw=torch.tensor(grids, device=pixels.device))
    return torch.stack([found.pooler_output, *found.deepstack_features])


def draw(grids, seed):
    n = sum(t * h * w for t, h, w in grids)
    return torch.randn(n, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def test_what_the_modules_give():
    model = tiny_model("qwen3_vl")
    state = apply_sparsevlm(model, keep=0.6, target_layers=[0, 2], engine=True)
    for seed, grids in enumerate((*GRIDS.values(), [[1, 14, 20]], [[1, 2, 8]], *reversed(GRIDS.values()))):
        pixels = draw(grids, seed)
        torch.testing.assert_close(encoded(state, pixels, grids), by_the_modules(model, pixels, grids))
    assert len(state._engine._runner.vision) == len(GRIDS)  # by capacity
    with torch.no_grad():
        model.model.visual.pos_embed.weight.mul_(2)
    model.model.visual.deepstack_merger_list[1].linear_fc2.weight = nn.Parameter(torch.randn(64, 128))
    torch.testing.assert_close(encoded(state, pixels, grids), by_the_modules(model, pixels, grids))


def test_blocks_in_any_order():
    model = tiny_model("qwen3_vl", vision_options={"deepstack_visual_indexes": [2, 0, 9]})
    state = apply_sparsevlm(model, keep=0.6, target_layers=[0, 2], engine=True)
    pixels = draw(grids := GRIDS["several sizes"], 0)
    found = encoded(state, pixels, grids)
    assert len(found) == 3
    torch.testing.assert_close(found, by_the_modules(model, pixels, grids))


def test_a_merger_of_others_runs_by_its_modules():
    class Doubled(nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    model = tiny_model("qwen3_vl")
    model.model.visual.deepstack_merger_list[0].linear_fc1.__class__ = Doubled
    state = apply_sparsevlm(model, keep=0.6, target_layers=[0, 2], engine=True)
    state._engine._runner.quick_check()
    assert state._engine._runner.tower_unsupported == "a Doubled"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    model = tiny_model("qwen3_vl").to("cuda", dtype)
    state = apply_sparsevlm(model, keep=0.6, target_layers=[0, 2])
    for seed, grids in enumerate((*GRIDS.values(), *GRIDS.values())):
        pixels = draw(grids, seed).to("cuda", dtype)
        assert relative_error(encoded(state, pixels, grids), by_the_modules(model, pixels, grids)) < 2e-2
