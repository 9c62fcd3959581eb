"""From a name on the command line to a suite."""

from __future__ import annotations

from pathlib import Path

from ...material import FAMILIES
from ..settings import EvalConfig
from .demo import DemoSuite
from .drawn import DrawnSuite
from .lmms import LmmsSuite
from .local import LocalSuite
from .seeded import FIRST_SEED
from .suite import Suite, chosen_tasks

LMMS_PREFIX = "lmms:"
_SHORT = tuple(name for name in FAMILIES if not name.startswith("grounds-"))


def lmms_suite(config: EvalConfig) -> LmmsSuite | None:
    """The tasks of lmms-eval that a configuration names, if it does.

    Raises
    ------
    ModuleNotFoundError, ValueError
        If lmms-eval or one of the tasks is not there.
    """
    if not config.suite.startswith(LMMS_PREFIX):
        if config.include_path is not None:
            raise ValueError(f"--include-path is for --suite {LMMS_PREFIX}TASK only.")
        return None
    if config.tasks is not None:
        raise ValueError(f"the tasks of lmms-eval are named in the suite: --suite {LMMS_PREFIX}TASK[,TASK].")
    suite = LmmsSuite(tuple(config.suite.removeprefix(LMMS_PREFIX).split(",")), config.include_path)
    suite.check()
    return suite


def is_drawn(name: str) -> bool:
    """Tells whether a suite is drawn, so that there are as many rows as are asked for."""
    return name == "demo" or name.startswith("demo-") or name in FAMILIES


def open_suite(config: EvalConfig) -> Suite:
    """The suite of bundled scenes, of drawn tasks, or of a file, of a configuration; its tasks checked.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such suite, file or task; the message says what there is.
    ModuleNotFoundError
        If a package is missing that the suite needs; the message has the pip line.
    """
    name, first_seed = config.suite, FIRST_SEED if config.first_seed is None else config.first_seed
    if name in FAMILIES:
        return DrawnSuite(name, first_seed, config.tasks)
    if is_drawn(name):
        suite: Suite = DemoSuite(name, first_seed)
    elif config.first_seed is not None:
        raise ValueError(f"--first-seed is of what is drawn only (--suite demo, {', '.join(_SHORT)}).")
    elif Path(name).suffix in (".jsonl", ".parquet"):
        suite = LocalSuite(Path(name), config.metric)
    else:
        raise ValueError(
            f"there is no suite {name!r}; give demo (or demo-<layout>), {', '.join(_SHORT)} (or grounds-<ground>), a "
            f".jsonl or .parquet file, or {LMMS_PREFIX}TASK[,TASK] for tasks of lmms-eval."
        )
    chosen_tasks(suite, config.tasks)
    return suite
