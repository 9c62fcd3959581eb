"""One function that draws an example of any task."""

from __future__ import annotations

from .charts import CHARTS
from .chat import CHAT
from .documents import DOCUMENTS
from .example import Example, Request, TaskFamily
from .grounds import ALL_GROUNDS, EACH_GROUND
from .photos import check_photos
from .screens import SCREENS
from .splits import TRAINING, check_seed, generator
from .whole import WHOLE

FAMILIES: dict[str, TaskFamily] = {
    family.name: family for family in (ALL_GROUNDS, *EACH_GROUND, DOCUMENTS, CHARTS, SCREENS, WHOLE, CHAT)
}


def draw(family: str, task: str, seed: int, split: str = TRAINING, turns: int = 1) -> Example:
    """Draw an example: a pure function of its arguments.

    Parameters
    ----------
    family, task : str
        A name of ``FAMILIES`` and one of its tasks.
    seed : int
        Of training from 1000000 on, of evaluation below.
    split : str
        ``"training"`` or ``"evaluation"``, which have fonts, words, layouts and photographs of their own.
    turns : int
        Questions about the picture; fewer where it has no more of the task.

    Raises
    ------
    ValueError
        If family, task or split do not exist, or the seed is of the other split.
    ModuleNotFoundError
        If a package that pictures come from is missing; the message has the pip line.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}; there are {', '.join(FAMILIES)}.")
    tasks = FAMILIES[family].tasks
    if task not in tasks:
        raise ValueError(f"family {family} has no task {task!r}; it has {', '.join(tasks)}.")
    if turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}.")
    check_seed(seed, split)
    request = Request(task, seed, split, turns, generator(family, task, seed, split))
    images, asked = FAMILIES[family].draw(request)
    assert asked, "every picture has a question"
    return Example(family, task, images, asked)


def check_packages(family: str, tasks: tuple[str, ...], split: str) -> None:
    """Refuse tasks whose pictures come from a package that is missing.

    Raises
    ------
    ModuleNotFoundError
        With the pip line, and the tasks that need nothing.
    """
    needy = [task for task in tasks if task in FAMILIES[family].photographic]
    if not needy:
        return
    try:
        check_photos(split)
    except ModuleNotFoundError as error:
        others = [task for task in FAMILIES[family].tasks if task not in FAMILIES[family].photographic]
        without = f" Without photographs: --tasks {','.join(others)}." if others else ""
        raise ModuleNotFoundError(f"{family} needs photographs for {', '.join(needy)}: {error}{without}") from error
