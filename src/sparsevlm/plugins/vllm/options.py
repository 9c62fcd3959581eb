"""Options of the plugin: of an engine, and of one request."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...config import SparseVLMConfig, did_you_mean
from ...selection.context import BEFORE_DECODER, VISION_NEEDS, SelectorTraits
from ...selection.selectors import DEFAULT, SELECTORS, make_selector
from ...selection.selectors.grid import GridSelector
from ...selection.selectors.random import RandomSelector

KEY = "sparsevlm"


@dataclass(frozen=True)
class GridBeforeDecoder(GridSelector):
    """``grid`` at layer −1: it reads no states, so that any place will do."""

    placement = BEFORE_DECODER


@dataclass(frozen=True)
class RandomBeforeDecoder(RandomSelector):
    """``random`` at layer −1."""

    placement = BEFORE_DECODER


_ANYWHERE: dict[str, Any] = {"grid": GridBeforeDecoder, "random": RandomBeforeDecoder}


@dataclass(frozen=True)
class Options:
    """What decides which visual tokens of one image or video go on.

    Parameters
    ----------
    keep : int or float
        Tokens of each image or video, or a fraction of them; 1.0: all.
    selector : str
        Name of a selector, or ``"module:name"`` of an object or a class without arguments (of an engine only).
    min_keep : int
        No image or video is pruned below this.
    seed : int
        Of ``random``.
    text : tuple of int
        Token ids of the prompt's text, for a selector that reads it.
    """

    keep: int | float = 1.0
    selector: str = DEFAULT
    min_keep: int = 32
    seed: int = 0
    text: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def of_engine(cls, given: Any) -> Options:
        """Options of an engine, by what ``hf_overrides`` holds under ``"sparsevlm"``.

        Raises
        ------
        TypeError, ValueError
            If one does not exist, is out of range, or names a selector that cannot run before the decoder.
        """
        return cls()._changed(given, "hf_overrides")

    def of_request(self, given: Any) -> Options:
        """These options with those of one request, by what ``mm_processor_kwargs`` holds under ``"sparsevlm"``.

        Raises
        ------
        TypeError, ValueError
            As :meth:`of_engine`; also if a request names a module.
        """
        if not given:
            return self
        named = given.get("selector") if isinstance(given, Mapping) else None
        if isinstance(named, str) and ":" in named and named != self.selector:  # before anything is imported
            raise ValueError(
                f"the request asks for selector={named!r}: only the engine may name a module, in "
                "hf_overrides={'sparsevlm': {'selector': ...}}. Name one of the selectors of the library."
            )
        return self._changed(given, "mm_processor_kwargs")

    def _changed(self, given: Any, where: str) -> Options:
        names = [one.name for one in dataclasses.fields(self) if one.name != "text"]
        if not isinstance(given, Mapping):
            raise TypeError(f"{where}[{KEY!r}] must be a dict with any of {', '.join(names)}, got {given!r}.")
        if unknown := sorted(map(str, set(given) - set(names))):
            inside = " Options of apply_sparsevlm that are read inside the decoder do nothing here."
            inside = inside if any(one in SparseVLMConfig.__dataclass_fields__ for one in unknown) else ""
            named = ", ".join(one + did_you_mean(one, names) for one in unknown)
            raise TypeError(f"{where}[{KEY!r}] holds {named}; the options are {', '.join(names)}.{inside}")
        changed = dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})
        if not isinstance(changed.selector, str):
            raise TypeError(f"{where}[{KEY!r}]: selector must be a name, got {changed.selector!r}.")
        config = changed.config  # checks the budget and the seed
        if isinstance(config.keep, tuple):
            raise TypeError(
                f"{where}[{KEY!r}]: keep must be one budget, got {changed.keep!r}: it holds for each image and video."
            )
        changed.chooser  # noqa: B018  # checks the selector
        return dataclasses.replace(changed, keep=config.keep, min_keep=config.min_keep, seed=config.seed)

    @property
    def config(self) -> SparseVLMConfig:
        """The same as options of the library."""
        return _config(self.keep, self.min_keep, self.seed)

    @property
    def chooser(self) -> tuple[Any, SelectorTraits]:
        """The selector and what it declares."""
        return _chooser(self.selector)

    @property
    def reads_text(self) -> bool:
        """Tells whether the choice depends on the text of the prompt."""
        return "text_features" in self.chooser[1].needs

    def with_text(self, text: tuple[int, ...]) -> Options:
        """The same for a prompt with this text."""
        return dataclasses.replace(self, text=text)

    def key(self) -> str:
        """All of it as one string, equal for equal choices: vLLM makes a part of an image's identity of it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> Options:
        """The options that :meth:`key` has written."""
        given = json.loads(key)
        return cls(**{**given, "text": tuple(given["text"])})


def _config(keep: Any, min_keep: Any, seed: Any) -> SparseVLMConfig:
    return SparseVLMConfig(keep=keep, min_keep=min_keep, seed=seed)


@functools.lru_cache(maxsize=64)
def _chooser(name: str) -> tuple[Any, SelectorTraits]:
    """A selector that can run before the decoder of vLLM.

    Raises
    ------
    ValueError
        If it cannot, with the reason and those that can.
    """
    selector = _ANYWHERE[name]() if name in _ANYWHERE else _made(name)
    traits = SelectorTraits.of(selector)
    if reason := _reason_against(traits):
        raise ValueError(f"selector {name!r} {reason} Under vLLM there are {', '.join(available())}.")
    return selector, traits


def _made(name: str) -> Any:
    if ":" not in name:
        return make_selector(SparseVLMConfig(selector=name))
    module, attribute = name.split(":", 1)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"selector {name!r} cannot be imported ({error}): give 'module:name' of a selector that the processes of "
            "vLLM can import, or the name of one of the library's."
        ) from error
    return found() if isinstance(found, type) else found


def _reason_against(traits: SelectorTraits) -> str | None:
    if vision := sorted(traits.needs & VISION_NEEDS):
        return f"reads {', '.join(vision)} inside the vision tower, which the kernels of vLLM's towers do not give out."
    if traits.placement != BEFORE_DECODER:
        return (
            "drops tokens inside the decoder, where vLLM gives all layers of a request one length of keys and values. "
            "Run it under transformers (apply_sparsevlm)."
        )
    return None


@functools.cache
def available() -> tuple[str, ...]:
    """Names of the library's selectors that run under vLLM."""
    names = [name for name in SELECTORS if name in _ANYWHERE or not _reason_against(SelectorTraits.of(_made(name)))]
    return tuple(sorted(names))
