"""How far a small model's ranking of selectors agrees with published ones of real checkpoints, as Markdown tables.

``results/published.csv`` holds averages that others have published, by the table that they stand in: averages of
different tables are over different benchmarks, so methods are compared within a table alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from benchmark.accuracy_rows import mean_retained, of_suites
from benchmark.e2e_rows import E2E, StoredRow, all_of, measured_on, read_e2e
from sparsevlm.evaluation.settings import DENSE
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.selectors import SELECTORS

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

    def agreement(self, n_before: int | None = None) -> tuple[int, int]:
        """Counts the pairs of selectors that both rank alike, and those that they rank the other way round.

        Parameters
        ----------
        n_before : int, optional
            Only pairs of which so many choose before the decoder.
        """
        signs = [
            (self.published[one] - self.published[other]) * (self.ours[one] - self.ours[other])
            for one, other in combinations(self.published, 2)
            if n_before is None or n_before == _is_before(one) + _is_before(other)
        ]
        return sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)


def read_published() -> list[StoredRow]:
    """Loads the published averages."""
    return read_e2e(PUBLISHED)


def comparisons(published: list[StoredRow], ours: dict[tuple[str, str], float]) -> list[Comparison]:
    """Sets each published table and budget beside our averages.

    Parameters
    ----------
    published : list of dict
        Rows of ``published.csv``.
    ours : dict
        Retained percent of one model by selector and budget.
    """
    averages: dict[str, dict[str, float]] = {}
    for (selector, keep), retained in ours.items():
        if selector != DENSE and keep != "adaptive":
            averages.setdefault(keep, {})[selector] = retained
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


def _is_before(selector: str) -> bool:
    return SelectorTraits.of(SELECTORS[selector]()).placement == BEFORE_DECODER


def kendall(found: Iterable[Comparison], n_before: int | None = None) -> float:
    """Computes Kendall's tau over the pairs within each table: 1 where all are ranked alike, -1 where none is.

    Pairs that are tied on one side count for neither, and are left out of the number of pairs. ``n_before`` is that of
    :meth:`Comparison.agreement`.
    """
    alike, otherwise = _counts(found, n_before)
    return (alike - otherwise) / (alike + otherwise)


def _counts(found: Iterable[Comparison], n_before: int | None = None) -> tuple[int, int]:
    counts = [one.agreement(n_before) for one in found]
    return sum(alike for alike, _ in counts), sum(otherwise for _, otherwise in counts)


def validity_table(rows: list[StoredRow]) -> str:
    """Makes the tables of one model: a line for each selector of each published table, then the agreement.

    Parameters
    ----------
    rows : list of dict
        Rows of ``accuracy.csv`` of one model.

    Raises
    ------
    ValueError
        As :func:`~benchmark.accuracy_rows.of_suites` does, and if a selector has several settings of one budget.
    """
    by_setting = of_suites(rows)
    ours = {cell[:2]: mean_retained(by_suite) for cell, by_suite in by_setting.items()}
    if len(ours) < len(by_setting):
        raise ValueError("several settings of one selector at one budget: narrow the filter by options, layers or seed")
    found = comparisons(read_published(), ours)
    shown = [row for by_suite in by_setting.values() for row in by_suite.values()]
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
    return "\n".join([*lines, "", *agreement_lines(found), "", _origin(shown)]) + "\n"


def agreement_lines(found: list[Comparison]) -> list[str]:
    """Makes the table of agreement, by published table and by kind of pair, and says where a random draw stands."""
    lines = ["| | pairs ranked alike | the other way round | Kendall's τ |", "|---" * 4 + "|"]
    lines += [_agreement_line(f"{one.source}, {100 * one.share:.0f} %", [one]) for one in found]
    kinds = {"both choose inside the decoder": 0, "one before it, one inside": 1, "both before it": 2}
    lines += [_agreement_line(f"pairs of which {kind}", found, number) for kind, number in kinds.items()]
    lines.append(_agreement_line("**all**", found))
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


def _agreement_line(name: str, found: list[Comparison], n_before: int | None = None) -> str:
    alike, otherwise = _counts(found, n_before)
    tau = f"{kendall(found, n_before):.2f}" if alike + otherwise else "–"
    return f"| {name} | {alike} | {otherwise} | {tau} |"


def _origin(rows: list[StoredRow]) -> str:
    n = sum({row["suite"]: int(row["n"]) for row in rows}.values())
    return (
        f"Retained percent of the dense score, averages. Ours: {all_of(rows, 'model')}, suites "
        f"{all_of(rows, 'suite')}, n = {n} in all, {measured_on(rows, device='device')}; accuracy.csv and "
        "published.csv in benchmark/results."
    )
