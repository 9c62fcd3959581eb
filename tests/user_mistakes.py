"""Mistakes of a user's script, each of which mypy has to find: it is not run.

One that goes unnoticed makes its comment an unused one, which `nox -s lint` reports.
"""

from torch import nn

import sparsevlm
from sparsevlm import Report, ReportTotal, SelectionContext, SparseVLMState, apply_sparsevlm, reset_n_vis


class Chooser:
    """No selector: the count is missing."""

    def select(self, context: SelectionContext) -> list[int]:
        return list(range(context.n_visual))


def mistakes(model: nn.Module, state: SparseVLMState, reports: list[Report]) -> None:
    apply_sparsevlm(model, keep_ratio=0.25)  # type: ignore[call-arg]
    apply_sparsevlm(model, selctor="span")  # type: ignore[call-arg]
    apply_sparsevlm(model, keep="0.25")  # type: ignore[arg-type]
    apply_sparsevlm(model, 0.25)  # type: ignore[arg-type]
    apply_sparsevlm(model, selector=Chooser())  # type: ignore[arg-type]
    apply_sparsevlm(model, selector=Chooser)  # type: ignore[arg-type]
    apply_sparsevlm(model, keep=0.25, raters="some")  # type: ignore[arg-type]
    apply_sparsevlm(model, keep=0.25, turns="again")  # type: ignore[arg-type]
    apply_sparsevlm(model, keep=0.25, schedule="linear")  # type: ignore[arg-type]
    apply_sparsevlm(model, keep=0.25, image_cache="2GB")  # type: ignore[arg-type]
    state.options(kep=0.5)  # type: ignore[call-arg]
    state.options(keep="half")  # type: ignore[arg-type]
    state.options(processor=None)  # type: ignore[call-arg]
    reset_n_vis(model)  # type: ignore[arg-type]
    print(reports[0].avarage_in)  # type: ignore[attr-defined]
    print(sum(reports).avarage_in)  # type: ignore[union-attr]
    print(ReportTotal.of(reports).avarage_in)  # type: ignore[attr-defined]
    print(ReportTotal.of(reports).samples)  # type: ignore[attr-defined]
    state.remove()  # type: ignore[attr-defined]
    sparsevlm.aply_sparsevlm(model)  # type: ignore[attr-defined]


def no_mistakes(model: nn.Module, state: SparseVLMState, name: str, budgets: list[float]) -> None:
    apply_sparsevlm(model, 256, keep=64, selector=name, schedule=[0.5, 0.25], preset=None, rank_tolerance="machine")
    apply_sparsevlm(model, keep=budgets, target_layers=(2, 6), schedule=(100, 50), weights="fp8", timeout=3)
    with state.options(keep=[0.5, 64], selector="random", seed=3, n_vis=256):
        pass
