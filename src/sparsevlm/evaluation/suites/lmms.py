"""Tasks of lmms-eval, scored by lmms-eval itself, as columns of the same table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...inputs import torchvision_works

MISSING = (
    "tasks of lmms-eval need lmms-eval: pip install 'lmms-eval==0.7.3', after torch, best in an environment of its own."
)


@dataclass(frozen=True)
class LmmsSuite:
    """Named tasks.

    Attributes
    ----------
    name : str
    tasks : tuple of str
    include_path : str or None
        Folder with task files of one's own.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    name = "lmms"

    def check(self) -> None:
        """Refuse what cannot run.

        Raises
        ------
        ModuleNotFoundError
            Without lmms-eval; the message has the pip line.
        ValueError
            If it knows no task of a name.
        """
        known = set(task_manager(self.include_path).all_tasks)
        if unknown := [task for task in self.tasks if task not in known]:
            near = sorted(task for task in known if any(word.split("_")[0] in task for word in unknown))
            raise ValueError(
                f"lmms-eval has no task {', '.join(map(repr, unknown))}; near are {', '.join(near[:12]) or 'none'}. "
                "All of them: python -m lmms_eval --tasks list; a folder of your own: --include-path."
            )

    def fingerprint(self) -> str:
        """Version of lmms-eval, whose tasks carry versions of their own."""
        from importlib.metadata import version

        return f"lmms-eval {version('lmms-eval')}"


def task_manager(include_path: str | None) -> Any:
    """Return the ``TaskManager`` of lmms-eval.

    Raises
    ------
    ModuleNotFoundError
        Without lmms-eval; the message has the pip line.
    """
    torchvision_works()
    try:
        from lmms_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lmms_eval":
            raise
        raise ModuleNotFoundError(MISSING) from error
    return TaskManager(verbosity="WARNING", include_path=include_path)
