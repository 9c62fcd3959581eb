"""Names of transformers that move between its versions, and the check of its version."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

OLDEST, NEWEST = "5.17.0", "5.24.0"  # both ends of the range that the tests run on
logger = logging.getLogger(__name__)


@functools.cache
def check_transformers(allow_untested: bool = False, version: str | None = None) -> None:
    """Refuse a transformers outside of the tested range; warn, once per process, of a newer patch within it.

    Parameters
    ----------
    allow_untested : bool
        Warn instead of refusing.
    version : str, optional
        Instead of the installed one's.

    Raises
    ------
    ImportError
        With the command that installs a tested version.
    """
    if version is None:
        import transformers

        version = transformers.__version__
    found, oldest, newest = Version(version), Version(OLDEST), Version(NEWEST)
    if oldest <= found <= newest:
        return
    tested = f"{oldest.major}.{oldest.minor} to {newest.major}.{newest.minor}"
    if found.release[:2] == newest.release[:2] and found > newest:
        logger.warning("sparsevlm was tested on transformers up to %s; this is its patch %s.", NEWEST, version)
    elif allow_untested:
        logger.warning("sparsevlm was tested on transformers %s; %s was allowed by allow_untested.", tested, version)
    else:
        raise ImportError(
            f"transformers {version} is installed; sparsevlm was tested on {tested}, and other versions can answer "
            f"wrongly without an error. Run `pip install \"transformers>={oldest.major}.{oldest.minor},"
            f'<{newest.major}.{newest.minor + 1}"`, or pass allow_untested=True to apply_sparsevlm at your own risk.'
        )


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among the arguments or outputs of a model: ``cache`` since 5.24, ``past_key_values`` before."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache
