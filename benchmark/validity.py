"""How far a small model's ranking of selectors agrees with published ones of real checkpoints, as Markdown tables.

``results/published.csv`` holds averages that others have published, by the table that they stand in: averages of
different tables are over different benchmarks, so methods are compared within a table alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from benchmark.e2e_rows import E2E, StoredRow, read_e2e

PUBLISHED = E2E.with_name("published.csv")
RANDOM = "random"
# Share of the visual tokens; below it no budget of ours is like a published one.
LEAST, MOST = 0.2, 0.34


@dataclass(frozen=True)
class Comparison:
    """Selectors of one published table at one budget, beside ours at the budget that is next to it.

    Attributes
    ----------
    source, url, read_in, checkpoint : str
        Of the table.
    share : float
        Of the visual tokens that are kept there.
    keep : str
        Our budget.
    published, ours : dict of str to float
        Retained percent of the dense score by selector; both have the same selectors.
    """

    source: str
    url: str
    read_in: str
    checkpoint: str
    share: float
    keep: str
    published: dict[str, float]
    ours: dict[str, float]

    def agreement(self) -> tuple[int, int]:
        """Counts the pairs of selectors that both rank alike, and those that they rank the other way round."""
        signs = [
            (self.published[one] - self.published[other]) * (self.ours[one] - self.ours[other])
            for one, other in combinations(self.published, 2)
        ]
        return sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)


def read_published() -> list[StoredRow]:
    """Loads the published averages."""
    return read_e2e(PUBLISHED)


def comparisons(published: list[StoredRow], ours: list[StoredRow]) -> list[Comparison]:
    """Sets each published table and budget beside our averages.

    Parameters
    ----------
    published : list of dict
        Rows of ``published.csv``.
    ours : list of dict
        Rows of ``accuracy.csv`` of one model.
    """
    averages: dict[str, dict[str, float]] = {}
    for row in ours:
        if row["task"] == "average" and row["selector"] != "dense" and row["keep"] != "adaptive":
            averages.setdefault(row["keep"], {})[row["selector"]] = float(row["retained"])
    tables: dict[tuple[str, float], list[StoredRow]] = {}
    for row in published:
        share = float(row["kept"]) / float(row["n_visual"])
        if LEAST <= share <= MOST:
            tables.setdefault((row["source"], share), []).append(row)
    found = []
    for (source, share), rows in tables.items():
        keep = min(averages, key=lambda budget: abs(float(budget) - share))
        both = {row["selector"]: float(row["retained"]) for row in rows if row["selector"] in averages[keep]}
        places = (rows[0][name] for name in ("url", "read_in", "checkpoint"))
        found.append(Comparison(source, *places, share, keep, both, {name: averages[keep][name] for name in both}))
    return found


def kendall(found: Iterable[Comparison]) -> float:
    """Computes Kendall's tau over the pairs within each table: 1 where all are ranked alike, -1 where none is.

    Pairs that are tied on one side count for neither, and are left out of the number of pairs.
    """
    alike, otherwise = (sum(counts) for counts in zip(*(one.agreement() for one in found), strict=True))
    return (alike - otherwise) / (alike + otherwise)


def validity_table(rows: list[StoredRow]) -> str:
    """Makes the tables of one model: a line for each selector of each published table, then the agreement.

    Parameters
    ----------
    rows : list of dict
        Rows of ``accuracy.csv`` of one model.

    Raises
    ------
    ValueError
        If there are none.
    """
    if not rows:
        raise ValueError("no stored row fits the filter of a table")
    found = comparisons(read_published(), rows)
    lines = [
        "| published in | checkpoint | tokens kept | selector | published | ours, `keep` | ours |",
        "|---" * 7 + "|",
    ]
    for one in found:
        name = f"[{one.source}]({one.url})" if one.url else one.source
        if one.read_in != "the source":
            name += f", by {one.read_in}"
        for selector in sorted(one.published, key=lambda selector: -one.published[selector]):
            cells = [name, one.checkpoint, f"{100 * one.share:.0f} %", f"`{selector}`"]
            cells += [f"{one.published[selector]:.1f}", one.keep, f"{one.ours[selector]:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
            name = ""
    return "\n".join([*lines, "", *agreement_lines(found), "", _origin(rows)]) + "\n"


def agreement_lines(found: list[Comparison]) -> list[str]:
    """Makes the table of agreement, and says where a random draw stands in each."""
    lines = ["| | pairs ranked alike | the other way round | Kendall's τ |", "|---" * 4 + "|"]
    for one in found:
        alike, otherwise = one.agreement()
        lines.append(f"| {one.source}, {100 * one.share:.0f} % | {alike} | {otherwise} | {kendall([one]):.2f} |")
    alike, otherwise = (sum(counts) for counts in zip(*(one.agreement() for one in found), strict=True))
    lines.append(f"| **all** | {alike} | {otherwise} | **{kendall(found):.2f}** |")
    for one in found:
        if RANDOM in one.published:
            place, of_ours = (
                sorted(by.values(), reverse=True).index(by[RANDOM]) + 1 for by in (one.published, one.ours)
            )
            lines += [
                "",
                f"`random` in {one.source}: {one.published[RANDOM]:.1f} %, place {place} of {len(one.published)}; here "
                f"{one.ours[RANDOM]:.1f} %, place {of_ours}.",
            ]
    return lines


def _origin(rows: list[StoredRow]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows))

    n = ", ".join(dict.fromkeys(row["n"] for row in rows if row["task"] == "average" and row["selector"] != "dense"))
    return (
        f"Retained percent of the dense score, averages. Ours: {all_of('model')}, suite {all_of('suite')}, n = {n}, "
        f"{all_of('dtype')}, {all_of('device')}, torch {all_of('torch')}, transformers {all_of('transformers')}, "
        f"commit {all_of('commit')}; accuracy.csv and published.csv in benchmark/results."
    )
