"""What a request asks of pruning and of sampling, checked before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ..config import check_options
from ..request.options import Options
from ..selection.selectors import SELECTORS
from ..state import SparseVLMState
from .errors import RequestError
from .protocol import ChatRequest

# Options of pruning that a request may choose. The others belong to whoever runs the server (engine, weights,
# image_cache, timeout, turns), announce what is counted anyway (n_vis), or would fail other requests (strict).
REQUEST_OPTIONS = (
    *("keep", "selector", "schedule", "target_layers", "preset", "min_keep", "min_keep_per_image", "vision_keep"),
    *("tau", "theta", "recycle", "merge", "raters", "heads", "rank_lambda", "rank_tolerance", "seed"),
)
_LONGEST = 1000  # list of layers
_OF_GENERATION = ("temperature", "top_p", "top_k")
_LEAST_TEMPERATURE = 1e-5  # logits divided by less overflow in the end, and cannot be drawn from


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Options of pruning that a request has chosen.

    Attributes
    ----------
    changes : dict
        As ``state.options`` takes them.
    selector : str
        In force.
    """

    changes: dict[str, Any]
    selector: str

    @property
    def key(self) -> str:
        """Equal for requests that may run together."""
        return json.dumps(self.changes, sort_keys=True)


def pruning_of(state: SparseVLMState, given: Mapping[str, Any] | None) -> Pruning:
    """Check the options of a request against the model.

    Raises
    ------
    RequestError
    """
    changes = dict(given or {})
    try:
        if len(changes) > len(REQUEST_OPTIONS):
            raise ValueError(f"{len(changes)} options were given; there are {', '.join(REQUEST_OPTIONS)}.")
        check_options(changes, REQUEST_OPTIONS)
        _check_types(changes)
        if "schedule" in changes and not isinstance(changes["schedule"], (str, type(None))):
            changes.setdefault("keep", None)  # a list is itself a budget, and takes the place of the server's
        options = Options.of(state.adapter, state.config.replace(**changes))
    except (ValueError, TypeError, NotImplementedError, OverflowError) as error:
        raise RequestError(f"sparsevlm: {error}", param="sparsevlm") from error
    return Pruning(changes, options.traits.name)


def _check_types(changes: Mapping[str, Any]) -> None:
    """Refuse what is lawful in Python and not of a single request."""
    keep, selector = changes.get("keep"), changes.get("selector")
    if isinstance(keep, (list, dict)):
        raise TypeError(f"keep must be a number, the budget of this request, got {keep!r}.")
    if selector is not None and not isinstance(selector, str):
        raise TypeError(f"selector must be one of {', '.join(SELECTORS)}, got {selector!r}.")
    for name, value in changes.items():
        if isinstance(value, list) and len(value) > _LONGEST:
            raise ValueError(f"{name} has {len(value)} entries, more than any model has layers.")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, (list, dict)) for one in value)):
            raise TypeError(f"{name} must be a number, a text or a list of numbers.")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes
    ----------
    temperature, top_p : float
    top_k : int
        0: all.
    seed : int, optional
        Of a request that is drawn by itself, so that it is drawn the same again.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Tells whether nothing is drawn."""
        return self.temperature == 0

    @property
    def arguments(self) -> dict[str, Any]:
        """Of ``generate``."""
        if self.is_greedy:
            return {"do_sample": False}
        return {"do_sample": True, **{name: getattr(self, name) for name in _OF_GENERATION}}


def sampling_of(request: ChatRequest, generation_config: Any) -> Sampling:
    """What a request leaves out is the checkpoint's own; one that names no temperature either way is greedy."""
    own = {name: getattr(generation_config, name, None) for name in _OF_GENERATION}
    temperature = request.temperature
    if temperature is None:
        samples = bool(getattr(generation_config, "do_sample", False))
        temperature = (1.0 if own["temperature"] is None else float(own["temperature"])) if samples else 0.0
    if temperature < _LEAST_TEMPERATURE:
        return Sampling(0.0)
    top_p = request.top_p if request.top_p is not None else own["top_p"]
    return Sampling(temperature, 1.0 if top_p is None else float(top_p), int(own["top_k"] or 0), request.seed)
