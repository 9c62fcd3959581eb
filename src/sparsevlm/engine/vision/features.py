"""Rows of the vision tower for images that were not encoded ahead: those of several kinds, given encoded, or of a tower
that runs by its own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...models import Layout, ModelAdapter
from ...request.feature_exchange import NewFeatures
from ...request.inputs import visual_grids
from ...request.kept_features import KeptFeatures, rows_of
from ...request.step import VisionRows
from ..call import Call, Prompt
from ..runner import ModelRunner
from .program import VisionOutput
from .tables import Grids

_LAYER = "vision_feature_layer"


def encode_now(
    call: Call,
    adapter: ModelAdapter,
    runner: ModelRunner,
    may_encode: Callable[[], bool],
    cache_bytes: int,
    needs: frozenset[str],
) -> VisionOutput | None:
    """Encode the images and videos of a call.

    Parameters
    ----------
    call : Call
    adapter : ModelAdapter
    runner : ModelRunner
    may_encode : callable
        Tells whether the tower's program may take the place of its modules, if nothing is hooked to them.
    cache_bytes : int
    needs : frozenset of str
        What is read of the tower.

    Returns
    -------
    VisionOutput or None
        Images before videos; ``None``: something is to be read, and the tower's program does not run.
    """
    found: list[Tensor] = []
    late: list[Tensor] = []
    read: list[VisionRows] = []
    n_cached: int | None = None
    apart: str | None = None
    for kind, layouts in call.layouts.items():
        output, modality = call.encoded(kind), adapter.modalities[kind]
        if output is None:
            pixels = call.visual[modality.pixels]
            grids: Any = None if adapter.vision.program is None else layouts
            seen = None if grids is None else _by_program(runner, may_encode, pixels, tuple(grids), cache_bytes, needs)
            if seen is not None:
                found.append(seen.tokens.clone())  # before the next kind is encoded
                if seen.late:
                    late.append(torch.stack(seen.late))
                if seen.rows is not None:
                    read.append(seen.rows.each(lambda rows, dim: rows.clone()))
                n_cached = seen.n_cached if seen.n_cached is None else seen.n_cached + (n_cached or 0)
                continue
            if needs:
                return None
            output, apart = _by_modules(call, adapter, runner, kind)
        if needs:
            return None
        weight = adapter.decoder.embed.weight  # which may be on another device than the tower
        found.append(_rows(output.pooler_output).to(weight.device))
        if (features := adapter.decoder.late_features) is not None:
            late.append(torch.stack([_rows(of_layer) for of_layer in getattr(output, features.output)]).to(weight))
    # Of several kinds, each layer gets rows of all.
    joined = tuple(torch.cat(late, dim=1)) if late else ()
    rows = VisionRows.joined(read) if needs else None
    return VisionOutput(torch.cat(found), n_cached=n_cached, rows=rows, late=joined, apart=apart)


def _by_modules(call: Call, adapter: ModelAdapter, runner: ModelRunner, kind: str) -> tuple[Any, str | None]:
    """What the model's own modules make of the images of a kind, and why they run one by one where they do."""
    modality = adapter.modalities[kind]
    sizes = {name: call.arguments.get(name) for name in modality.size_inputs}
    # Sizes are read on the host.
    given = {name: call.on_host.get(name, call.arguments.get(name)) for name in modality.encoder_inputs}
    more = {name: value for name, value in given.items() if value is not None}
    encode, pixels = getattr(adapter.base_model, f"get_{kind}_features"), call.visual[modality.pixels]
    if not adapter.vision.captured:
        return encode(pixels, **sizes, **more), None
    runner.look()
    apart = runner.foreign_tower_hook() or runner.captured.unsupported()
    if apart is None:
        try:
            with runner.captured.in_place(_layers_read(adapter, more)):
                return encode(pixels, **sizes, **more), None
        except torch.OutOfMemoryError:
            runner.release_memory()
            runner.look()
            apart = "out of memory"
    return encode(pixels, **sizes, **more), apart


def _layers_read(adapter: ModelAdapter, given: Mapping[str, Any]) -> list[int] | None:
    """Hidden states of the tower that become visual tokens, counted from its embeddings on."""
    layers = given.get(_LAYER, getattr(adapter.model.config, _LAYER, None))
    return [layers] if isinstance(layers, int) else layers


