"""What the pages of several browsers are running: one comparison each, that ends when it is stopped or they go."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass(eq=False)
class Run:
    """A comparison that a page has begun.

    Attributes
    ----------
    layer : int
        Decoder layer behind which the page shows patches.
    stop : Event
        Set when it is to end.
    is_shown : bool
        Whether its page still shows it; not when it has begun another one, or has gone.
    """

    layer: int
    stop: threading.Event = field(default_factory=threading.Event)
    is_shown: bool = True


class Runs:
    """The running comparison of every page, by the id of the page; for several threads."""

    def __init__(self) -> None:
        self._lock, self._by_page = threading.Lock(), dict[str, Run]()

    def begin(self, page: str, layer: int) -> Run:
        """Begin a comparison in the place of the page's former one, which ends unseen."""
        with self._lock:
            self._hide(page)
            self._by_page[page] = Run(layer)
            return self._by_page[page]

    def turn_to(self, page: str, layer: int) -> None:
        """Let the page's comparison show another layer."""
        with self._lock:
            if page in self._by_page:
                self._by_page[page].layer = layer

    def stop(self, page: str) -> None:
        """End the page's comparison where it is; the page goes on to show it."""
        with self._lock:
            if page in self._by_page:
                self._by_page[page].stop.set()

    def leave(self, page: str) -> None:
        """End the comparison of a page that has gone."""
        with self._lock:
            self._hide(page)

    def _hide(self, page: str) -> None:
        former = self._by_page.pop(page, None)
        if former is not None:
            former.is_shown = False
            former.stop.set()
