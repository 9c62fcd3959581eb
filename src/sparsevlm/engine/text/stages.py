"""How many visual tokens go on from each target layer, as far as the host knows beforehand, and the record of what the
device has chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import energy_rank
from ...models import ModelAdapter
from ...request.request import Request
from ...request.sample import Sample, StageRecord
from ...request.step import reads_text
from ...selection.budget import clamped_floors, nothing_by_rank, nothing_to_drop, rank_adaptive_count
from .workspace import MOST_STAGES

# Room for the text of a sample that is read, at least.
_LEAST_TEXT = 64


@dataclass(frozen=True)
class TokenCounts:
    """Visual tokens by stage (before the first target that may drop something, and after each) and sample.

    Attributes
    ----------
    targets : tuple of int
        Those that may drop something.
    most, least : list of list of int
        Equal where a budget is fixed; where the rank decides, it is at most the number of raters, and not below 0.
    by_rank : bool
    is_free : bool
        Whether an adaptive selector decides: ``most`` are all until the device has told (:meth:`told`).
    """

    targets: tuple[int, ...]
    most: list[list[int]]
    least: list[list[int]]
    by_rank: bool
    is_free: bool = False

    @classmethod
    def of(cls, request: Request) -> TokenCounts:
        """Of a request whose samples are on the host."""
        targets: list[int] = []
        chooses_freely = is_free(request)
        by_rank = not chooses_freely and any(sample.plan is None for sample in request.samples)
        most = [[sample.alive.shape[0] for sample in request.samples]]
        least = [list(most[0])]
        for stage, target in enumerate(request.target_layers):
            bounds = [
                _bounds(request, sample, stage, low, high)
                for sample, low, high in zip(request.samples, least[-1], most[-1], strict=True)
            ]
            lows, highs = map(list, zip(*bounds, strict=True))
            # A rank is asked for also where it cannot drop anything.
            if highs != most[-1] or lows != least[-1] or (by_rank and max(most[-1]) > request.config.min_keep):
                targets.append(target)
                least.append(lows)
                most.append(highs)
        return cls(tuple(targets), most, least, by_rank, chooses_freely)

    def told(self, n_visual: list[int]) -> TokenCounts:
        """The same, where the device has told how many tokens of each sample leave the only target."""
        most, least = [self.most[0], n_visual], [self.least[0], n_visual]
        return TokenCounts(self.targets, most, least, self.by_rank, self.is_free)

    def by_layer(self, by_stage: Sequence[int], n_layers: int) -> tuple[int, ...]:
        """For each layer what belongs to its stage."""
        return tuple(by_stage[sum(target < layer for target in self.targets)] for layer in range(n_layers))

    @property
    def asked(self) -> list[list[int]]:
        """What the device is told of each target and sample; -1: the rank decides."""
        return [[-1] * len(stage) if self.by_rank else stage for stage in self.most[1:]]


def _bounds(request: Request, sample: Sample, stage: int, low: int, high: int) -> tuple[int, int]:
    """Least and most tokens that leave a target layer, of a sample of which ``low`` to ``high`` reach it."""
    config = request.config
    if sample.plan is not None:
        n_keep = sample.plan.counts[stage]
        left = high if nothing_to_drop(high, n_keep, config.min_keep) is not None else n_keep
        return left, left
    if request.traits.adaptive:
        return min(low, config.min_keep), high
    return _by_rank(request, low, 0)[0], most_by_rank(request, high, sample.rater_candidates.shape[0])


def most_by_rank(request: Request, n_visual: int, n_raters: int) -> int:
    """Tokens that leave a layer by the rank rule at most, of at most ``n_visual``: a rank is not above the raters."""
    most = _by_rank(request, n_visual, min(n_visual, n_raters))[0]
    return max(most, min(n_visual, request.config.min_keep))


def _by_rank(request: Request, n_visual: int, rank: int) -> tuple[int, int]:
    """Tokens that leave a layer by the rank rule, and how many of them are clusters."""
    config = request.config
    if n_visual <= config.min_keep:
        return n_visual, 0
    recycles = config.recycle and request.traits.recycles
    n_keep, n_clusters = rank_adaptive_count(
        n_visual, rank, config.rank_lambda, config.tau, config.theta, recycles, config.min_keep
    )
    return min(n_visual, n_keep), n_clusters


def text_capacity(request: Request) -> int:
    """Room for the text of every sample that is read: few sizes, since a program is made for each, and what is empty
    costs little."""
    most = max(_LEAST_TEXT, *(text_read(request, sample).shape[0] for sample in request.samples))
    doublings = (most - 1).bit_length()
    return 1 << doublings + doublings % 2


def text_read(request: Request, sample: Sample) -> Tensor:
    """Positions of the text of a sample that is read: what may vote, or all that a selector compares."""
    return sample.text if "text_features" in request.traits.needs else sample.rater_candidates


def is_free(request: Request) -> bool:
    """Tells whether an adaptive selector is asked without a budget."""
    return request.traits.adaptive and any(sample.plan is None for sample in request.samples)


def chooses_on_device(request: Request, adapter: ModelAdapter) -> bool:
    """Tells whether neither counts nor choices of a request wait for the device."""
    config, traits = request.config, request.traits
    most = max(sample.alive.shape[0] for sample in request.samples)
    if is_free(request):
        return traits.counts_on_device and most <= traits.most_padded
    if not (traits.ordered or traits.padded) or most > traits.most_padded or len(request.target_layers) > MOST_STAGES:
        return False
    has_floors = config.min_keep_per_image > 0 and any(len(sample.image_sizes) > 1 for sample in request.samples)
    if has_floors and not traits.ordered:
        return False
    if all(sample.plan is not None for sample in request.samples):
        return True
    weight = adapter.decoder.embed.weight
    n_text = text_capacity(request)
    ranks = not weight.is_cuda or energy_rank.is_quick(weight, (n_text, n_text), config.rank_tolerance)
    return ranks and not (has_floors and config.strict)


@dataclass(frozen=True)
class Choice:
    """What a prune step has chosen, as parts of one tensor.

    Attributes
    ----------
    alive : Tensor of shape (batch, n_keep), int64
        Visual tokens that are left, ascending, as indices into those of the prompt; the first ``n_visual`` count.
    is_recycled : Tensor of shape (batch, n_keep), int64
        Which of these stand for clusters.
    n_visual, ranks : Tensor of shape (batch,), int64
    is_rater : Tensor of shape (batch, n_text), int64
    """

    alive: Tensor
    is_recycled: Tensor
    n_visual: Tensor
    ranks: Tensor
    is_rater: Tensor

    @classmethod
    def of(cls, packed: Tensor, batch: int, n_keep: int, n_text: int) -> Choice:
        """Views of what :meth:`packed` gave."""
        shapes = [(batch, n_keep), (batch, n_keep), (batch,), (batch,), (batch, n_text)]
        sizes = [batch * n_keep, batch * n_keep, batch, batch, batch * n_text]
        return cls(*(part.view(one) for part, one in zip(packed.split(sizes), shapes, strict=True)))

    def packed(self) -> Tensor:
        """All of it as one tensor."""
        return torch.cat([part.flatten() for part in vars(self).values()])


def record(request: Request, counts: TokenCounts, choices: Sequence[Choice], n_layers: int) -> None:
    """Bring a request's samples up to date as a prune step does.

    Parameters
    ----------
    request : Request
        Its samples are on the host.
    counts : TokenCounts
    choices : sequence of Choice
        Of each target that may drop something; on the host.
    n_layers : int
    """
    first = [sample.alive for sample in request.samples]
    targets = iter(request.target_layers)
    target = next(targets, None)
    for layer_idx in range(-1, n_layers):
        for sample in request.samples if layer_idx >= 0 else ():
            sample.enter_layer()
        if layer_idx != target:
            continue
        choice = choices[counts.targets.index(target)] if target in counts.targets else None
        keeps_all = request.keeps_all(target)
        for b, sample in enumerate(request.samples):
            _record_stage(request, b, target, choice, first[b])
            if choice is not None and not keeps_all and reads_text(request) and sample.stages[-1].n_in:
                is_rater = choice.is_rater[b, : sample.rater_candidates.shape[0]].bool()
                sample.stages[-1].raters = sample.rater_candidates[is_rater]
        target = next(targets, None)


def _record_stage(request: Request, b: int, target: int, choice: Choice | None, first: Tensor) -> None:
    """Record what was decided of one sample at one target, and leave out what does not go on."""
    config, sample = request.config, request.samples[b]
    n_in, rank = sample.alive.shape[0], None
    n_keep = None if sample.plan is None else sample.plan.counts[request.target_layers.index(target)]
    skipped = nothing_to_drop(n_in, n_keep, config.min_keep)
    if skipped is None and n_keep is None and request.traits.adaptive:
        assert choice is not None  # of the only target
        n_keep = int(choice.n_visual[b])
    if skipped is None and n_keep is None:
        assert choice is not None  # of a target that may drop something
        rank = int(choice.ranks[b])
        n_keep, n_clusters = _by_rank(request, n_in, rank)
        skipped = nothing_by_rank(n_in, n_keep, n_clusters, rank, config.tau, config.theta)
    stage = StageRecord(target, n_in, rank, skipped, kept=sample.alive if n_in else None)
    sample.add_stage(stage)
    if skipped is not None:
        return
    assert choice is not None
    assert n_keep is not None
    if rank is not None and len(sample.image_sizes) > 1 and config.min_keep_per_image:
        clamped = clamped_floors(sample.n_per_image, n_keep, config.min_keep_per_image, target)
        if clamped is not None:
            request.clamp(sample, clamped)
    n_left = int(choice.n_visual[b])
    left = choice.alive[b, :n_left]
    sample.keep_only(first[left])
    stage.kept = sample.alive
    recycled = choice.is_recycled[b, :n_left].bool()
    if bool(recycled.any()):
        stage.recycled = sample.alive[recycled]
