"""Report of one request: counts per layer, reasons, cost and time; printable, exportable, summable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from .report_sample import SampleReport
from .report_total import Cost, ReportTotal, Summable, cost_line, tokens_line, wall_line

REPORT_VERSION = 1
_NOTHING = Cost(0.0, 0.0)


@dataclass(frozen=True)
class Report:
    """The last request of a model under SparseVLM; :meth:`ReportTotal.of` sums several.

    A call of ``generate`` is a request, with images or without, on a kept cache as well.

    Attributes
    ----------
    model, selector : str
    path, path_reason : str
        Which path ran, and why: ``"engine"``, ``"plain"`` (hooks on the model's own modules), or ``"none"`` where the
        call ended before.
    skipped_because : str or None
        Why the request as a whole was left dense.
    samples : tuple of SampleReport
        One for each of the batch; none where the prompt, or the new tokens on a kept cache, have no image.
    flops : Cost
        Estimated FLOPs of the decoder's prefill (projections, MLP, attention), head and vision tower excluded. On a
        kept cache it is of the new tokens, whose attention to what was dropped before counts as well.
    kv_bytes : Cost
        Bytes of the cached keys and values after prefill, padding included. A cache is counted as a whole: of a turn on
        a kept one with all that earlier turns have left, which is ``past_kv_bytes``.
    kv_note : str or None
        Where the cache keeps dropped tokens' memory (static buffers), it is said here.
    wall_ms : dict
        Milliseconds inside the model: ``vision``, ``prefill`` (with the vision tower, where it runs inside),
        ``pruning`` (a part of prefill) and ``decode``.
    decode_steps : int
    logit_positions : tuple of tuple of int
        Prompt position of each row of logits (-1: padding), per sample, where rows were dropped.
    images_cached : int
        Images and videos whose encoding was kept from earlier calls (``image_cache``).
    n_refreshed : int
        Tokens of earlier turns that were prefilled again (``turns="refresh"``).
    features_bytes : int
        Bytes of visual features that are kept with the cache for later turns (likewise).
    text_note : str or None
        Where the choice has read text, and nothing tells the user's from the chat template's, it is said here.
    failed : str or None
        The error that ended the request. The rest tells how far it came.
    prompt_finished : bool
        Whether all layers have run over the prompt; where not, its costs are 0, and so are its ``final_tokens``.
    past_kv_bytes : Cost
        Bytes of the cache as the request found it, likewise; 0 of an empty one.
    asked : str or None
        Budget that was asked for, as the option says it: ``"keep=0.25"``, ``"schedule=(0.5, 0.25)"`` or
        ``"preset=paper-192"``; fractions to four digits.
    dtype : str or None
        Of the decoder's weights, such as ``"bfloat16"``.
    """

    model: str
    selector: str
    path: str
    path_reason: str
    skipped_because: str | None
    samples: tuple[SampleReport, ...]
    flops: Cost
    kv_bytes: Cost
    kv_note: str | None = None
    wall_ms: dict[str, float] = field(default_factory=dict)
    decode_steps: int = 0
    logit_positions: tuple[tuple[int, ...], ...] = ()
    failed: str | None = None
    images_cached: int = 0
    n_refreshed: int = 0
    features_bytes: int = 0
    text_note: str | None = None
    prompt_finished: bool = True
    past_kv_bytes: Cost = _NOTHING
    asked: str | None = None
    dtype: str | None = None

    @property
    def average_in(self) -> float:
        """Visual tokens per sample averaged over layer inputs and samples."""
        return _mean([sample.average_in for sample in self.samples])

    @property
    def average_out(self) -> float:
        """Visual tokens per sample averaged over layer outputs and samples."""
        return _mean([sample.average_out for sample in self.samples])

    @property
    def n_visual(self) -> float:
        """Visual tokens per sample in the input."""
        return _mean([sample.n_visual for sample in self.samples])

    @property
    def final_tokens(self) -> float:
        """Visual tokens per sample that left the last layer."""
        return _mean([sample.final_tokens for sample in self.samples])

    @property
    def budget_clamped(self) -> bool:
        """Tells whether the budget could not hold for some sample."""
        return any(sample.budget_clamped for sample in self.samples)

    def of_pictures(self, pictures: Sequence[tuple[int, int, str]], sample: int = 0) -> Report:
        """A copy that says which pictures a sample is of: drawn over others, it is refused.

        Parameters
        ----------
        pictures : sequence of (width, height, digest)
            From :func:`sparsevlm.inputs.identified`, of the sample's images and videos.
        sample : int
            Which sample of the batch.
        """
        samples = list(self.samples)
        if samples:
            samples[sample] = dataclasses.replace(samples[sample], pictures=tuple(pictures))
        return dataclasses.replace(self, samples=tuple(samples))

    def layer_rows(self) -> list[dict[str, Any]]:
        """One row per decoder layer: visual tokens in, kept, recycled (means over samples) and skip reasons.

        Of an unfinished prompt, the layers before the last one that it has entered.
        """
        if not self.samples:
            return []
        rows = []
        by_layer = [{stage.layer: stage for stage in sample.stages} for sample in self.samples]
        first = -1 if any(-1 in stages for stages in by_layer) else 0
        n_entered = min(len(sample.layer_tokens) for sample in self.samples)
        for layer in range(first, n_entered if self.prompt_finished else n_entered - 1):
            stages = [found[layer] for found in by_layer if layer in found]
            row: dict[str, Any] = {"layer": layer, "target": bool(stages)}
            if layer >= 0:
                row["visual_in"] = _mean([sample.layer_tokens[layer] for sample in self.samples])
            else:
                row["visual_in"] = self.n_visual
            row["kept"] = _mean([stage.n_kept for stage in stages]) if stages else row["visual_in"]
            row["recycled"] = _mean([stage.n_recycled for stage in stages]) if stages else 0.0
            row["skipped_because"] = _skip_note([stage.skipped_because for stage in stages])
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, the averages and layer rows included."""
        data = dataclasses.asdict(self)
        for sample, plain in zip(self.samples, data["samples"], strict=True):
            plain["average_in"], plain["average_out"] = sample.average_in, sample.average_out
        data.update(
            version=REPORT_VERSION,
            average_in=self.average_in,
            average_out=self.average_out,
            n_visual=self.n_visual,
            final_tokens=self.final_tokens,
            budget_clamped=self.budget_clamped,
            layers=self.layer_rows(),
        )
        return data

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, written to ``path`` as well where one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Rebuild a report from :meth:`to_dict`.

        Raises
        ------
        ValueError
            If ``data`` is no report of this version.
        """
        if not isinstance(data, dict) or data.get("version") != REPORT_VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"not a sparsevlm report of version {REPORT_VERSION} (got {found!r}).")
        try:
            samples = tuple(SampleReport.from_dict(sample) for sample in data["samples"])
            # reports of older releases do not say it
            older = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not MISSING}
            data = {**older, "past_kv_bytes": dataclasses.asdict(_NOTHING), **data}
            values = {f.name: data[f.name] for f in dataclasses.fields(cls)}
            values.update(
                samples=samples,
                flops=Cost(**data["flops"]),
                kv_bytes=Cost(**data["kv_bytes"]),
                past_kv_bytes=Cost(**data["past_kv_bytes"]),
                logit_positions=tuple(tuple(row) for row in data["logit_positions"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a damaged sparsevlm report: {error}.") from error
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read a report that :meth:`to_json` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a JSON file: {error}.") from error
        return cls.from_dict(data)

    def total(self) -> ReportTotal:
        """The summable part of this report; of one that failed, that it did."""
        if self.failed is not None:
            return ReportTotal(1, 0, 0, 0.0, 0.0, _NOTHING, _NOTHING, {}, 0, 0, 0, n_failed=1)
        return ReportTotal(
            n_requests=1,
            n_samples=len(self.samples),
            n_visual_sum=sum(sample.n_visual for sample in self.samples),
            average_in_sum=sum(sample.average_in for sample in self.samples),
            average_out_sum=sum(sample.average_out for sample in self.samples),
            flops=self.flops,
            kv_bytes=self.kv_bytes - self.past_kv_bytes,
            wall_ms=dict(self.wall_ms),
            decode_steps=self.decode_steps,
            n_skipped=int(self.skipped_because is not None),
            n_clamped=int(self.budget_clamped),
            final_tokens_sum=sum(sample.final_tokens for sample in self.samples),
        )

    def __add__(self, other: Summable) -> ReportTotal:
        return self.total() + other

    def __radd__(self, other: int) -> ReportTotal:
        return self.total().__radd__(other)

    def __str__(self) -> str:
        failed = [] if self.failed is None else [f"failed: {self.failed}", "as far as it came:"]
        rows = self.layer_rows()
        return "\n".join([*failed, *(_table(rows) if rows else []), *_summary_lines(self)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _skip_note(reasons: list[str | None]) -> str | None:
    """Why nothing was dropped at a layer; with the number of samples where it holds for some of them only."""
    found = sorted({reason for reason in reasons if reason})
    if not found:
        return None
    n_skipped = sum(reason is not None for reason in reasons)
    note = "; ".join(found)
    return note if n_skipped == len(reasons) else f"pruned, but {n_skipped} of {len(reasons)} samples: {note}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'layer':>5}  {'visual in':>9}  {'kept':>7}  {'recycled':>8}  note"]
    for row in rows:
        note = "" if not row["target"] else (row["skipped_because"] or "pruned")
        counts = f"{row['visual_in']:>9.1f}  {row['kept']:>7.1f}  {row['recycled']:>8.1f}"
        lines.append(f"{row['layer']:>5}  {counts}  {note}".rstrip())
    return [*lines, ""]


def _summary_lines(report: Report) -> list[str]:
    said = [f"selector {report.selector}", report.asked, report.dtype, f"path {report.path} ({report.path_reason})"]
    lines = [f"{report.model}: {', '.join(filter(None, said))}"]
    if report.skipped_because:
        lines.append(f"nothing pruned: {report.skipped_because}")
    lines.extend(_prompt_lines(report) if report.prompt_finished else _unfinished_lines(report))
    if report.images_cached:
        lines.append(f"images that were kept from earlier calls: {report.images_cached}")
    if report.n_refreshed:
        lines.append(f"turns='refresh': {report.n_refreshed} tokens of earlier turns prefilled again")
    if report.features_bytes:
        lines.append(f"visual features kept with the cache: {report.features_bytes / 1e6:.2f} MB")
    lines.extend(note for note in (report.kv_note, report.text_note) if note)
    if report.wall_ms:
        lines.append(wall_line(report))
    lines.extend(sample.budget_clamped for sample in report.samples if sample.budget_clamped)
    return lines


def _prompt_lines(report: Report) -> list[str]:
    lines = []
    if report.samples:
        lines.append(tokens_line(report))
    for sample in report.samples:
        if len(sample.images) > 1 and sample.stages:
            counts = zip(sample.stages[-1].per_image, sample.images, strict=True)
            lines.append("visual tokens per image at the end: " + ", ".join(f"{n} of {size}" for n, size in counts))
    of_before = f", {report.past_kv_bytes.sparse / 1e6:.2f} MB of it from before" if report.past_kv_bytes.sparse else ""
    lines.append(cost_line(report) + of_before)
    return lines


def _unfinished_lines(report: Report) -> list[str]:
    n_visual = f"visual tokens per sample: {report.n_visual:.1f} in; " if report.samples else ""
    return [f"{n_visual}the prompt was not finished"]
