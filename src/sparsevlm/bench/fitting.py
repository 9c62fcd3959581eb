"""Cases as a model can have them: as many visual tokens as its images make, and none for which it has no inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..models import ModelAdapter
from .cases import AnyCase, Case, MixedCase, PictureCase
from .checkpoint import MODEL_TYPES
from .workload import fitted, images_of


def fitted_cases(
    adapter: ModelAdapter, cases: Sequence[AnyCase], seed: int, say: Callable[[str], None], *, has_processor: bool
) -> tuple[AnyCase, ...]:
    """Returns the cases that a model can have, by their true numbers of visual tokens.

    Parameters
    ----------
    adapter : ModelAdapter
    cases : sequence of Case, PictureCase or MixedCase
    seed : int
        By which requests of mixed shapes are drawn.
    say : callable
        Called with a line on each case that is changed or left out.
    has_processor : bool
        Whether the model's checkpoint is there, with its processor.

    Raises
    ------
    ValueError
        If none is left.
    """
    found: list[AnyCase] = []
    changed: set[str] = set()
    reasons: dict[str, None] = {}
    for case in cases:
        if reason := _why_left_out(adapter, case, seed, has_processor):
            say(f"{case.name}: left out; {reason}")
            reasons[reason] = None
            continue
        nearest = fitted(adapter, case) if isinstance(case, Case) else case
        if nearest.name != case.name:
            say(f"{case.name}: as {nearest.name}, the nearest number of visual tokens that images of the model make")
            changed.add(nearest.name)
        if nearest.name in changed and nearest.name in {one.name for one in found}:
            say(f"{case.name}: left out; {nearest.name} is measured already")
            continue
        found.append(nearest)
    if not found:
        raise ValueError(
            f"of a {adapter.name} none of these cases can be measured: {', '.join(case.name for case in cases)}; "
            f"{'; '.join(reasons)}. Name others by --cases, such as v1024-b1-n1, or picture448-b1-n1 of a checkpoint."
        )
    return tuple(found)


def _why_left_out(adapter: ModelAdapter, case: AnyCase, seed: int, has_processor: bool) -> str:
    if isinstance(case, PictureCase):
        if has_processor or adapter.model.config.model_type in MODEL_TYPES:
            return ""
        return f"pictures take a processor, which comes with the checkpoint of a {adapter.name}"
    requests = case.requests(seed) if isinstance(case, MixedCase) else (case,)
    if not all(images_of(adapter, one) for one in requests):
        return f"images of a {adapter.name} are not made in code, only those of families with examples for the warm-up"
    if isinstance(case, MixedCase) and any(fitted(adapter, one) != one for one in requests):
        return f"images of a {adapter.name} have a few sizes only, and no two of its requests may have one size"
    return ""
