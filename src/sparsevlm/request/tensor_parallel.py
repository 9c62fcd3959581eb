"""Ranks of a tensor-parallel model: the first one chooses the tokens of all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..error_notes import with_notes
from ..selection.context import Selection
from .request import Request
from .sample import Sample, StageRecord


def all_heads(states: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Queries or keys of all heads, of which every rank has as many.

    Parameters
    ----------
    states : Tensor of shape (batch, heads / n_ranks, n, head_dim)
    group : ProcessGroup
        In the order in which its ranks have the heads.

    Returns
    -------
    Tensor of shape (batch, heads, n, head_dim)
    """
    own = states.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts, dim=1)


def check_alike(request: Request, device: torch.device) -> None:
    """Refuse a request that is another one on another rank: each would wait for what the other never does.

    Parameters
    ----------
    request : Request
    device : torch.device
        Of the model.

    Raises
    ------
    RuntimeError
        On all ranks.
    """
    plans = [None if sample.plan is None else sample.plan.counts for sample in request.samples]
    counts = [sample.visual.shape[0] for sample in request.samples]
    mark = zlib.crc32(repr((request.traits.name, request.target_layers, counts, plans)).encode())
    extremes = torch.tensor([mark, -mark], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=request.tp_group)
    most, least = extremes.tolist()
    if most != -least:
        raise RuntimeError(
            "the ranks of a tensor-parallel model were given different requests or options: rank "
            f"{dist.get_rank()} has samples of {counts} visual tokens and selector {request.traits.name!r} at layers "
            f"{request.target_layers}, with budgets {plans}. Give all ranks the same inputs, and call apply_sparsevlm "
            "with the same options on all."
        )


def choose_on_first_rank(request: Request, select: Callable[[], list[Selection | None]]) -> list[Selection | None]:
    """Selections of all samples, the same on all ranks, and recorded alike.

    What a selector judges by may differ by rounding from rank to rank, and what it draws altogether.

    Parameters
    ----------
    request : Request
    select : callable
        Chooses, and records a stage of every sample; called on the first rank alone.

    Raises
    ------
    RuntimeError
        On the other ranks, if ``select`` raises on the first.
    """
    group, device = request.tp_group, request.samples[0].alive.device
    assert group is not None
    if dist.get_rank(group) != 0:
        told = _broadcast(None, group, device)
        if "error" in told:
            raise RuntimeError(f"the first rank, which chooses the tokens of all, has failed: {told['error']}")
        return [_take(request, sample, one) for sample, one in zip(request.samples, told["samples"], strict=True)]
    try:
        selections = select()
    except Exception as error:
        _broadcast({"error": f"{type(error).__name__}: {with_notes(error)}"}, group, device)
        raise
    samples = [_told(sample, own) for sample, own in zip(request.samples, selections, strict=True)]
    _broadcast({"samples": samples}, group, device)
    return selections


def _broadcast(message: Mapping[str, Any] | None, group: dist.ProcessGroup, device: torch.device) -> dict[str, Any]:
    """The first rank's message; as JSON, which brings numbers unchanged and runs no code."""
    words = b"" if message is None else json.dumps(message).encode()
    length = torch.tensor([len(words)], device=device)
    dist.broadcast(length, group=group, group_src=0)
    if message is None:
        sent = torch.empty(int(length), dtype=torch.uint8, device=device)
    else:
        sent = torch.frombuffer(bytearray(words), dtype=torch.uint8).to(device)
    dist.broadcast(sent, group=group, group_src=0)
    received: dict[str, Any] = json.loads(sent.cpu().numpy().tobytes())
    return received


def _told(sample: Sample, selection: Selection | None) -> dict[str, Any]:
    """What the other ranks have to know of a choice, of which the sample's last stage is the record."""
    return {
        "stage": _plain(sample.stages[-1]),
        "selection": None if selection is None else _plain(selection),
        "clamped": sample.clamped,
    }


def _take(request: Request, sample: Sample, told: Mapping[str, Any]) -> Selection | None:
    """Record what the first rank has chosen."""
    device = sample.alive.device
    sample.add_stage(StageRecord(**_tensors(told["stage"], device)))
    for reason in told["clamped"][len(sample.clamped) :]:
        request.clamp(sample, reason)
    return None if told["selection"] is None else Selection(**_tensors(told["selection"], device))


def _plain(record: StageRecord | Selection) -> dict[str, Any]:
    """Fields of a record, tensors as lists."""
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(record).items()}


def _tensors(fields: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same with tensors."""
    dtypes = {"weight": torch.float32}
    return {
        name: torch.tensor(value, dtype=dtypes.get(name, torch.int64), device=device)
        if isinstance(value, list)
        else value
        for name, value in fields.items()
    }
