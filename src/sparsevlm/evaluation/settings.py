"""Settings of a comparison: dense, each selector at each budget and seed, and smaller images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..config import SparseVLMConfig
from ..selection.context import SelectorTraits
from ..selection.selectors import SELECTORS

DENSE = "dense"
DOWNSAMPLE = "downsample"
ALL = "all"
AVERAGE = "average"  # the task that stands for the mean over all tasks
_OWN_OPTIONS = ("keep", "selector", "seed", "target_layers", "n_vis")

Keep = int | float | None


@dataclass(frozen=True)
class EvalConfig:
    """Everything that a run's figures depend on; its run folder holds it.

    Attributes
    ----------
    suite, model : str
        As named on the command line.
    selectors : tuple of str
        Selectors and ``"downsample"``; ``"all"`` for everything there is.
    keeps : tuple of int, float or None
        Budgets; ``None`` is adaptive.
    seeds : tuple of int
        For selectors that draw at random; all others run once.
    tasks : tuple of str or None
        ``None``: all of the suite.
    limit : int or None
        Rows per task.
    first_seed : int or None
        Seed of the first bundled scene.
    batch : int
    dtype, device, attn : str
    max_new_tokens : int or None
        ``None``: what the suite needs.
    instruction : str
        Appended to every question.
    metric : str
        For rows of a local dataset that name none.
    target_layers : tuple of int or None
        For selectors that run inside the decoder; of all selectors, those before it are left out.
    include_path : str or None
        Folder with task files for lmms-eval.
    options : dict
        Other fields of :class:`~sparsevlm.config.SparseVLMConfig`.
    """

    suite: str
    model: str
    selectors: tuple[str, ...] = (ALL,)
    keeps: tuple[Keep, ...] = (0.5,)
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] | None = None
    limit: int | None = None
    first_seed: int | None = None
    batch: int = 32
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"
    max_new_tokens: int | None = None
    instruction: str = ""
    metric: str = "exact"
    target_layers: tuple[int, ...] | None = None
    include_path: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Say everything once: two settings of one name would share a file of predictions."""
        selectors = (ALL,) if ALL in self.selectors else tuple(dict.fromkeys(self.selectors))
        object.__setattr__(self, "selectors", selectors)
        # By their texts: the token 1 and the fraction 1.0 are equal numbers, and different budgets.
        object.__setattr__(self, "keeps", tuple({keep_text(keep): keep for keep in self.keeps}.values()))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def digest(self) -> str:
        """Eight hexadecimal digits that name this configuration."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Setting:
    """One column of the comparison.

    Attributes
    ----------
    selector : str
        A selector, ``"dense"`` or ``"downsample"``.
    keep : int, float or None
    seed : int or None
        ``None`` where nothing is drawn.
    pruning : SparseVLMConfig or None
        ``None`` where nothing is pruned.
    """

    selector: str
    keep: Keep = 1.0
    seed: int | None = None
    pruning: SparseVLMConfig | None = None

    @property
    def name(self) -> str:
        """Fit for a file name."""
        if self.selector == DENSE:
            return DENSE
        return f"{self.selector}-keep{keep_text(self.keep)}" + ("" if self.seed is None else f"-seed{self.seed}")

    def for_batch(self, batch: int) -> Setting:
        """This setting for one batch of a run: what is drawn at random differs from batch to batch."""
        if self.seed is None or self.pruning is None:
            return self
        digest = hashlib.sha256(f"{self.seed} {batch}".encode()).digest()
        pruning = self.pruning.replace(seed=int.from_bytes(digest[:4], "big"))
        return dataclasses.replace(self, pruning=pruning)


def keep_text(keep: Keep) -> str:
    """A budget as the command line takes it."""
    return "adaptive" if keep is None else str(keep)


def make_settings(config: EvalConfig) -> list[Setting]:
    """Dense, then every selector with every budget (and seed, where it draws at random).

    Raises
    ------
    ValueError, TypeError
        If a selector or option does not exist, or an option is out of range.
    """
    settings = [Setting(DENSE)]
    for selector in _selectors(config.selectors):
        for keep in config.keeps:
            if selector == DOWNSAMPLE:
                settings += [] if keep is None else [Setting(selector, keep)]
                continue
            for seed in config.seeds if _draws(selector) else (None,):
                settings.append(Setting(selector, keep, seed, _pruning(config, selector, keep, seed)))
    return settings


def _selectors(names: tuple[str, ...]) -> list[str]:
    known = [*SELECTORS, DOWNSAMPLE]
    if names == (ALL,):
        return known
    if unknown := [name for name in names if name not in known and name != DENSE]:
        raise ValueError(
            f"there is no selector {', '.join(map(repr, unknown))}; there are {', '.join(sorted(known))}, and "
            f"{ALL!r} for all of them."
        )
    return [name for name in names if name != DENSE]


def _draws(selector: str) -> bool:
    """Tells whether a selector's choice depends on the seed."""
    return SelectorTraits.of(SELECTORS[selector]()).draws


def _pruning(config: EvalConfig, selector: str, keep: Keep, seed: int | None) -> SparseVLMConfig:
    if own := sorted(set(config.options) & set(_OWN_OPTIONS)):
        raise ValueError(f"--set {own[0]}=… is not for --set: it has an option of its own or a fixed value.")
    pruning = SparseVLMConfig().replace(keep=keep, selector=selector, seed=seed or 0, **config.options)
    return pruning if config.target_layers is None else pruning.replace(target_layers=config.target_layers)
