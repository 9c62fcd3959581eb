"""Options, counts, positions and choices of the plugin, by themselves and without vLLM."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from sparsevlm.plugins.vllm.budget import kept_per_run
from sparsevlm.plugins.vllm.choice import Run, choose, grouped
from sparsevlm.plugins.vllm.compat import check_vllm, is_tested
from sparsevlm.plugins.vllm.options import Options, available
from sparsevlm.plugins.vllm.positions import (
    from_channels,
    grid_coordinates,
    place_visual,
    prompt_positions,
    to_channels,
)
from sparsevlm.selection.budget import plan_budget
from sparsevlm.selection.selectors.divprune import DivPruneSelector
from toys import tiny_model
from toys.kinds import IMAGE, VIDEO, VISION_END, VISION_START

# ---------------------------------------------------------------- options


def test_options_of_a_request_take_the_engines_place():
    engine = Options.of_engine({"keep": 0.5, "min_keep": 4})
    assert engine.of_request(None) == engine
    assert engine.of_request({"keep": 9, "selector": "mmtok"}) == Options(9, "mmtok", 4)
    assert Options.of_engine({}) == Options(keep=1.0)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"keep": 1.5}, ValueError, r"keep as a fraction must be in \(0, 1\], got 1.5"),
        ({"keep": 0}, ValueError, "keep as a number of tokens must be at least 1"),
        ({"keep": [0.5, 0.5]}, TypeError, "keep must be one budget"),
        ({"selector": "divprun"}, ValueError, "did you mean 'divprune'"),
        ({"selector": "span"}, ValueError, "inside the decoder, where vLLM gives all layers of a request one length"),
        ({"selector": "visionzip"}, ValueError, "reads vision_attention, vision_keys inside the vision tower"),
        ({"selector": 3}, TypeError, "selector must be a name, got 3"),
        ({"selector": "no.module:Here"}, ValueError, "cannot be imported"),
        ({"keeps": 0.5}, TypeError, r"did you mean 'keep'.*the options are keep, selector, min_keep, seed\.$"),
        ({"recycle": False}, TypeError, "that are read inside the decoder do nothing here"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        (0.5, TypeError, r"hf_overrides\['sparsevlm'\] must be a dict"),
    ],
)
def test_wrong_options_say_what_is_right(given, error, says):
    with pytest.raises(error, match=says):
        Options.of_engine(given)


def test_what_cannot_run_is_told_with_what_can():
    assert set(available()) == {"cdpruner", "divprune", "grid", "mmtok", "random", "tome"}
    with pytest.raises(ValueError, match="Under vLLM there are cdpruner, divprune, grid, mmtok, random, tome"):
        Options.of_engine({"selector": "fastv"})


def test_only_an_engine_names_a_module():
    name = f"{DivPruneSelector.__module__}:DivPruneSelector"
    engine = Options.of_engine({"selector": name})
    assert isinstance(engine.chooser[0], DivPruneSelector)
    assert engine.of_request({"keep": 0.5}).selector == name
    with pytest.raises(ValueError, match="only the engine may name a module"):
        Options().of_request({"selector": name})


def test_keys_tell_choices_apart():
    variants = [
        Options(keep=1), Options(keep=1.0), Options(keep=0.5), Options(selector="mmtok"), Options(min_keep=3),
        Options(seed=1), Options(text=(1, 2)), Options(text=(1, 3)),
    ]  # fmt: skip
    assert len({one.key() for one in variants}) == len(variants)
    assert all(repr(Options.from_key(one.key())) == repr(one) and Options.from_key(one.key()) == one for one in variants)


def test_only_guided_selectors_read_the_text():
    assert {name for name in available() if Options(selector=name).reads_text} == {"cdpruner", "mmtok"}


def test_untested_versions_are_refused(monkeypatch):
    check_vllm("0.32.0")
    check_vllm("0.25.0+cu130")
    assert not is_tested("0.33.0")
    with pytest.raises(ImportError, match=r"vLLM 0\.33\.0 is installed.*0\.25\.0 and 0\.32\.0"):
        check_vllm("0.33.0")
    monkeypatch.setenv("SPARSEVLM_ALLOW_UNTESTED_VLLM", "1")
    check_vllm("0.33.0")


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("keep", [1, 7, 40, 1000, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("n_visual", [1, 20, 100])
def test_an_image_keeps_what_it_does_before_the_decoder_of_transformers(n_visual, keep):
    (of_28_layers,) = plan_budget(keep, "single", n_visual, (-1,), 28, 8).counts
    assert kept_per_run([n_visual], Options(keep=keep, min_keep=8)) == [of_28_layers]


def test_frames_share_the_count_evenly():
    assert kept_per_run([10] * 4, Options(keep=0.5, min_keep=1)) == [5, 5, 5, 5]
    assert kept_per_run([10] * 4, Options(keep=11, min_keep=1)) == [2, 3, 3, 3]
    assert kept_per_run([10] * 4, Options(keep=2, min_keep=1)) == [1, 1, 1, 1]  # a frame that stands apart needs one
    assert kept_per_run([10] * 4, Options(keep=1.0)) == [10, 10, 10, 10]


# ---------------------------------------------------------------- positions


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
    is_visual = (types[0] > 0)
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
    assert torch.equal(place_visual(placed, visual, rows[:, later], n_computed), placed)  # asked again, after preemption
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


# ---------------------------------------------------------------- choices


def _run(n=20, n_keep=8, width=16, seed=0, text=None):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return Run(rows, grid_coordinates((1, 4, n // 4)), n_keep, text)


@pytest.mark.parametrize("name", available())
def test_a_choice_is_the_selectors_wherever_it_is_made(name):
    """By itself or together with others, of features with more behind them (those for later layers)."""
    text = torch.randn(3, 12, generator=torch.Generator().manual_seed(9))
    options = Options(keep=8, selector=name, min_keep=2)
    runs = [_run(seed=seed, text=text if options.reads_text else None) for seed in (0, 1, 0)]
    together = choose(runs, options, 12)
    for run, (rows, coordinates) in zip(runs, together, strict=True):
        (alone,) = choose([run], options, 12)
        assert torch.equal(rows, alone[0])
        assert torch.equal(coordinates, alone[1])
        assert rows.shape == (8, 16)
        assert coordinates.shape == (3, 8)
    assert torch.equal(together[0][1], together[2][1])


def test_merged_rows_take_what_is_behind_them_along():
    run = _run()
    ((rows, coordinates),) = choose([run], Options(keep=8, selector="tome", min_keep=2), 12)
    kept = (run.coordinates[:, :, None] == coordinates[:, None]).all(dim=0).nonzero()[:, 0]
    changed = (rows != run.rows[kept]).any(dim=1)
    assert changed.any()
    assert ((rows[:, 12:] != run.rows[kept][:, 12:]).any(dim=1) == changed).all()


def test_broken_features_do_not_end_the_engine(caplog):
    """Nor what others get that were to be chosen from with them."""
    broken, whole = _run(), _run(seed=1)
    broken.rows[3] = torch.nan
    options = Options(keep=8, min_keep=2)
    (rows, _), others = choose([broken, whole], options, 16)
    assert rows.shape == (8, 16)
    assert "even steps in the place of divprune" in caplog.text
    assert torch.equal(others[0], choose([whole], options, 16)[0][0])


def test_nothing_is_asked_where_all_goes_on():
    run = _run(n_keep=20)
    ((rows, coordinates),) = choose([run], Options(), 16)
    assert rows is run.rows
    assert coordinates is run.coordinates


def test_groups_have_one_selector_and_budget():
    asked = [Options(0.5), Options(0.5, text=(1,)), Options(1), Options(1.0)]
    assert grouped(asked) == [[0, 1], [2], [3]]


# ---------------------------------------------------------------- engines


@dataclass
class Given:
    """Anything with the attributes that are asked for."""

    def __init__(self, **values):
        vars(self).update(values)


def engine(given, architectures=("Qwen2_5_VLForConditionalGeneration",), stages=1, speculative=None, **of_inputs):
    mm_config = Given(**{"video_pruning_rate": None, "mm_processor_kwargs": None, **of_inputs})
    return Given(
        model_config=Given(
            hf_config=Given(**({} if given is None else {"sparsevlm": given})),
            architectures=list(architectures),
            multimodal_config=mm_config,
        ),
        parallel_config=Given(pipeline_parallel_size=stages),
        speculative_config=speculative,
        lora_config=None,
    )


REFUSED = {
    "pipeline": ({"stages": 2}, NotImplementedError, "pipeline_parallel_size=2: .*Use tensor_parallel_size"),
    "own pruning": ({"video_pruning_rate": 0.5}, NotImplementedError, "video_pruning_rate=0.5: vLLM's own pruning"),
    "model": ({"architectures": ("LlavaForConditionalGeneration",)}, NotImplementedError, "covers Qwen2VL"),
    "place": ({"mm_processor_kwargs": {"sparsevlm": {}}}, ValueError, "which is for requests"),
    "drafts": ({"speculative": object()}, NotImplementedError, "speculative decoding was not tested"),
}


@pytest.mark.parametrize(("options", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_engines_that_cannot_prune_are_refused(options, error, says, monkeypatch):
    from sparsevlm.plugins.vllm import checks

    monkeypatch.setattr(checks, "check_vllm", lambda: None)
    with pytest.raises(error, match=says):
        checks.check_engine(engine({"keep": 0.5}, **options))
    checks.check_engine(engine(None, **options))  # who asks for nothing is left alone


def test_every_run_of_a_prompt_is_shortened_by_itself():
    options = Options(keep=0.5, min_keep=1)
    tokens = [5, *[IMAGE] * 8, 6, 7, *[IMAGE] * 8, 6]
    runs = [len(list(run)) for is_visual, run in itertools.groupby(tokens, IMAGE.__eq__) if is_visual]
    assert kept_per_run(runs, options) == [4, 4]
