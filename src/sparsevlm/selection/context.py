"""Inputs and outputs of a selector."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..config import SCHEDULES, SparseVLMConfig

BEFORE_DECODER = "before_decoder"
TARGET_LAYERS = "target_layers"
EVERYWHERE = "both"
PLACEMENTS = (BEFORE_DECODER, TARGET_LAYERS, EVERYWHERE)
VISION_NEEDS = frozenset({"vision_attention", "vision_keys"})
# What only a decoder layer has.
_LATE_NEEDS = frozenset({"rater_attention", "last_attention", "prior_attention", "previous_hidden_states"})
# What padded samples can be given, by placement.
_PADDED_NEEDS = {
    TARGET_LAYERS: _LATE_NEEDS,
    BEFORE_DECODER: frozenset({"features", "text_features"}) | VISION_NEEDS,
}
# Visual tokens of a sample that a program chooses from, at most: what selectors hold for all pairs grows with the
# square.
_MOST_PADDED = 1 << 14
_OF_RECYCLING = frozenset({"recycle", "merge", "tau", "theta"})
NEEDS = ("features", "text_features", *sorted(VISION_NEEDS), *sorted(_LATE_NEEDS))


def legal_needs(placement: str) -> tuple[str, ...]:
    """Names that ``needs`` of a selector may list."""
    return tuple(name for name in NEEDS if placement != BEFORE_DECODER or name not in _LATE_NEEDS)


@dataclass(frozen=True)
class SelectionContext:
    """One sample at one target layer. Only what the selector ``needs`` is filled in, the rest is ``None``.

    Attributes
    ----------
    layer : int
        Target layer, or ``-1`` before the decoder.
    sample : int
        Index of the sample in the batch.
    config : SparseVLMConfig
    hidden_states : Tensor of shape (n_visual, hidden_size)
        Visual rows of the target layer's output (of the input embeddings before the decoder).
    coordinates : Tensor of shape (3, n_visual), int64
        M-RoPE coordinates (time, height, width) of the visual tokens.
    indices : Tensor of shape (n_visual,), int64
        Index of each row among all visual tokens of the sample, before any pruning.
    features : Tensor of shape (n_visual, hidden_size), optional
        Visual rows of the decoder's input embeddings.
    text_features : Tensor of shape (n_text, hidden_size), optional
        Input embeddings of all text of the sample, before, between and after its images; special tokens and what the
        chat template puts around a prompt are left out. (Raters come after the last image: earlier text cannot attend
        to it. An embedding can be compared wherever it stands.)
    rater_attention : Tensor of shape (n_raters, n_visual), float32, optional
        Post-softmax attention of the raters, mean over heads (over those that ``config.heads`` names). ``None`` before
        the decoder.
    last_attention : Tensor of shape (n_visual,), float32, optional
        Post-softmax attention of the last token of the prompt, mean over all heads. ``None`` before the decoder.
    prior_attention : Tensor of shape (n_visual,), float32, optional
        The same of the token right behind the last visual one: it has seen all images, and of a question behind them
        nothing. ``None`` before the decoder.
    vision_attention : Tensor of shape (2, n_visual), float32, optional
        Attention that each token receives in the vision tower, relative to an even share: summed over all queries of
        its image or frame, mean over heads and over its merged patches. It is 1 on average in every image and frame,
        so that small and large ones compare. Row 0: of the blocks with full attention, the one nearest to the middle of
        the tower, row 1: the last.
    vision_keys : Tensor of shape (n_visual, head_dim), float32, optional
        Rotated keys of the vision tower's last block with full attention, mean over heads and merged patches.
    previous_hidden_states : Tensor of shape (n_visual, hidden_size), optional
        Visual rows of the target layer's input. ``None`` before the decoder.
    n_clusters : int, optional
        How many of the kept rows have to be clusters of dropped ones; ``None`` leaves it to the selector. Only given
        to selectors that declare ``recycles``.
    image_idx : Tensor of shape (n_visual,), int64, optional
        Which image or video of the sample each row is of, counted from 0 in prompt order; ``None``: all of one.
    n_images : int
        Images and videos of the sample, also those of which no row is left.
    """

    layer: int
    sample: int
    config: SparseVLMConfig
    hidden_states: Tensor
    coordinates: Tensor
    indices: Tensor
    features: Tensor | None = None
    text_features: Tensor | None = None
    rater_attention: Tensor | None = None
    last_attention: Tensor | None = None
    prior_attention: Tensor | None = None
    vision_attention: Tensor | None = None
    vision_keys: Tensor | None = None
    previous_hidden_states: Tensor | None = None
    n_clusters: int | None = None
    image_idx: Tensor | None = None
    n_images: int = 1

    @property
    def n_visual(self) -> int:
        """Visual tokens that reached this layer."""
        return self.hidden_states.shape[0]

    def at(self, rows: Tensor) -> SelectionContext:
        """A copy with some of the visual rows only, given as indices of shape (n_rows,)."""
        of_rows = ("hidden_states", "indices", "features", "image_idx", "vision_keys", "previous_hidden_states")
        by_column = ("coordinates", "rater_attention", "vision_attention")
        of_tokens = ("last_attention", "prior_attention")
        given = {name: getattr(self, name) for name in (*of_rows, *of_tokens, *by_column, "text_features")}
        taken = {name: value for name, value in given.items() if value is not None}
        for name, value in taken.items():
            taken[name] = (
                value.clone() if name == "text_features" else value[..., rows] if name in by_column else value[rows]
            )
        return dataclasses.replace(self, **taken)


@dataclass(frozen=True)
class Selection:
    """The outcome for one sample.

    Attributes
    ----------
    keep_idx : Tensor of shape (n_keep,), int64
        Rows that go on, sorted, recycled ones included.
    merge_target : Tensor of shape (n_visual,), int64, optional
        Row of ``keep_idx`` (as an index into the visual rows) that each row is merged into, -1 for rows that are
        dropped for good. A kept row's target is itself.
    weight : Tensor of shape (n_visual,), float32, optional
        Weight of each row in its target: ``h'[j] = Σ_{i: merge_target[i] = j} weight[i] h[i]``. Given with
        ``merge_target``.
    recycled_idx : Tensor of shape (n_recycled,), int64, optional
        The part of ``keep_idx`` that stands for merged dropped tokens (for the report).
    """

    keep_idx: Tensor
    merge_target: Tensor | None = None
    weight: Tensor | None = None
    recycled_idx: Tensor | None = None


@runtime_checkable
class Selector(Protocol):
    """A selection method. Optional attributes and their defaults: ``name`` (the class name), ``placement``
    (``"target_layers"``, out of :data:`PLACEMENTS`), ``needs`` (``()``, out of :data:`NEEDS`), ``default_schedule``
    (``"geometric"``), ``recycles`` (``False``), ``draws`` (``False``: whether the choice depends on ``config.seed``),
    ``reads`` (``()``: other options that it reads), ``overrides`` (``{}``, see
    :func:`~sparsevlm.selection.overrides.effective_config`). An optional method ``select_batch(contexts, n_keep)``
    answers one or several samples with as many rows each, in their order, and is then called in place of ``select``,
    unless a subclass of its class has defined ``select`` anew. So are optional methods that let the engine capture the
    choice: ``order(states, valid, n_keep)``, see :class:`OrderedSelector`, and ``select_padded(context)``, see
    :class:`~sparsevlm.selection.padded.PaddedSelector`; for samples of at most ``most_padded`` (16384) visual
    tokens. One that runs before the decoder may be ``adaptive`` (``False``): without a budget ``n_keep`` is then
    ``None``, it takes as many rows as it likes, and ``select_batch`` is given samples of any sizes together; the engine
    captures the choice of one that has a method ``adaptive_order``, see :class:`AdaptiveSelector`."""

    def select(self, context: SelectionContext, n_keep: int) -> Selection | Tensor:
        """Choose exactly ``n_keep`` of ``context.n_visual`` rows; bare sorted indices are a shorthand."""
        ...


@runtime_checkable
class OrderedSelector(Selector, Protocol):
    """A selector that needs nothing but the states, and chooses without waiting for any value of the device."""

    def order(self, states: Tensor, valid: Tensor, n_keep: int) -> Tensor:
        """Rows in the order in which they are picked: fewer are a part from the left.

        A fourth parameter named ``counts``, a Tensor of shape (n_samples,), int64, or None, may be there: picks of each
        sample that are looked at; those behind may be any rows.

        Parameters
        ----------
        states : Tensor of shape (n_samples, n_visual, hidden_size)
            May be overwritten.
        valid : Tensor of shape (n_samples, n_visual), bool
            False for rows that only fill a sample up; to be picked last.
        n_keep : int

        Returns
        -------
        Tensor of shape (n_samples, n_keep), int64
        """
        ...


@runtime_checkable
class AdaptiveSelector(Selector, Protocol):
    """A selector that says how many tokens go on, without waiting for any value of the device."""

    def adaptive_order(self, states: Tensor, valid: Tensor, least: Tensor, most_least: int) -> tuple[Tensor, Tensor]:
        """Rows in the order in which they are picked, and how many go on.

        Parameters
        ----------
        states : Tensor of shape (n_samples, n_visual, hidden_size)
            May be overwritten.
        valid : Tensor of shape (n_samples, n_visual), bool
            False for rows that only fill a sample up; to be picked last.
        least : Tensor of shape (n_samples,), int64
            Rows of each sample that go on at least, of the valid ones.
        most_least : int
            No sample's ``least`` is above it.

        Returns
        -------
        order : Tensor of shape (n_samples, n_picks), int64
            Behind the rows of a sample that go on anything.
        counts : Tensor of shape (n_samples,), int64
            At most ``n_picks``.
        """
        ...


@dataclass(frozen=True)
class SelectorTraits:
    """The declared attributes of a selector, checked."""

    name: str
    placement: str
    needs: frozenset[str]
    default_schedule: str
    recycles: bool
    draws: bool
    reads: frozenset[str]
    batched: bool
    ordered: bool
    padded: bool
    most_padded: int
    adaptive: bool
    counts_on_device: bool

    @classmethod
    def of(cls, selector: Any) -> SelectorTraits:
        """Read and check what ``selector`` declares.

        Raises
        ------
        TypeError, ValueError
            If an attribute is not what the protocol allows.
        """
        name = getattr(selector, "name", None) or type(selector).__name__
        placement = getattr(selector, "placement", TARGET_LAYERS)
        if placement not in PLACEMENTS:
            raise ValueError(f"selector {name!r}: placement must be one of {PLACEMENTS}, got {placement!r}.")
        declared = getattr(selector, "needs", ())
        is_collection = isinstance(declared, Collection) and not isinstance(declared, str)
        if not is_collection or not all(isinstance(need, str) for need in declared):
            raise TypeError(
                f"selector {name!r}: needs must be a collection of names, such as {{'features'}}, got {declared!r}."
            )
        needs = frozenset(declared)
        if unknown := needs - set(NEEDS):
            raise ValueError(
                f"selector {name!r} needs {', '.join(sorted(unknown))}, which is not provided; "
                f"provided are {', '.join(NEEDS)}."
            )
        if late := needs - set(legal_needs(placement)):
            missing = ", ".join(sorted(late))
            raise ValueError(f"selector {name!r} runs before the decoder, where {missing} do not exist.")
        schedule = getattr(selector, "default_schedule", "geometric")
        if schedule not in SCHEDULES:
            raise ValueError(f"selector {name!r}: default_schedule must be one of {SCHEDULES}, got {schedule!r}.")
        recycles, draws = bool(getattr(selector, "recycles", False)), bool(getattr(selector, "draws", False))
        reads = frozenset(getattr(selector, "reads", ())) | (_OF_RECYCLING if recycles else frozenset())
        ordered = placement != EVERYWHERE and not needs and _has_method(type(selector), "order")
        batched = _has_method(type(selector), "select_batch")
        padded = placement != EVERYWHERE and needs <= _PADDED_NEEDS[placement]
        padded = padded and _has_method(type(selector), "select_padded")
        most = min(_MOST_PADDED, getattr(selector, "most_padded", _MOST_PADDED))
        adaptive = bool(_own(type(selector), "adaptive"))
        if adaptive and placement != BEFORE_DECODER:
            raise ValueError(
                f"selector {name!r} is adaptive and runs at {placement!r}: without a budget the rank decides there. "
                f"Only one with placement = {BEFORE_DECODER!r} may choose how many tokens go on."
            )
        on_device = adaptive and not needs and _has_method(type(selector), "adaptive_order")
        return cls(
            *(str(name), placement, needs, schedule, recycles, draws, reads),
            *(batched, ordered, padded, most, adaptive, on_device),
        )


def _has_method(selector: type, name: str) -> bool:
    """Tells whether this is a method; see :func:`_own`."""
    return callable(_own(selector, name))


def _own(selector: type, name: str) -> Any:
    """An attribute of a class, unless a subclass left it behind when it defined ``select`` anew."""
    for cls in selector.__mro__:
        if name in vars(cls):
            return vars(cls)[name]
        if "select" in vars(cls):
            return None
    return None
