"""The prune step at a target layer: reads, decides, records. Both paths take it; they only gather what goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..selection.budget import nothing_to_drop
from ..selection.context import Selection, SelectionContext
from ..selection.decide import decide
from ..selection.raters import attention_raters, embedding_raters
from ..selection.recycle import merge_hidden_states
from .request import Request
from .sample import Sample, StageRecord
from .tensor_parallel import choose_on_first_rank


@dataclass(frozen=True)
class VisionRows:
    """Readings of the vision tower for some visual tokens, named as in ``SelectionContext``.

    Attributes
    ----------
    vision_attention : Tensor of shape (2, n_visual), float32, optional
    vision_keys : Tensor of shape (n_visual, head_dim), float32, optional
    """

    vision_attention: Tensor | None = None
    vision_keys: Tensor | None = None

    @property
    def n_visual(self) -> int:
        """Number of tokens."""
        if self.vision_attention is not None:
            return self.vision_attention.shape[1]
        return 0 if self.vision_keys is None else self.vision_keys.shape[0]

    def holds(self, needs: frozenset[str]) -> bool:
        """Tells whether all of ``needs`` were read."""
        return all(getattr(self, need) is not None for need in needs)

    def only(self, needs: frozenset[str]) -> VisionRows:
        """Without what ``needs`` does not name."""
        return VisionRows(**{need: getattr(self, need) for need in needs})

    def each(self, change: Callable[[Tensor, int], Tensor]) -> VisionRows:
        """What ``change(tensor, dim)`` makes of each, ``dim`` being that of the tokens."""
        attention, keys = self.vision_attention, self.vision_keys
        return VisionRows(
            None if attention is None else change(attention, 1), None if keys is None else change(keys, 0)
        )

    def at(self, index: Tensor) -> VisionRows:
        """Rows of the given indices, on the device of the index."""
        return self.each(lambda rows, dim: rows.to(index.device).index_select(dim, index))

    @staticmethod
    def joined(parts: Sequence[VisionRows]) -> VisionRows:
        """Rows one behind the other, on the device of the first."""

        def join(read: list[Tensor | None], dim: int) -> Tensor | None:
            tensors = [tensor for tensor in read if tensor is not None]
            return torch.cat([tensor.to(tensors[0].device) for tensor in tensors], dim=dim) if tensors else None

        return VisionRows(
            join([part.vision_attention for part in parts], 1), join([part.vision_keys for part in parts], 0)
        )


@dataclass
class Readout:
    """Readings of one target layer, by sample; empty where nothing was read.

    Attributes
    ----------
    text : list of Tensor of shape (n_voters, n_visual), float32
        Attention of the text that may vote to the visual tokens that are left.
    last : list of Tensor of shape (n_visual,), float32
        That of the prompt's last token.
    prior : list of Tensor of shape (n_visual,), float32
        That of the token right behind the last visual one.
    previous : list of Tensor of shape (n_visual, hidden_size)
        The layer's input.
    vision : list of VisionRows
        What the vision tower told of all visual tokens of the sample.
    """

    text: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)
    prior: list[Tensor] = field(default_factory=list)
    previous: list[Tensor] = field(default_factory=list)
    vision: list[VisionRows] = field(default_factory=list)


@dataclass(frozen=True)
class Survivors:
    """Visual tokens of a sample that go on from a target layer.

    Attributes
    ----------
    before, after : Tensor
        Positions of the visual tokens that reached it, and of those that go on; ascending.
    selection : Selection or None
        ``None``: all of them.
    """

    before: Tensor
    after: Tensor
    selection: Selection | None

    @property
    def merges(self) -> bool:
        """Tells whether states are merged, so that :meth:`merged` takes the place of those that go on."""
        return self.selection is not None and self.selection.merge_target is not None

    def merged(self, states: Tensor) -> Tensor:
        """States of those that go on, out of the states of those that reached the layer."""
        selection = self.selection
        assert selection is not None
        assert selection.merge_target is not None
        assert selection.weight is not None
        return merge_hidden_states(states, selection.keep_idx, selection.merge_target, selection.weight)

    def of(self, rows: Tensor) -> Tensor:
        """What goes on of rows, (n_before, size), that belong to the tokens that reached the layer."""
        if self.selection is None:
            return rows
        rows = rows.to(self.selection.keep_idx.device)
        return self.merged(rows) if self.merges else rows[self.selection.keep_idx]


def prune_step(
    request: Request, target: int, states: Callable[[int], Tensor], readout: Readout
) -> list[Survivors] | None:
    """Decide at a target layer what goes on, and record it.

    Parameters
    ----------
    request : Request
        Its samples are brought up to date.
    target : int
        Layer whose output is pruned; -1: before the decoder.
    states : callable
        ``states(b)`` gives the visual rows of sample b in that output, (n_visual, hidden_size).
    readout : Readout

    Returns
    -------
    list of Survivors or None
        By sample; ``None``: nothing is dropped.

    Raises
    ------
    ValueError, TypeError
        If a selector's answer is ill-formed, or what it judges by holds NaN.
    RuntimeError
        On all ranks of a tensor-parallel model but the first, where that happens on the first.
    """
    if request.first is not None:
        selections = request.selections[target]
    else:
        with no_autocast(request.samples[0].alive.device):
            if request.tp_group is None:
                selections = _select(request, target, states, readout)
            else:
                selections = choose_on_first_rank(request, lambda: _select(request, target, states, readout))
        request.record_selections(target, selections)
    survivors = []
    for sample, selection in zip(request.samples, selections, strict=True):
        before = sample.positions
        if selection is not None:
            sample.keep(selection.keep_idx)
        survivors.append(Survivors(before, sample.positions, selection))
    return None if all(selection is None for selection in selections) else survivors


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context without the user's ``torch.autocast``: what is read and decided is not rounded to half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _select(request: Request, target: int, states: Callable[[int], Tensor], readout: Readout) -> list[Selection | None]:
    """Selections of all samples, recorded."""
    selections: list[Selection | None] = [None] * len(request.samples)
    with_visual = [b for b, sample in enumerate(request.samples) if sample.alive.shape[0]]
    # One by one where the selector takes no more, so that what it is given exists for one sample at a time.
    for group in [with_visual] if request.traits.batched else [[b] for b in with_visual]:
        for b, selection in zip(group, _decide(request, target, group, states, readout), strict=True):
            selections[b] = selection
    for sample in request.samples:
        if not sample.alive.shape[0]:
            sample.add_stage(StageRecord(target, 0, None, nothing_to_drop(0, None, request.config.min_keep)))
    return selections


def reads_text(request: Request) -> bool:
    """Tells whether the attention of the text that may vote is needed: by the selector, or by the rank that decides."""
    if request.first is not None:
        return False
    by_rank = not request.traits.adaptive and any(sample.plan is None for sample in request.samples)
    return by_rank or "rater_attention" in request.traits.needs


def reads(request: Request) -> bool:
    """Tells whether anything of a target layer has to be read while it runs."""
    if request.first is not None:
        return False
    of_layer = {"last_attention", "prior_attention", "previous_hidden_states"}
    return reads_text(request) or bool(of_layer & request.traits.needs)


def choose_embedding_raters(request: Request, states: Callable[[int, Tensor], Tensor]) -> None:
    """Choose the raters that are chosen once, from the prompt's embeddings, if they are needed.

    Parameters
    ----------
    request : Request
    states : callable
        ``states(b, positions)`` gives the embeddings of sample b at some positions.
    """
    if request.config.raters != "embedding" or not reads_text(request) or request.drops_nothing:
        return
    with no_autocast(request.samples[0].alive.device):
        for b, sample in enumerate(request.samples):
            sample.embedding_raters = embedding_raters(states(b, sample.positions), states(b, sample.rater_candidates))


def _decide(
    request: Request, target: int, group: Sequence[int], states: Callable[[int], Tensor], readout: Readout
) -> list[Selection | None]:
    """Selections of some samples, given by their rows of the batch, recorded as a stage of each."""
    raters = [_raters(request, request.samples[b], readout.text[b]) if readout.text else None for b in group]
    contexts = [_context(request, b, target, states(b), readout, mask) for b, mask in zip(group, raters, strict=True)]
    place = request.target_layers.index(target)
    plans = [request.samples[b].plan for b in group]
    n_keeps = [None if plan is None else plan.counts[place] for plan in plans]
    decisions = decide(contexts, request.selector, request.traits, n_keeps)
    for b, mask, context, decision in zip(group, raters, contexts, decisions, strict=True):
        sample, selection = request.samples[b], decision.selection
        record = StageRecord(
            target, context.hidden_states.shape[0], decision.rank, decision.skipped_because, kept=sample.alive
        )
        record.raters = None if mask is None else sample.rater_candidates[mask]
        if selection is not None:
            record.kept = sample.alive[selection.keep_idx]
            if selection.recycled_idx is not None:
                record.recycled = sample.alive[selection.recycled_idx]
        sample.add_stage(record)
        if decision.clamped is not None:
            request.clamp(sample, decision.clamped)
    return [decision.selection for decision in decisions]


def _raters(request: Request, sample: Sample, attention: Tensor) -> Tensor:
    """Mask of the raters among a sample's candidates, (n_candidates,) bool, by their attention to its visual tokens."""
    if request.config.raters == "all":
        return attention.new_ones(attention.shape[0], dtype=torch.bool)
    if request.config.raters == "attention":
        return attention_raters(attention)
    assert sample.embedding_raters is not None  # chosen before the decoder
    return sample.embedding_raters.to(attention.device)


