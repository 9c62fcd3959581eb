"""Timed calls that disagree: which figures of a case are not to be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# From the 20 to the 80 percentile, by the median. It takes several slow calls of ten to get there, or one of three;
# on GPUs of their own 19 of 20 figures that tables show of the stored rows (e2e.csv) stay below.
LIMIT = 0.25


def scatter(row: Mapping[str, str]) -> float:
    """Distance from the 20 to the 80 percentile of a row, by its median; 0 without them."""
    if not (row["p50"] and row["p20"] and row["p80"]) or float(row["p50"]) <= 0.0:
        return 0.0
    return (float(row["p80"]) - float(row["p20"])) / float(row["p50"])


def scattered(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], dict[str, float]]:
    """Find the times whose calls disagree by more than :data:`LIMIT`.

    Parameters
    ----------
    rows : iterable of mapping
        Of a case of equal requests: the times of mixed shapes differ because the requests do.

    Returns
    -------
    dict
        By provider and budget, :func:`scatter` by phase.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "ms" and (share := scatter(row)) > LIMIT:
            found.setdefault((row["provider"], row["keep"]), {})[row["phase"]] = share
    return found
