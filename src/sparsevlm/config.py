"""Every option of the pruning, checked in one place."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

RATER_MODES = ("attention", "embedding", "all")
HEADS = ("all", "visual")
MERGES = ("mean", "sum")
SCHEDULES = ("geometric", "single")
WEIGHTS = ("model", "fp8")
FIRST, REFRESH, AGNOSTIC = TURNS = ("first", "refresh", "agnostic")
MAX_SEED = 2**63 - 1
# Arguments of apply_sparsevlm that are no fields of the configuration.
OF_APPLY = ("config", "processor", "warmup", "allow_untested", "family")
_LEAST_ALIKE = 0.5  # of two names, as difflib measures it
_MAX_BITS = 1023  # a float can hold what has no more

# Tokens that leave each target layer, recycled ones included, per 576 visual tokens (the authors' code, v1.5 lists:
# kept 300/200/110, 303/110/36 and 66/30/17, plus the clusters that its recycling adds).
_PAPER_OUTPUTS = {
    "paper-192": (309, 204, 113),
    "paper-128": (312, 117, 39),
    "paper-64": (82, 32, 18),
}
_PAPER_N_VISUAL = 576
PRESETS = tuple(_PAPER_OUTPUTS)


@dataclass(frozen=True)
class SparseVLMConfig:
    """Options of :func:`sparsevlm.apply_sparsevlm`; immutable, validated on construction.

    Parameters
    ----------
    n_vis : int, optional
        Expected number of visual tokens of a sample: a hint that is checked against the inputs, never trusted.
    target_layers : sequence of int, optional
        Decoder layers on whose output tokens are dropped. ``None``: every 4th layer from layer 2, or before the decoder
        where the selector runs there, as the default one does.
    min_keep : int
        Never fewer visual tokens of a sample than this, recycled ones included.
    min_keep_per_image : int
        Where a sample has several images or videos: never fewer tokens of each than this, or than it has; a recycled
        one counts for the image that holds its centre. They are part of the budget. Where the tokens that go on are too
        few for it, each image keeps an even share of them, and the report says so. 0: images may lose all their tokens.
    tau : float
        Fraction of the dropped tokens that is recycled, in [0, 1] (paper, token recycling).
    theta : float
        Clusters per recycled token, in [0, 1] (paper, token recycling).
    keep : int, float, or sequence of them, optional
        Budget: visual tokens of a sample averaged over all decoder layers, counted at each layer's input, recycled
        tokens included. An ``int`` is a number of tokens, a ``float`` in (0, 1] a fraction; a sequence gives one
        budget per sample of the batch. ``None``: an adaptive selector decides, such as the default one; of others the
        rank of the rater attention.
    selector : str or object, optional
        Name of a built-in selector, or an object of the protocol ``select(context, n_keep) -> Selection``. ``None``
        is ``"span-features"``, which runs before the decoder; ``"span"``, its like at target layers, where
        ``target_layers`` or a ``schedule`` is given; with a preset the paper's method, ``"sparsevlm"``. A selector
        may set options by itself: it wins over an option that has its default value (also where that was written
        down), and contradicts any other, which raises.
    raters : {"attention", "embedding", "all"}
        How text raters are chosen: by visual attention at the target layer, or once by embedding similarity (paper);
        or every text token that may vote is one.
    heads : {"all", "visual"}
        Over which heads the text's attention is averaged: all, or the 14 of 32 with the most attention from text to
        visual tokens, chosen at each target layer (the authors' code, v2.0).
    recycle : bool
        Whether the best of the dropped tokens are merged into a few recycled ones.
    merge : {"mean", "sum"}
        How a cluster is merged. The paper sums; the mean keeps the norm of a hidden state.
    schedule : {"geometric", "single"} or sequence of int or float, optional
        How ``keep`` is spread over the target layers, or an explicit list: tokens (int) or fraction of the visual
        tokens (float) that leave each target layer; a selector that acts before the decoder as well takes one more,
        the first. ``None``: the selector's own default.
    rank_lambda : float
        λ of N = λ (L_v − rank), in [0, 1].
    rank_tolerance : float or "machine"
        Share ε of the spectral energy that the rank may leave out; ``"machine"`` is the numerical rank.
    strict : bool
        Raise, instead of warn and clamp, where a budget cannot hold for one sample; likewise, instead of warn, where a
        prompt holds placeholders of images and brings no pixels.
    seed : int
        Seed of selectors that draw at random, below 2**63.
    preset : {"paper-192", "paper-128", "paper-64"}, optional
        The paper's settings: sets ``target_layers``, ``tau``, ``theta``, ``merge``, ``schedule`` and a ``min_keep`` of
        1, so that its published averages come out, and ``selector="sparsevlm"`` unless another was named.
    engine : bool, optional
        Run greedy and sampling calls of ``generate`` on packed samples, fixed shapes and CUDA graphs where that is
        possible; the report says which path ran, and why. ``None``: on CUDA devices.
    vision_keep : float
        Share of the visual tokens, in (0, 1], that the vision tower computes under the engine: squares of patches that
        look like all their neighbours are left out before its first block, and never reach the decoder. No fewer are
        computed than ``min_keep`` and ``min_keep_per_image`` allow. A path without the engine computes all.
    image_cache : int
        Bytes of encoded images that the engine keeps over calls, those used last: an image or video that comes again,
        with the same pixels, is not encoded anew. 0: none. Under a ``vision_keep`` below 1 all are encoded anew.
    timeout : float, optional
        Seconds that a call waits for the call of another thread to end before it raises ``TimeoutError``; ``None``: as
        long as it takes. A model serves one call at a time, in the order in which they came.
    weights : {"model", "fp8"}
        What decode steps of the engine read: the model's own weights, or copies of the decoder's in float8 (e4m3, with
        a scale per output), made when the engine first needs them, which take half as much memory beside them and half
        as long to read. Prompts, and batches of more than 16 samples, read the model's. ``None`` is ``"model"``.
    turns : {"first", "refresh", "agnostic"}
        What later questions on a kept cache find. ``"first"``: what the first question has left. ``"refresh"``: each
        call of ``generate`` prefills the conversation again and chooses for its own question; features of all images
        are kept with the cache for that, and the vision tower does not run again. ``"agnostic"``: what a question-free
        choice has left; selectors that read the question are refused.
    """

    n_vis: int | None = None
    target_layers: Sequence[int] | None = None
    min_keep: int = 32
    tau: float = 0.5
    theta: float = 0.5
    keep: Any = None
    selector: Any = None
    raters: str = "attention"
    heads: str = "all"
    recycle: bool = True
    merge: str = "mean"
    schedule: Any = None
    rank_lambda: float = 0.5
    rank_tolerance: float | str = 0.1
    strict: bool = False
    seed: int = 0
    preset: str | None = None
    engine: bool | None = None
    vision_keep: float = 1.0
    image_cache: int = 0
    timeout: float | None = None
    min_keep_per_image: int = 4
    weights: str | None = "model"
    turns: str = FIRST

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self) if f.name != "selector"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if self.preset is not None:
            self._apply_preset(self.preset)
        self._check_mistaken()
        if self.n_vis is not None:
            check_whole("n_vis", self.n_vis, 0)
        check_whole("min_keep", self.min_keep, 1)
        check_whole("min_keep_per_image", self.min_keep_per_image, 0)
        check_whole("image_cache", self.image_cache, 0)
        check_whole("seed", self.seed, 0, MAX_SEED)
        for name in ("tau", "theta", "rank_lambda", "vision_keep"):
            check_unit_interval(name, getattr(self, name))
        if not self.vision_keep:
            raise ValueError("vision_keep must be above 0: the vision tower has to compute something.")
        _check_choice("raters", self.raters, RATER_MODES)
        _check_choice("heads", self.heads, HEADS)
        _check_choice("merge", self.merge, MERGES)
        if self.weights is None:
            object.__setattr__(self, "weights", "model")
        _check_choice("weights", self.weights, WEIGHTS)
        for name in ("recycle", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.timeout is not None and (isinstance(self.timeout, bool) or not isinstance(self.timeout, Real)):
            raise TypeError(f"timeout must be a number of seconds or None, got {self.timeout!r}.")
        if self.timeout is not None and not self.timeout >= 0:
            raise ValueError(f"timeout must not be negative, got {self.timeout}.")
        if not (self.engine is None or isinstance(self.engine, bool)):
            raise TypeError(f"engine must be True, False or None, got {self.engine!r}.")
        if self.engine is False and self.weights == "fp8":
            raise ValueError(
                "weights='fp8' is read by the engine, and engine=False switches it off: leave one of the two out (in "
                "state.options(engine=False), say weights='model')."
            )
        self._check_turns()
        self._check_target_layers()
        self._check_keep()
        self._check_schedule()
        self._check_rank_tolerance()
        self._check_selector()

    @functools.cached_property
    def shared(self) -> SparseVLMConfig:
        """The options without what belongs to one request alone."""
        return dataclasses.replace(
            self, n_vis=None, keep=None, selector=None, schedule=None, target_layers=None, seed=0, strict=False,
            preset=None, engine=None, vision_keep=1.0, image_cache=0, timeout=None, turns=FIRST,
        )  # fmt: skip

    @property
    def has_budget(self) -> bool:
        """Whether ``keep`` or a schedule of counts says how many tokens go on; the name of a schedule does not."""
        return self.keep is not None or not isinstance(self.schedule, (str, type(None)))

    def replace(self, **changes: Any) -> SparseVLMConfig:
        """Return a copy with some options changed.

        Raises
        ------
        TypeError
            If an option does not exist; the message lists those that do.
        """
        check_options(changes, [f.name for f in dataclasses.fields(self)])
        if changes.get("keep") is not None and "schedule" not in changes and not isinstance(self.schedule, str):
            changes["schedule"] = None  # an explicit list is itself a budget: the new one takes its place
        if changes.get("preset") is None:
            changes["preset"] = None  # already applied to the fields that are copied
            return dataclasses.replace(self, **changes)
        budget = ("keep", "schedule", "target_layers", "tau", "theta", "merge", "min_keep")
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in budget}
        return dataclasses.replace(self, **{**defaults, **changes})

    def _apply_preset(self, preset: str) -> None:
        _check_choice("preset", preset, PRESETS)
        if self.keep is not None or self.schedule is not None:
            raise ValueError(f"preset={preset!r} is itself a budget: leave keep and schedule unset.")
        values = {
            "target_layers": (2, 6, 15),
            "tau": 0.3,
            "theta": 0.1,
            "merge": "mean",
            "schedule": tuple(count / _PAPER_N_VISUAL for count in _PAPER_OUTPUTS[preset]),
            "min_keep": 1,
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if self.selector is None:
            object.__setattr__(self, "selector", "sparsevlm")
        for name, value in values.items():
            if getattr(self, name) == defaults[name]:
                object.__setattr__(self, name, value)
            elif name != "min_keep":
                raise ValueError(
                    f"{name} is a part of preset={preset!r}: leave it unset, or leave the preset out; got "
                    f"{getattr(self, name)!r}."
                )

    def _check_mistaken(self) -> None:
        """Refuse values that are lawful of another option, or in another unit."""
        if isinstance(self.n_vis, float):
            budget = int(self.n_vis) if self.n_vis > 1.0 and self.n_vis.is_integer() else self.n_vis
            raise TypeError(
                f"n_vis must be a whole number, the visual tokens that a sample is expected to have, got {self.n_vis}: "
                f"for a budget pass keep={budget}."
            )
        if isinstance(self.image_cache, (str, float)):
            raise TypeError(
                f"image_cache must be a whole number of bytes, such as 2 * 1024**3 for 2 GiB, got {self.image_cache!r}."
            )

    def _check_turns(self) -> None:
        _check_choice("turns", self.turns, TURNS)
        if self.turns == REFRESH and self.vision_keep < 1.0:
            raise ValueError(
                "turns='refresh' keeps the features of all visual tokens for later questions, and vision_keep="
                f"{self.vision_keep} computes some of them: leave one of the two out."
            )

    def _check_target_layers(self) -> None:
        if self.target_layers is None:
            return
        layers = self.target_layers
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"target_layers must be a non-empty sequence of layer indices or None, got {layers!r}.")
        for layer in layers:
            check_whole("target_layers", layer, 0)
        if len(set(layers)) != len(layers):
            raise ValueError(f"target_layers holds a layer twice: {tuple(layers)}.")
        object.__setattr__(self, "target_layers", tuple(sorted(int(layer) for layer in layers)))

    def _check_keep(self) -> None:
        if self.keep is None:
            return
        if isinstance(self.keep, Sequence) and not isinstance(self.keep, (str, bytes)):
            if not self.keep:
                raise ValueError("keep is an empty sequence; give one budget per sample.")
            object.__setattr__(self, "keep", tuple(_checked_budget("keep", value) for value in self.keep))
        else:
            object.__setattr__(self, "keep", _checked_budget("keep", self.keep))

    def _check_schedule(self) -> None:
        if self.schedule is None:
            return
        if isinstance(self.schedule, str):
            _check_choice("schedule", self.schedule, SCHEDULES)
            return
        if not isinstance(self.schedule, Sequence) or not self.schedule:
            raise ValueError(
                f"schedule must be one of {SCHEDULES} or a list with one count per target layer, got {self.schedule!r}."
            )
        counts = tuple(_checked_budget("schedule", value) for value in self.schedule)
        if self.keep is not None:
            raise ValueError("an explicit schedule is itself a budget: leave keep unset, or name a schedule.")
        # One count more than target layers is for a selector that acts before the decoder as well.
        if self.target_layers is not None and len(counts) - len(self.target_layers) not in (0, 1):
            raise ValueError(f"schedule has {len(counts)} counts for {len(self.target_layers)} target layers.")
        if len({isinstance(count, int) for count in counts}) > 1:
            raise ValueError(f"schedule mixes token counts and fractions: {counts}.")
        if any(later > earlier for earlier, later in itertools.pairwise(counts)):
            raise ValueError(f"schedule grows from one target layer to the next: {counts}.")
        object.__setattr__(self, "schedule", counts)

    def _check_selector(self) -> None:
        if isinstance(self.selector, type):
            name = self.selector.__name__
            raise TypeError(f"selector must be an object, not the class {name} itself: pass selector={name}().")
        if self.selector is None or isinstance(self.selector, str):
            return
        if not callable(getattr(self.selector, "select", None)):
            raise TypeError(
                f"selector must be a name or an object with select(context, n_keep), got {self.selector!r}."
            )

    def _check_rank_tolerance(self) -> None:
        if isinstance(self.rank_tolerance, str):
            _check_choice("rank_tolerance", self.rank_tolerance, ("machine",))
        elif not isinstance(self.rank_tolerance, Real) or not 0.0 < self.rank_tolerance < 1.0:
            raise ValueError(f"rank_tolerance must be in (0, 1) or 'machine', got {self.rank_tolerance!r}.")


def _plain(name: str, value: Any) -> Any:
    """Lists and numbers of Python for arrays, tensors and their scalars, within a sequence as well."""
    if callable(getattr(value, "tolist", None)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        plain = [_plain(name, one) for one in value]
        return plain if isinstance(value, list) else tuple(plain)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError(f"{name} must be a number below 2**{_MAX_BITS}, got one of {value.bit_length()} bits.")
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Names the nearest of the names that exist, as an inserted sentence; empty where none is near."""
    nearest = difflib.get_close_matches(name, list(known), 1, _LEAST_ALIKE)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def check_options(given: Iterable[str], known: Collection[str]) -> None:
    """Refuse options that do not exist.

    Raises
    ------
    TypeError
        With the nearest names, and all that do exist.
    """
    if unknown := sorted(set(given) - set(known)):
        named = ", ".join(name + did_you_mean(name, known) for name in unknown)
        of_apply = [name for name in unknown if name in OF_APPLY]
        where = f" {', '.join(of_apply)}: of apply_sparsevlm alone." if of_apply else ""
        raise TypeError(f"unknown option {named}; the options are {', '.join(sorted(known))}.{where}")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}.")


def check_above_zero(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number above 0, got {value!r}.")
    if not 0.0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}.")


def check_unit_interval(name: str, value: Any) -> None:
    """Refuse what is no number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}.")
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _checked_budget(name: str, value: Any) -> int | float:
    """Return a budget as a plain ``int`` (tokens, at least 1) or ``float`` (fraction in (0, 1])."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number of tokens (int) or a fraction (float), got {value!r}.")
    if isinstance(value, Integral):
        if value < 1:
            raise ValueError(f"{name} as a number of tokens must be at least 1, got {value}.")
        return int(value)
    if not 0.0 < float(value) <= 1.0:
        raise ValueError(f"{name} as a fraction must be in (0, 1], got {value}; for a number of tokens pass an int.")
    return float(value)