def _context(
    request: Request, b: int, target: int, hidden_states: Tensor, readout: Readout, raters: Tensor | None
) -> SelectionContext:
    """Builds the selector's context of one sample from the request and the readings."""
    sample, needs, device = request.samples[b], request.traits.needs, hidden_states.device
    read: dict[str, Any] = {}
    if request.features is not None:
        features = request.features[b].to(device)
        if "features" in needs:
            read["features"] = features[sample.positions]
        if "text_features" in needs:
            read["text_features"] = features[sample.text]
    vision = readout.vision[b].at(sample.alive) if readout.vision else VisionRows()
    return SelectionContext(
        layer=target,
        sample=b,
        config=request.config,
        hidden_states=hidden_states,
        coordinates=sample.coordinates_on(device),
        indices=sample.alive.clone(),  # a selector may write into what it is given
        image_idx=sample.image_idx,
        n_images=max(1, len(sample.image_sizes)),
        rater_attention=None if raters is None else readout.text[b][raters],
        last_attention=readout.last[b] if readout.last else None,
        prior_attention=readout.prior[b] if readout.prior else None,
        previous_hidden_states=readout.previous[b].to(device) if readout.previous else None,
        vision_attention=vision.vision_attention,
        vision_keys=vision.vision_keys,
        **read,
    )
