"""Finding the unrelated package of the same name that the public index holds."""

from __future__ import annotations

import functools
import json
import warnings
from importlib.metadata import Distribution, distributions
from pathlib import Path

NAME = "sparsevlm"
_ENTRY_POINT = "sparsevlm.cli:main"
_REMEDY = (
    f"Run `pip uninstall {NAME}` until nothing of that name is left, then install this project from its source folder "
    f"or a wheel built from it, never by its bare name."
)


@functools.cache
def check_collision() -> None:
    """Warn, once per process, about anything else named ``sparsevlm`` that is installed beside this package."""
    if problems := find_collisions():
        warnings.warn(" ".join(["sparsevlm:", *problems, _REMEDY]), RuntimeWarning, stacklevel=2)


def find_collisions(search_path: list[str] | None = None, package: Path | None = None) -> list[str]:
    """Describe every other installation of the name.

    Parameters
    ----------
    search_path : list of str, optional
        Folders to search for installed distributions; ``sys.path`` where omitted.
    package : Path, optional
        Folder of the running package.

    Returns
    -------
    list of str
        One sentence per problem; empty where this package is alone.
    """
    package = (package or Path(__file__).parent).resolve()
    found = _installed(search_path)
    ours = [distribution for distribution in found if _is_ours(distribution)]
    problems = [
        f"Another package named {NAME} (version {other.version}) is installed in {_folder(other)}; it is unrelated to "
        f"this one in {package.parent} and can hide it or mix with it."
        for other in found
        if other not in ours
    ]
    if len(ours) > 1:
        places = ", ".join(f"{_folder(one)} (version {one.version})" for one in ours)
        problems.append(f"{NAME} is installed {len(ours)} times: {places}; {package.parent} is the one in use.")
    if strangers := _foreign_files(ours, package):
        problems.append(f"{package} holds files of another package: {', '.join(strangers)}.")
    return problems


def _installed(search_path: list[str] | None) -> list[Distribution]:
    found = distributions(name=NAME) if search_path is None else distributions(name=NAME, path=search_path)
    return list({_folder(one) / f"{NAME}-{one.version}": one for one in found}.values())


def _is_ours(distribution: Distribution) -> bool:
    return any(entry.value == _ENTRY_POINT for entry in distribution.entry_points)


def _folder(distribution: Distribution) -> Path:
    return Path(str(distribution.locate_file(""))).resolve()


def _is_editable(distribution: Distribution) -> bool:
    origin = distribution.read_text("direct_url.json")
    return origin is not None and bool(json.loads(origin).get("dir_info", {}).get("editable"))


def _foreign_files(ours: list[Distribution], package: Path) -> list[str]:
    """Modules in the package's folder that its own installation record does not list."""
    for distribution in ours:
        if _folder(distribution) != package.parent or _is_editable(distribution) or not distribution.files:
            continue
        recorded = {Path(str(distribution.locate_file(file))).resolve() for file in distribution.files}
        return sorted(file.name for file in package.glob("*.py") if file.resolve() not in recorded)
    return []