def _rows(of_images: Any) -> Tensor:
    """Rows of all images, one tensor (…, hidden_size) each, one behind the other."""
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in of_images])


def _by_program(
    runner: ModelRunner,
    may_encode: Callable[[], bool],
    pixels: Tensor,
    grids: Grids,
    cache_bytes: int,
    needs: frozenset[str],
) -> VisionOutput | None:
    """Images by the tower's program, if it can run."""
    try:
        runner.look()
        if not may_encode() or runner.foreign_tower_hook():
            return None
        return runner.encode(pixels, grids, cache_bytes=cache_bytes, needs=needs)
    except torch.OutOfMemoryError:
        runner.release_memory()
        runner.look()
        return None


def encode_before(
    arguments: Mapping[str, Any],
    adapter: ModelAdapter,
    runner: ModelRunner,
    may_encode: Callable[[], bool],
    cache_bytes: int,
    needs: frozenset[str],
) -> NewFeatures | None:
    """Encode the images of a turn before its prompt; ``None``: they do not fit it, or see :func:`encode_now`.

    Parameters
    ----------
    arguments : mapping
        What belongs to the tokens of the turn.
    adapter, runner, may_encode, cache_bytes, needs
        See :func:`encode_now`.
    """
    call = Call.of(adapter, arguments, 1)
    if call.misfit(adapter) is not None:
        return None
    seen = encode_now(call, adapter, runner, may_encode, cache_bytes, needs)
    prompt = Prompt.of(adapter, call.ids, torch.empty(0), call.layouts)
    if seen is None or seen.tokens.shape[0] != prompt.n_features:
        return None
    layouts = visual_grids(adapter, call.layouts, call.ids)
    features = taken(adapter, prompt, 1, seen, [*call.layouts], layouts, arguments)
    return NewFeatures(features, seen.n_cached, seen.apart)


def handed_over(kept: KeptFeatures, prompt: Prompt, copies: int, needs: frozenset[str]) -> VisionOutput:
    """Features of earlier turns in the tower's order, images before videos.

    Parameters
    ----------
    kept : KeptFeatures
        As many as the prompt has placeholders.
    prompt : Prompt
        Its rows in groups of ``copies``.
    copies : int
    needs : frozenset of str
        What was to be read of the tower.
    """
    places = torch.cat([own[own >= 0] for own in prompt.feature_rows[::copies]])
    tokens = torch.cat([row.tokens for row in kept.rows])
    order = torch.empty_like(places)
    order[places] = torch.arange(places.shape[0])
    order, brought = order.to(tokens.device), [row for row in kept.rows if row.tokens.shape[0]]
    read = VisionRows.joined([row.vision.only(needs) for row in brought if row.vision is not None]) if needs else None
    late = zip(*(row.late for row in brought), strict=True)
    return VisionOutput(
        tokens[order],
        rows=None if read is None else read.at(order),
        late=tuple(torch.cat(of_layer)[order] for of_layer in late),
    )


def taken(
    adapter: ModelAdapter,
    prompt: Prompt,
    copies: int,
    seen: VisionOutput,
    kinds: Sequence[str],
    layouts: Sequence[Sequence[Layout]],
    given: Mapping[str, Any],
) -> KeptFeatures:
    """What the images of a prompt have become, to be kept for later turns.

    Parameters
    ----------
    adapter : ModelAdapter
    prompt : Prompt
        Its rows in groups of ``copies``.
    copies : int
    seen : VisionOutput
        Of all of its images.
    kinds : sequence of str
    layouts : sequence of sequence of Layout
        By prompt; empty where they are not known.
    given : mapping
        Arguments of the call.
    """
    weight = adapter.decoder.embed.weight
    places = [own[own >= 0].to(seen.tokens.device) for own in prompt.feature_rows[::copies]]
    tokens = [seen.tokens[at].to(weight.dtype) for at in places]
    late = [[rows[at].to(weight.dtype) for at in places] for rows in seen.late]
    read = [] if seen.rows is None else [seen.rows.at(at) for at in places]
    rows = rows_of(adapter, prompt.ids[::copies], kinds, tokens, late, read, layouts, given)
    return KeptFeatures(rows, tuple(kinds), frozenset(adapter.modalities[kind].token_id for kind in kinds))
