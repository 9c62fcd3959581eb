"""What an engine and the state that it belongs to ask of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from transformers.cache_utils import Cache

from .request import Request


class EngineHost(Protocol):
    """What an engine may ask of the state that it belongs to."""

    def claim(self) -> None:
        """Take the model for the calling thread."""

    def open_request(self, inputs: Mapping[str, Any]) -> Request | None:
        """Begin a request; ``None`` if it brings no picture."""

    def close_request(self, request: Request, cache: Cache) -> None:
        """End the prompt of a request."""

    def wants_engine(self) -> bool:
        """Whether the option ``engine`` is in force."""

    def vision_keep(self) -> float:
        """Share of the visual tokens that the vision tower computes."""

    def needs(self) -> frozenset[str]:
        """What the selector in force needs."""


class Engine(Protocol):
    """What may take the place of the forward passes of the vision tower and of ``generate``."""

    @property
    def reason(self) -> str:
        """Why the plain path runs."""

    def attach(self) -> None:
        """Take the place."""

    def detach(self) -> None:
        """Give it back."""

    def consider(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> bool:
        """Whether it will run what ``generate`` begins."""
