"""MiniCPM-V 4.6: slices of images before the hybrid text model of Qwen3.5."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .base import ModelAdapter
from .decoder import FULL, RECURRENT, Decoder
from .layout import Grid, Layout, Tiles
from .plain import PlainFamily
from .qwen3_5 import state_size
from .tiled import Run, runs

_SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}


@dataclass(frozen=True)
class MiniCPMVFamily(PlainFamily):
    """Prompts as ``<image>whole</image><slice>…</slice><slice>…</slice>\\n<slice>…</slice>``, sizes by slice.

    A frame of a video is an image. The tokens around may be any, but for images another than for slices.
    """

    layer_kinds: ClassVar[frozenset[str]] = frozenset({FULL, RECURRENT})
    packs_pixels: ClassVar[bool] = True
    blocks: str = ""
    unreadable: str = "patches are joined in the middle of it"
    video_token: str = "video_token_id"
    in_parts: bool = True

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; it runs on hooks only."""
        decoder = super().decoder(model)
        return replace(decoder, state_size=state_size(decoder.module.config))

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """Of whole images and slices, from their sizes in patches; more of these form one token under
        ``downsample_mode="16x"``."""
        config = adapter.model.config
        if (sizes := inputs.get(_SIZES[kind])) is None:
            return None
        joins = (inputs.get("downsample_mode") or config.downsample_mode) != "4x"
        height, width = ((1 + joins) * side**config.merger_times for side in config.merge_kernel_size)
        return [(1, h // height, w // width) for h, w in sizes.tolist()]

    def layouts(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> Sequence[Layout] | None:
        """The whole image and then its slices, by the runs of placeholders; slices by themselves where these do not
        fit, or slices of one image differ in size."""
        grids, input_ids = self.grids(adapter, kind, inputs), inputs.get("input_ids")
        if not grids or input_ids is None:
            return grids
        rows = [(ids, runs(ids, adapter.modalities[kind].token_id)) for ids in input_ids.tolist()]
        copies = sum(len(own) for _, own in rows) // len(grids)
        images = [one for ids, own in rows[:: max(1, copies)] for one in _images(ids, own)]
        if sum(map(len, images)) != len(grids):
            return grids
        found, first = list[Layout](), 0
        for one in images:
            whole, *slices = grids[first : first + len(one)]
            first += len(one)
            if not slices:
                found.append(whole)
            elif len(set(slices)) == 1:
                together = (len(slices), *slices[0][1:])
                found.append(Tiles((whole, together), (False, False), columns=(1, _columns(one[1:]))))
            else:
                return grids
        return found


def _images(ids: Sequence[int], found: Sequence[Run]) -> list[list[Run]]:
    """Runs of each image: one begins behind the token that stands before the first of the prompt."""
    images = list[list[Run]]()
    for start, end in found:
        if not images or not found[0][0] or ids[start - 1] == ids[found[0][0] - 1]:
            images.append([])
        images[-1].append((start, end))
    return images


def _columns(slices: Sequence[Run]) -> int:
    """Slices before the first one behind which more than the end of one and the begin of another stands."""
    gaps = (after[0] - run[1] for run, after in itertools.pairwise(slices))
    return next((n for n, gap in enumerate(gaps, 1) if gap > 2), len(slices))
