"""Heads and text that have a say: the Triton twins against the plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels.rater_choice import choose_raters_reference, top_heads_reference
from sparsevlm.kernels.triton.rater_choice import choose_raters, top_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eighths(shape, seed, most=9):
    """Numbers whose sums are exact, with ties."""
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed)) / 8.0


@settings(max_examples=examples(60), deadline=None)
@given(
    batch=st.integers(1, 5), n_rows=st.integers(0, 20), heads=st.integers(1, 12), seed=st.integers(0, 1 << 30),
    data=st.data(),
)  # fmt: skip
def test_heads(batch, n_rows, heads, seed, data):
    mass, n_top = eighths((batch, n_rows, heads), seed, 3), data.draw(st.integers(1, heads))
    if n_rows and seed % 3 == 0:
        mass[seed % batch, 0, seed % heads] = [torch.nan, torch.inf, -torch.inf][seed % 7 % 3]
    wanted = top_heads_reference(mass, n_top)
    assert torch.equal(top_heads(mass.to(DEVICE), n_top).cpu(), wanted)
    assert (wanted > 0).sum(dim=1).tolist() == [n_top] * batch


@settings(max_examples=examples(60), deadline=None)
@given(
    numbers=st.lists(st.integers(0, 12), min_size=1, max_size=3), room=st.integers(0, 5), n_visual=st.integers(1, 9),
    alike=st.booleans(), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_raters(numbers, room, n_visual, alike, seed):
    """Means of eighths over some rows round alike; where all rows are alike, all vote."""
    shape = (len(numbers), max(numbers) + room, n_visual)
    attention = torch.full(shape, 0.25) if alike else eighths(shape, seed)
    check_raters(attention, torch.tensor(numbers), DEVICE)


def check_raters(attention, n_text, device):
    wanted, voters = choose_raters_reference(attention, n_text)
    found, is_rater = choose_raters(attention.clone().to(device), n_text.to(device))
    assert torch.equal(is_rater.cpu(), voters)
    assert torch.equal(found.cpu(), wanted)
    assert torch.equal(voters.any(dim=1), n_text > 0)


def test_of_what_is_no_number_the_last_votes(device):
    attention = torch.ones(2, 5, 3)
    attention[0, 1, 1] = torch.nan
    check_raters(attention, torch.tensor([4, 5]), device)


def test_more_text_than_a_block(device):
    check_raters(eighths((2, 300, 5), 0), torch.tensor([290, 130]), device)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "n_text", "n_visual"), [(1, 64, 256), (1, 128, 4096), (8, 512, 1024)])
def test_of_a_real_size(batch, n_text, n_visual, device):
    n_rows = torch.arange(batch) * (n_text // batch) + (n_text if batch == 1 else 0)
    check_raters(eighths((batch, n_text, n_visual), 0), n_rows, device)
    mass = eighths((batch, n_text, 28), 1)
    assert torch.equal(top_heads(mass.to(device), 12).cpu(), top_heads_reference(mass, 12))
