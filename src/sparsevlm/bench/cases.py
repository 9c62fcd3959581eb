"""Benchmark cases: batches of equal requests."""

from __future__ import annotations

from dataclasses import dataclass

N_TEXT = 42  # tokens of a request that are not visual: a short question in its template


@dataclass(frozen=True)
class Case:
    """A batch of equal requests.

    Attributes
    ----------
    n_visual : int
        Visual tokens of each sample: one square image.
    batch, new_tokens : int
    """

    n_visual: int
    batch: int
    new_tokens: int

    @property
    def name(self) -> str:
        """Name in the rows, such as ``v1024-b1-n64``."""
        return f"v{self.n_visual}-b{self.batch}-n{self.new_tokens}"

    @property
    def side(self) -> int:
        """Visual tokens along one side of the image."""
        return round(self.n_visual**0.5)


def _cases(n_visual: tuple[int, ...], batch: int, new_tokens: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(Case(n, batch, new) for n in n_visual for new in new_tokens)


CORE = (*_cases((256, 576, 1024, 4096), 1, (1, 64)), *_cases((256, 1024), 32, (1, 64)))
FULL = (
    *CORE,
    *_cases((16384,), 1, (1, 64)),
    *_cases((256, 1024, 4096), 8, (1, 64)),
    *_cases((576, 1024), 1, (256,)),
)
_BY_NAME = {case.name: case for case in FULL}


def named_cases(names: tuple[str, ...] | None, *, full: bool) -> tuple[Case, ...]:
    """Returns cases by their names, or all.

    Raises
    ------
    ValueError
        If there is no such case; the message lists those that exist.
    """
    if names is None:
        return FULL if full else CORE
    if unknown := [name for name in names if name not in _BY_NAME]:
        raise ValueError(f"there is no case {', '.join(unknown)}; there are {', '.join(_BY_NAME)}.")
    return tuple(_BY_NAME[name] for name in names)
