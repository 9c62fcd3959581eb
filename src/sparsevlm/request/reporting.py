"""Turns a request's record into its report."""

from __future__ import annotations

from typing import Any

from ..models import ModelAdapter
from ..report import Report
from ..report_sample import SampleReport
from ..report_total import Cost
from .costs import prefill_flops
from .request import Request
from .sample import Sample

_TEMPLATE = (
    "the choice has read the chat template's tokens as if they were the question: pass processor= to apply_sparsevlm"
)


def make_report(adapter: ModelAdapter, request: Request, *, knows_template: bool = True) -> Report:
    """Report of a request; waits for the device, as counts and times are read from it.

    Parameters
    ----------
    adapter : ModelAdapter
    request : Request
    knows_template : bool
        Whether a processor has told the user's text from the chat template's.
    """
    request.settle()
    samples = tuple(_sample_report(request, sample) for sample in request.samples)
    dense = sparse = 0.0
    for b, n_valid in enumerate(request.n_valid if request.finished else ()):
        per_sample = prefill_flops(adapter, [n_valid] * adapter.n_layers, request.past_len, request.n_last)
        dense += per_sample
        if request.samples and len(request.samples[b].layer_tokens) == adapter.n_layers:
            n_other = n_valid - request.samples[b].visual.shape[0]
            tokens = [n_other + visual for visual in request.samples[b].layer_tokens]
            sparse += prefill_flops(adapter, tokens, request.past_len, request.n_last)
        else:
            sparse += per_sample
    rows = () if request.rows is None else tuple(tuple(row[-request.logits_to_keep :]) for row in request.rows.tolist())
    return Report(
        model=adapter.name,
        selector=request.traits.name,
        path=request.path,
        path_reason=request.path_reason,
        skipped_because=request.skipped_because,
        samples=samples,
        flops=Cost(dense, sparse),
        kv_bytes=Cost(*map(float, request.kv_bytes)),
        past_kv_bytes=Cost(*map(float, request.past_bytes)),
        kv_note=request.kv_note,
        wall_ms=request.clock.milliseconds(),
        decode_steps=request.decode_steps,
        logit_positions=rows,
        failed=request.failed,
        prompt_finished=request.finished,
        images_cached=request.images_cached,
        n_refreshed=request.n_refreshed,
        features_bytes=request.kept_bytes,
        text_note=None if knows_template or not _has_read_text(request) else _TEMPLATE,
        asked=_asked(request),
        dtype=_dtype(adapter),
    )


def _asked(request: Request) -> str:
    """The budget as the options say it; fractions to four digits."""
    config = request.config
    if config.preset is not None:
        return f"preset={config.preset}"
    if isinstance(config.schedule, tuple):
        return f"schedule={_rounded(config.schedule)}"
    return f"keep={_rounded(config.keep)}"


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_rounded(one) for one in value)
    return round(value, 4) if isinstance(value, float) else value


def _dtype(adapter: ModelAdapter) -> str | None:
    """Of the decoder's weights; quantized ones are passed over."""
    weights = adapter.decoder.module.parameters()
    return next((str(one.dtype).removeprefix("torch.") for one in weights if one.is_floating_point()), None)


def _has_read_text(request: Request) -> bool:
    """Tells whether what was dropped depends on text."""
    stages = [stage for sample in request.samples for stage in sample.stages if not stage.skipped_because]
    return any("text_features" in request.traits.needs or stage.raters is not None for stage in stages)


def _sample_report(request: Request, sample: Sample) -> SampleReport:
    plan = sample.plan
    clamped = [*sample.clamped, *([plan.clamped] if plan is not None and plan.clamped else ())]
    tokens = tuple(sample.layer_tokens) or (sample.visual.shape[0],)
    return SampleReport(
        n_visual=sample.visual.shape[0],
        n_text=sample.other.shape[0],
        layer_tokens=tokens,
        final_tokens=sample.alive.shape[0] if request.finished else 0,
        visual_positions=tuple(sample.visual.tolist()),
        grids=sample.grids,
        views=sample.views,
        budget=None if plan is None else plan.budget,
        budget_clamped="; ".join(clamped) or None,
        stages=tuple(record.report(sample.image_sizes) for record in sample.stages),
        images=sample.image_sizes,
    )
