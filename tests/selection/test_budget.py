"""The planner: budgets are met, published averages come out, what cannot hold is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevlm import SparseVLMConfig
from sparsevlm.selection.budget import (
    below_min_keep,
    layer_tokens,
    least_keep,
    plan_budget,
    plan_schedule,
    rank_adaptive_count,
)


def average_in(n_visual, counts, layers, n_layers):
    return sum(layer_tokens(n_visual, counts, layers, n_layers)) / n_layers


@pytest.mark.parametrize(
    ("preset", "average_out", "average_in_576"),
    [("paper-192", 192.03, 206.5), ("paper-128", 128.6, 145.4), ("paper-64", 64.8, 82.3)],
)
def test_paper_presets_give_the_published_averages(preset, average_out, average_in_576):
    config = SparseVLMConfig(preset=preset)
    assert (config.target_layers, config.tau, config.theta, config.merge) == ((2, 6, 15), 0.3, 0.1, "mean")
    counts = plan_schedule(config.schedule, 576, 3, config.min_keep).counts
    tokens = layer_tokens(576, counts, config.target_layers, 32)
    assert sum(tokens) / 32 == pytest.approx(average_in_576, abs=0.1)
    assert (sum(tokens[1:]) + counts[-1]) / 32 == pytest.approx(average_out, abs=0.1)


@given(
    n_visual=st.integers(1, 3000),
    keep=st.one_of(st.floats(0.05, 1.0), st.integers(1, 3000)),
    min_keep=st.integers(1, 64),
    n_layers=st.integers(4, 40),
    schedule=st.sampled_from(["geometric", "single"]),
    placement=st.sampled_from(["before_decoder", "target_layers", "both"]),
)
def test_budgets_are_met_or_clamped(n_visual, keep, min_keep, n_layers, schedule, placement):
    inside = tuple(range(min(2, n_layers - 2), n_layers - 1, 4))
    layers = {"before_decoder": (-1,), "target_layers": inside, "both": (-1, *inside)}[placement]
    plan = plan_budget(keep, schedule, n_visual, layers, n_layers, min_keep)
    budget = keep if isinstance(keep, int) else keep * n_visual
    got = average_in(n_visual, plan.counts, layers, n_layers)
    floor = min(min_keep, n_visual)
    assert all(floor <= count <= n_visual for count in plan.counts)
    assert list(plan.counts) == sorted(plan.counts, reverse=True)
    if plan.clamped:
        assert set(plan.counts) in ({floor}, {n_visual})
    else:
        assert got <= budget + 1e-6
        one_more_everywhere = (n_layers - layers[0] - 1) / n_layers
        assert got >= min(budget, n_visual) - one_more_everywhere - 1e-6


def test_geometric_ratio_is_the_same_at_every_layer():
    plan = plan_budget(0.5, "geometric", 1024, (2, 6, 10, 14, 18, 22), 28, 32)
    ratios = [b / a for a, b in zip((1024, *plan.counts), plan.counts, strict=False)]
    assert max(ratios) - min(ratios) < 0.02


def test_min_keep_holds_and_the_rest_goes_elsewhere():
    plan = plan_budget(0.26, "geometric", 256, (2, 6, 10, 14, 18, 22), 24, 32)
    assert min(plan.counts) == 32
    assert average_in(256, plan.counts, (2, 6, 10, 14, 18, 22), 24) == pytest.approx(0.26 * 256, abs=1)


def test_too_small_a_budget_is_clamped_with_the_numbers():
    plan = plan_budget(20, "geometric", 256, (2, 6), 24, 32)
    assert plan.counts == (32, 32)
    assert plan.clamped == (  # (3 · 256 + 21 · 32) / 24
        "keep=20 is an average of 20.0 of 256 visual tokens, less than the least possible: 60.0 used, as layers 0..2 "
        "see all of them and min_keep=32 leaves 32. To change that, raise keep, choose earlier target_layers or lower "
        "min_keep (keep=20 is a number of tokens; 20 % of them is keep=0.2)"
    )
    assert below_min_keep(1, 32).endswith(
        "(keep=1 is a number of tokens; 1 % of them is keep=0.01, all of them keep=1.0)"
    )
    before = plan_budget(0.05, "geometric", 256, (-1,), 24, 32).clamped
    assert before == (
        "keep=0.05 is an average of 12.8 of 256 visual tokens, less than the least possible: 32.0 used, as min_keep=32 "
        "leaves 32. To change that, raise keep or lower min_keep"
    )
    plan = plan_budget(60, "geometric", 256, (2, 6), 24, 32)
    assert (plan.counts, plan.clamped) == ((32, 32), None)


def test_a_sample_of_no_more_than_min_keep_loses_nothing_and_only_lower_min_keep_would_change_that():
    for n_visual in (16, 32):
        plan = plan_budget(0.25, "geometric", n_visual, (2, 6), 24, 32)
        assert plan.counts == (n_visual, n_visual)
        assert plan.clamped == (
            f"keep=0.25 is an average of {n_visual / 4:.1f} of {n_visual} visual tokens, but no sample of min_keep=32 "
            "or fewer is pruned: all are kept. To change that, lower min_keep"
        )
    assert "less than the least possible" in plan_budget(0.25, "geometric", 33, (2, 6), 24, 32).clamped
    assert plan_schedule((5, 0.2), 16, 2, 32).clamped == (
        "schedule (5, 0.2) is for fewer than 16 visual tokens, but no sample of min_keep=32 or fewer is pruned: all "
        "are kept. To change that, lower min_keep"
    )
    assert "goes below min_keep=32 for 33 tokens" in plan_schedule((33, 5), 33, 2, 32).clamped


def test_nothing_is_said_of_a_sample_without_an_image():
    assert plan_budget(20, "geometric", 0, (2, 6), 24, 32).clamped is None
    assert plan_schedule((20, 10), 0, 2, 32).clamped is None


def test_more_tokens_than_there_are_is_clamped_to_all():
    assert plan_budget(256, "geometric", 256, (2, 6), 24, 32).clamped is None
    plan = plan_budget(257, "geometric", 256, (2, 6), 24, 32)
    assert plan.counts == (256, 256)
    assert "keep=257 is more than the 256 visual tokens" in plan.clamped
    assert plan.at_most(7).counts == (7, 7)
    assert plan_schedule((100, 50), 256, 2, 32).at_most(70).counts == (70, 50)


def test_a_remainder_goes_to_the_earliest_stage_that_can_take_a_token():
    # 8 · 50 = 400 tokens, of which the first layer takes 100. Just below the ratio where 6 · ⌊100 r²⌋ is 240, one layer
    # sees 63 and six see 39: 297 of 300. One more fits into the first stage; the second is short of three.
    assert plan_budget(50, "geometric", 100, (0, 1), 8, 1).counts == (64, 39)
    # (5, 2) costs 3 · 5 + 4 · 2 = 23 of 28: one more in the first stage leaves 2, too few for the second.
    assert plan_budget(0.42, "geometric", 12, (0, 3), 8, 1).counts == (6, 2)
    # 9 everywhere leaves 5, but the first stage takes six, and the second has to stay below the first.
    assert plan_budget(0.98, "geometric", 10, (0, 6), 8, 1).counts == (9, 9)


def test_rounding_costs_no_token():
    assert plan_budget(0.29, "single", 100, (-1,), 4, 1).counts == (29,)  # 0.29 · 100 · 4 = 115.99…
    assert rank_adaptive_count(100, 0, 0.29, 0.5, 0.5, False, 1) == (71, 0)


def test_explicit_schedules():
    assert plan_schedule((100, 50), 256, 2, 32).counts == (100, 50)
    assert plan_schedule((0.5, 0.25), 256, 2, 32).counts == (128, 64)
    assert "min_keep" in plan_schedule((100, 5), 256, 2, 32).clamped
    assert "more than" in plan_schedule((300, 50), 256, 2, 32).clamped
    assert plan_schedule((300, 5), 256, 2, 32).counts == (256, 32)
    assert plan_schedule((0.666, 0.334), 100, 2, 8).counts == (67, 33)
    assert plan_schedule((0.5, 0.5), 20, 2, 32).counts == (20, 20)  # fewer than min_keep
    with pytest.raises(ValueError, match="2 counts for 3"):
        plan_schedule((100, 50), 256, 3, 32)


def test_a_stage_before_the_decoder_and_one_inside_by_hand():
    # At ratio r, layers 0 and 1 see ⌊100 r⌋ tokens, layers 2 and 3 ⌊100 r²⌋. The largest r that fits into 4 · 40 = 160
    # is just below 0.53: 2 · 52 + 2 · 28 = 160.
    plan = plan_budget(40, "geometric", 100, (-1, 1), 4, 1)
    assert plan.counts == (52, 28)
    assert layer_tokens(100, plan.counts, (-1, 1), 4) == [52, 52, 28, 28]
    assert plan_budget(40, "single", 100, (-1, 1), 4, 1).counts == (40, 40)
    assert plan_budget(0.05, "geometric", 100, (-1, 1), 4, 8).counts == (8, 8)
    assert plan_schedule((0.5, 0.2), 100, 2, 8).counts == (50, 20)


def test_feasible_range():
    assert least_keep((2, 6), 24) == 0.125
    assert least_keep((-1,), 24) == 0.0
    assert least_keep((-1, 2, 6), 24) == 0.0


def test_rank_adaptive_count_by_hand():
    # N = 0.5 (256 − 16) = 120; L_r = 60; C = 30
    assert rank_adaptive_count(256, 16, 0.5, 0.5, 0.5, True, 32) == (256 - 120 + 30, 30)
    assert rank_adaptive_count(256, 16, 0.5, 0.5, 0.5, False, 32) == (136, 0)
    assert rank_adaptive_count(10, 10, 0.5, 0.5, 0.5, True, 1) == (10, 0)
    assert rank_adaptive_count(10, 12, 1.0, 0.5, 0.5, True, 1) == (10, 0)


def test_min_keep_binds_the_outcome_clusters_included():
    assert rank_adaptive_count(20, 0, 0.5, 0.5, 0.5, False, 10) == (10, 0)
    assert rank_adaptive_count(20, 0, 0.5, 0.5, 0.5, False, 11) == (11, 0)
    assert rank_adaptive_count(20, 0, 1.0, 0.5, 0.5, True, 5) == (5, 5)  # N = 20, L_r = 10, C = 5
    assert rank_adaptive_count(20, 0, 1.0, 0.5, 0.5, True, 6) == (6, 4)  # N = 18, L_r = 9, C = 4


@given(st.integers(1, 500), st.integers(0, 500), st.floats(0, 1), st.integers(1, 64))
def test_rank_adaptive_count_respects_min_keep(n_visual, rank, rank_lambda, min_keep):
    n_out, n_clusters = rank_adaptive_count(n_visual, min(rank, n_visual), rank_lambda, 0.5, 0.5, True, min_keep)
    assert min(n_visual, min_keep) <= n_out <= n_visual
    assert 0 <= n_clusters <= n_out
