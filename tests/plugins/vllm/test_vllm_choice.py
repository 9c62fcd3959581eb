"""Choices of the plugin by the library's selectors, without vLLM."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.plugins.vllm.choice import Run, choose, grouped
from sparsevlm.plugins.vllm.options import Options, available
from sparsevlm.plugins.vllm.positions import grid_coordinates
from sparsevlm.selection.selectors import DEFAULT


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
    assert f"even steps in the place of {DEFAULT}" in caplog.text
    assert torch.equal(others[0], choose([whole], options, 16)[0][0])


def test_nothing_is_asked_where_all_goes_on():
    run = _run(n_keep=20)
    ((rows, coordinates),) = choose([run], Options(), 16)
    assert rows is run.rows
    assert coordinates is run.coordinates


def test_groups_have_one_selector_and_budget():
    asked = [Options(0.5), Options(0.5, text=(1,)), Options(1), Options(1.0)]
    assert grouped(asked) == [[0, 1], [2], [3]]
