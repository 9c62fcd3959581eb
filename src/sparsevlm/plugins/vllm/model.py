"""The part of a model of vLLM that drops visual tokens behind the vision tower, and tells where the kept ones were."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from .budget import kept_per_run
from .choice import Run, choose, grouped
from .mm_config import tell_pruning
from .options import KEY, Options
from .positions import N_CHANNELS, from_channels, grid_coordinates, place_visual, prompt_positions, to_channels
from .processor import FIELD

# Inputs of the tower that hold all items one behind the other: of patches, and of visual tokens.
_PATCHES = ("pixel_values", "pixel_values_videos")
_TOKENS = ("image_embeds", "video_embeds")


class PruningModel:
    """Mixin before a model of vLLM; without options of the engine it changes nothing."""

    supports_multimodal_pruning = True
    frames_apart = False  # whether the frames of a video stand apart in the prompt

    config: Any
    language_model: Any
    visual: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        prunes = getattr(vllm_config.model_config.hf_config, KEY, None) is not None
        if prunes:
            tell_pruning(vllm_config.model_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._prunes = prunes
        if prunes:
            self.is_multimodal_pruning_enabled = False  # of vLLM's own, whose steps are not to follow the tower
            self._most_encoded = vllm_config.scheduler_config.max_num_batched_tokens

    def get_encoder_cudagraph_config(self) -> Any:
        """Tells what of the tower vLLM may record: nothing, as the choice follows it."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return dataclasses.replace(config, modalities=[]) if self._prunes else config

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features of the kept tokens of each image or video, each row with its coordinates behind it."""
        if not self._prunes:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        modality = "image" if kwargs.get("image_grid_thw") is not None else "video"
        written = kwargs.pop(FIELD.format(modality), None)
        if written is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        options = [Options.from_key(bytes(one.tolist()).decode()) for one in written]
        grids = [tuple(map(int, grid)) for grid in kwargs[f"{modality}_grid_thw"].tolist()]
        seconds = _seconds(kwargs, len(grids))
        found: list[Tensor] = []
        for items in self._parts(grids):
            features = super().embed_multimodal(**_of_items(kwargs, grids, items, self._merge**2))  # type: ignore[misc]
            found += self._pruned(
                features, [options[i] for i in items], [grids[i] for i in items], [seconds[i] for i in items], modality
            )
        return tuple(found)

    @property
    def _merge(self) -> int:
        return int(self.config.vision_config.spatial_merge_size)

    def _parts(self, grids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Places of images for one call of the tower: vLLM has counted the tokens that are kept, but memory is taken
        by all."""
        part: list[int] = []
        left = self._most_encoded
        for i, (frames, height, width) in enumerate(grids):
            n_visual = frames * height * width // self._merge**2
            if part and n_visual > left:
                yield part
                part, left = [], self._most_encoded
            part.append(i)
            left -= n_visual
        if part:
            yield part

    def _pruned(
        self,
        features: Sequence[Tensor],
        options: Sequence[Options],
        grids: Sequence[Sequence[int]],
        seconds: Sequence[float],
        modality: str,
    ) -> list[Tensor]:
        """Rows that go on of each item, with the channels of their coordinates."""
        texts: dict[tuple[int, ...], Tensor] = {}
        for one in options:  # on all ranks, as each holds a part of the embeddings
            if one.text and one.text not in texts:
                ids = torch.tensor(one.text, dtype=torch.long, device=features[0].device)
                texts[one.text] = self.language_model.embed_input_ids(ids)
        runs = [
            self._runs(*item, texts.get(item[1].text), modality)
            for item in zip(features, options, grids, seconds, strict=True)
        ]
        found: list[list[Tensor]] = [[] for _ in features]
        for items in grouped(options):
            owners = [i for i in items for _ in runs[i]]
            chosen = self._chosen([run for i in items for run in runs[i]], options[items[0]])
            for owner, rows in zip(owners, chosen, strict=True):
                found[owner].append(rows)
        return [torch.cat(parts) for parts in found]

    def _chosen(self, runs: Sequence[Run], options: Options) -> list[Tensor]:
        """Rows that go on of each run, the same on all ranks: sums of others may differ in the last digit, and with
        them a choice."""
        group = get_tp_group()
        if group.world_size > 1 and group.rank_in_group > 0:
            shapes = ((min(run.n_keep, len(run.rows)), run.rows.shape[1] + N_CHANNELS, run.rows) for run in runs)
            rows = [like.new_empty(n_rows, width) for n_rows, width, like in shapes]
        else:
            chosen = choose(runs, options, self.config.get_text_config().hidden_size)
            rows = [torch.cat([one, to_channels(at, one.dtype).to(one.device)], dim=-1) for one, at in chosen]
        return [group.broadcast(one.contiguous(), src=0) for one in rows] if group.world_size > 1 else rows

    def _runs(
        self,
        features: Tensor,
        options: Options,
        grid: Sequence[int],
        seconds: float,
        text: Tensor | None,
        modality: str,
    ) -> list[Run]:
        """Runs of an image or a video, as they stand in the prompt."""
        frames, rows, columns = grid[0], grid[1] // self._merge, grid[2] // self._merge
        if self.frames_apart and modality == "video":
            parts, coordinates = features.split(rows * columns), grid_coordinates((1, rows, columns))
        else:
            parts, coordinates = (features,), grid_coordinates((frames, rows, columns), self._steps(modality, seconds))
        coordinates = coordinates.to(features.device, non_blocking=True)
        counts = kept_per_run([part.shape[0] for part in parts], options)
        return [Run(part, coordinates, n, text) for part, n in zip(parts, counts, strict=True)]

    def _steps(self, modality: str, seconds: float) -> float:
        """Positions from one frame to the next; an image has one."""
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return seconds * per_second if modality == "video" else 1.0

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt: the text's as they will be, those of images where these begin."""
        if not self._prunes:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        extents: list[int] = []
        is_visual = [False] * len(input_tokens)
        ids = {self.config.image_token_id, self.config.video_token_id}
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            extents += self._extents(feature)
            begin = feature.mm_position.offset
            for i in range(begin, min(begin + feature.mm_position.length, len(input_tokens))):
                is_visual[i] = input_tokens[i] in ids
        return prompt_positions(is_visual, extents)

    def _extents(self, feature: Any) -> list[int]:
        """Positions that an image or video takes, or each frame of one."""
        grid = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        frames, rows, columns = int(grid[0]), int(grid[1]) // self._merge, int(grid[2]) // self._merge
        if self.frames_apart and feature.modality == "video":
            return [max(rows, columns)] * frames
        seconds = 1.0
        if (given := feature.data.get("second_per_grid_ts")) is not None:
            seconds = float(given.data)
        return [int(grid_coordinates((frames, rows, columns), self._steps(feature.modality, seconds)).max()) + 1]

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Features without the channels, and positions with those of the features that are computed now."""
        n_tokens = mrope_positions.shape[1]
        if multimodal_embeddings:
            device = mrope_positions.device
            channels = torch.cat([one[:, -N_CHANNELS:] for one in multimodal_embeddings]).to(device)
            ids = torch.as_tensor(input_ids, device=device)[:n_tokens]
            is_visual = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
            mrope_positions = place_visual(mrope_positions, is_visual, from_channels(channels), num_computed_tokens)
        # A prompt ends in text, which stands behind all before it.
        delta = int(mrope_positions[0, -1]) + 1 - n_tokens
        return [one[:, :-N_CHANNELS] for one in multimodal_embeddings], mrope_positions, delta


def _seconds(kwargs: Mapping[str, Any], n_items: int) -> list[float]:
    """Seconds between the frames of each video, as far as they are given."""
    given = kwargs.get("second_per_grid_ts")
    return [1.0] * n_items if given is None else [float(one) for one in given]


def _of_items(kwargs: Mapping[str, Any], grids: Sequence[Sequence[int]], items: Sequence[int], n_merged: int) -> Any:
    """Inputs of the tower for some items that follow each other."""
    sizes = [frames * height * width for frames, height, width in grids]
    ends = [0, *itertools.accumulate(sizes)]
    first, last = ends[items[0]], ends[items[-1] + 1]
    cut = {}
    for name, value in kwargs.items():
        if name in _PATCHES:
            cut[name] = value[first:last]
        elif name in _TOKENS:
            cut[name] = value[first // n_merged : last // n_merged]
        else:
            cut[name] = value[items[0] : items[-1] + 1]
    return cut
