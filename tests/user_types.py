"""A user's script, which `nox -s lint` type-checks: it is not run."""

from torch import Tensor

from sparsevlm import Report, ReportTotal, SelectionContext, Selector


def totals(reports: list[Report]) -> tuple[float, int]:
    total = sum(reports)
    n_visual: float = ReportTotal.of(reports).n_visual + reports[0].n_visual
    whole: ReportTotal = ReportTotal.of(reports)
    both: ReportTotal = reports[0] + reports[1]
    started: ReportTotal = 0 + reports[0]
    return (total.average_in if total else n_visual), whole.n_failed + both.n_failed + started.n_failed


class Mine:
    def select(self, context: SelectionContext, n_keep: int) -> Tensor:
        return context.hidden_states[:n_keep, 0]


selector: Selector = Mine()
