"""Closing up: the Triton twin against the plain function, in place over views of larger tensors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels import close_up as plain
from sparsevlm.kernels.close_up import Packed
from sparsevlm.kernels.triton import close_up as triton_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(samples, seed, room=5, most_visual=None, n_rows=None, size=6, dtype=torch.float32):
    """Packed samples of (visual, kept, others that are read, others), the kinds of their tokens mixed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [visual + text + other for visual, _, text, other in samples]
    n_rows = sum(lengths) + room if n_rows is None else n_rows
    most_visual = max(visual for visual, *_ in samples) + room if most_visual is None else most_visual
    most_text = max(text for _, _, text, _ in samples) + room
    batch = len(samples)

    def view(rows, columns):
        return torch.zeros(rows + 2, columns + 9, dtype=torch.int64)[:rows, :columns]

    visual_rows, alive, image_idx = (view(batch, most_visual) for _ in range(3))
    text_rows, is_kept = view(batch, most_text), torch.zeros(batch, most_visual, dtype=torch.bool)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    for b, (visual, kept, text, _) in enumerate(samples):
        rows = int(starts[b]) + torch.randperm(lengths[b], generator=generator)
        visual_rows[b, :visual] = rows[:visual].sort().values
        text_rows[b, :text] = rows[visual : visual + text].sort().values
        alive[b, :visual] = torch.randperm(500_000, generator=generator)[:visual].sort().values
        image_idx[b] = torch.randint(4, (most_visual,), generator=generator)
        is_kept[b, torch.randperm(visual, generator=generator)[:kept]] = True
    numbers = {"n_visual": [visual for visual, *_ in samples], "n_text": [text for _, _, text, _ in samples]}
    hidden, cos, sin = (
        torch.randn(n_rows + 3, width, generator=generator).to(kind)[:n_rows]
        for width, kind in ((size, dtype), (4, torch.float32), (4, torch.float32))
    )
    packed = Packed(
        hidden, cos, sin, starts, torch.tensor(numbers["n_visual"]), visual_rows, alive, image_idx,
        torch.tensor(numbers["n_text"]), text_rows,
    )  # fmt: skip
    return packed, is_kept, torch.tensor([kept for _, kept, *_ in samples])


def copied(packed, device):
    """With views of larger tensors again."""

    def copy(tensor):
        if tensor.ndim == 1:
            return tensor.clone().to(device)
        room = tensor.new_zeros(tensor.shape[0] + 2, tensor.stride(0)).to(device)
        room[: tensor.shape[0], : tensor.shape[1]] = tensor.to(device)
        return room[: tensor.shape[0], : tensor.shape[1]]

    return Packed(**{name: copy(tensor) for name, tensor in vars(packed).items()})


def check(packed, is_kept, n_keep, most, device):
    found = copied(packed, device)
    chosen = triton_module.close_up(found, is_kept.to(device), n_keep.to(device), most)
    wanted = plain.close_up_reference(packed, is_kept, n_keep, most)
    assert torch.equal(chosen.cpu(), wanted)
    for field in dataclasses.fields(Packed):
        one, other = getattr(found, field.name).cpu(), getattr(packed, field.name)
        assert torch.equal(one, other), field.name


SAMPLE = st.tuples(st.integers(0, 12), st.floats(0, 1), st.integers(0, 6), st.integers(0, 9)).map(
    lambda drawn: (drawn[0], round(drawn[0] * drawn[1]), *drawn[2:])
)


@settings(max_examples=examples(50), deadline=None)
@given(samples=st.lists(SAMPLE, min_size=1, max_size=3), room=st.integers(1, 9), seed=st.integers(0, 1 << 30))
def test_twin(samples, room, seed):
    most = max(kept for _, kept, *_ in samples)
    packed, is_kept, n_keep = make(samples, seed, room)
    check(packed, is_kept, n_keep, min(most + seed % 4, is_kept.shape[1]), DEVICE)


@pytest.mark.parametrize(
    "samples", [[(5, 5, 2, 3)], [(0, 0, 0, 4)], [(6, 0, 3, 1)], [(0, 0, 0, 0)] * 3 + [(4, 2, 0, 0)]]
)
def test_samples_that_keep_all_or_nothing(samples, device):
    check(*make(samples, 0), 5, device)


def test_more_than_a_block(device, monkeypatch):
    monkeypatch.setattr(triton_module, "_BLOCK", 16)
    monkeypatch.setattr(triton_module, "_MOST_COLUMNS", 4)
    samples = [(40, 11, 3, 20), (0, 0, 0, 0), (50, 50, 2, 0), (33, 32, 40, 9), (0, 0, 5, 3), (17, 0, 1, 1)]
    check(*make(samples, 3), 52, device)


def test_what_is_not_to_be_has_the_outcome_of_the_plain_function(device):
    """Fewer rows are kept than was said, as by a search that picks a row twice."""
    packed, is_kept, n_keep = make([(9, 4, 2, 2), (7, 5, 1, 3)], 1)
    check(packed, is_kept, n_keep + torch.tensor([2, 0]), 7, device)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 3, 5, 8], [7, 0, 3, 3], list(range(12))])
def test_rows_come_to_the_first_places(rows, device):
    tensors = [torch.randn(12, width) for width in (6, 4, 4)]
    found = [tensor.clone().to(device) for tensor in tensors]
    triton_module.gather_rows(torch.tensor(rows, device=device), *found)
    plain.gather_rows_reference(torch.tensor(rows), *tensors)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, tensors, strict=True))


LARGE = {
    "one": ([(4096, 1500, 60, 40)], 4608),
    "several": ([(4096, 4095, 50, 9), (0, 0, 0, 5), (1024, 1024, 7, 3), (2500, 3, 128, 30), (0, 0, 0, 0)], 8192),
    "many": ([(1000 + b, 400 + 7 * b, b, b % 3) for b in range(32)], 40960),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_large(case, device):
    samples, n_rows = LARGE[case]
    packed, is_kept, n_keep = make(samples, 0, most_visual=4096, n_rows=n_rows, size=3584, dtype=torch.bfloat16)
    check(packed, is_kept, n_keep, 4096, device)


@pytest.mark.gpu
def test_it_can_be_recorded(device, captured):
    """And goes on from what is there when it is replayed."""
    before, is_kept, n_keep = make([(400, 150, 20, 10), (0, 0, 0, 0), (300, 300, 5, 5), (256, 16, 64, 1)], 0)
    room = copied(before, device)
    on_device = is_kept.to(device), n_keep.to(device)  # the graph reads them
    graph, chosen = captured(triton_module.close_up, room, *on_device, 300)
    for one, other in zip(vars(room).values(), vars(before).values(), strict=True):
        one.copy_(other)
    graph.replay()
    assert torch.equal(chosen.cpu(), plain.close_up_reference(before, is_kept, n_keep, 300))
    assert all(torch.equal(vars(room)[name].cpu(), tensor) for name, tensor in vars(before).items())
