"""One call of ``generate``: what it brings, read before the device has work, and its images, encoded ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compat import cache_of
from ..config import SparseVLMConfig
from ..models import Grid, Layout, ModelAdapter
from ..request.inputs import visual_grids
from ..request.kept_features import KeptFeatures
from ..request.opening import plan_samples
from ..request.request import Request
from ..request.sample import StageRecord
from ..request.step import VisionRows
from ..request.timing import Mark
from .cuda_graphs import LRUCache, to_device
from .vision.patch_pruning import n_kept
from .vision.program import VisionOutput
from .vision.tables import Grids

_READ = (
    "input_ids", "attention_mask", "mm_token_type_ids", "second_per_grid_ts", "image_sizes", "batch_num_images",
)  # fmt: skip
_ENCODED = "mm_encoder_outputs"
# Positions of a batch, and what a model adds to those of new tokens, if it tells.
Positions = tuple[Tensor, Tensor | None]

Encode = Callable[[Tensor, Grids, tuple[int, ...] | None, int, frozenset[str]], VisionOutput]


@dataclass
class PendingVision:
    """Images whose encoding is under way, on a stream of its own where there are streams.

    Attributes
    ----------
    grids : tuple of (t, h, w)
        In visual tokens.
    seen : Seen
    begin, end : Mark
    stream : torch.cuda.Stream or None
    """

    grids: Grids
    seen: VisionOutput
    begin: Mark
    end: Mark
    stream: torch.cuda.Stream | None

    @property
    def n_tokens(self) -> int:
        """Visual tokens of the images."""
        return sum(t * h * w for t, h, w in self.grids)

    def kept(self) -> Tensor | None:
        """Indices of those that are encoded, on the host, if not all; waits for the choice alone."""
        if self.seen.ready is not None:
            self.seen.ready.synchronize()
        return self.seen.kept

    def wait(self) -> None:
        """Let what the current stream does next come after it."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


@dataclass
class Call:
    """One call of ``generate``.

    Attributes
    ----------
    arguments : dict
        For transformers to prepare: without the images, which are the engine's to encode.
    visual : dict
        Pixels, or what was encoded of them, by argument.
    on_host : dict
        Copies of the arguments that say where the images are.
    layouts : dict
        Of its images, by kind, where they are known.
    copies : int
        Answers to each prompt: how often transformers repeats every row.
    past_len : int
        Tokens that its cache holds.
    pending : PendingVision or None
    """

    arguments: dict[str, Any]
    visual: dict[str, Any]
    on_host: dict[str, Tensor]
    layouts: dict[str, Sequence[Layout] | None]
    copies: int
    past_len: int
    pending: PendingVision | None = None

    @classmethod
    def of(cls, adapter: ModelAdapter, given: Mapping[str, Any], copies: int) -> Call:
        """Read the arguments of a call; waits for what the device does."""
        modalities = adapter.modalities
        names = (*(modality.pixels for modality in modalities.values()), _ENCODED)
        visual = {name: given[name] for name in names if given.get(name) is not None}
        arguments = {name: value for name, value in given.items() if name not in visual}
        if isinstance(arguments.get("inputs"), Tensor):
            arguments["input_ids"] = arguments.pop("inputs")
        read = (*_READ, *(name for modality in modalities.values() for name in modality.size_inputs))
        tensors = {name: arguments.get(name) for name in read}
        on_host = {name: tensor.cpu() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        cache = cache_of(given)
        call = cls(arguments, visual, on_host, {}, copies, 0 if cache is None else cache.get_seq_length())
        known = {**given, **on_host, "input_ids": call.ids}
        call.layouts = {
            kind: adapter.family.layouts(adapter, kind, known)
            for kind, modality in modalities.items()
            if modality.pixels in visual or call.encoded(kind) is not None
        }
        return call

    @property
    def ids(self) -> Tensor:
        """Tokens that its cache does not hold, (batch, q_len)."""
        ids, mask = self.on_host["input_ids"], self.on_host.get("attention_mask")
        return ids[:, self.past_len :] if mask is None or mask.shape == ids.shape else ids

    def encoded(self, kind: str) -> Any:
        """Features that the caller has encoded already, if any."""
        return (self.visual.get(_ENCODED) or {}).get(kind)

    def hand_over(self, kept: KeptFeatures) -> None:
        """Take features of earlier turns in the place of images."""
        self.layouts, self.visual = kept.layouts, {_ENCODED: dict.fromkeys(kept.kinds, kept)}

    def prepared(self, name: str, value: Any, dim: int = 0) -> Any:
        """An argument on the host as transformers has prepared it, each row repeated; waits only where it is another.

        Parameters
        ----------
        name : str
        value : Any
            What transformers hands on.
        dim : int
            Of the batch.
        """
        if not isinstance(value, Tensor):
            return value
        if name not in self.on_host:
            return value.cpu()
        before = self.on_host[name]
        if self.copies == 1 and value is not self.arguments.get(name):
            return value.cpu()
        return before if self.copies == 1 else before.repeat_interleave(self.copies, dim=dim)

    def position_on_host(self, adapter: ModelAdapter, known: LRUCache[Hashable, Positions]) -> None:
        """Compute the positions on the host, where all that they depend on is, and send them to the device.

        Parameters
        ----------
        adapter : ModelAdapter
        known : LRUCache
            Those of the last prompts, by all that they depend on.
        """
        if "attention_mask" not in self.on_host or self.arguments.get("position_ids") is not None:
            return
        ids, device, base_model = self.on_host["input_ids"], self.arguments["input_ids"].device, adapter.base_model

        def compute() -> Positions:
            arguments = {**self.arguments, **self.on_host}
            positions = adapter.model._prepare_position_ids_for_generation(ids, arguments)
            return positions, getattr(base_model, "rope_deltas", None)

        key = self._layout(adapter)
        positions, deltas = compute() if key is None else known.get(key, compute)
        if isinstance(deltas, Tensor):
            base_model.rope_deltas = to_device(deltas, device)
        self.on_host["position_ids"] = positions
        self.arguments["position_ids"] = to_device(positions, device)

    def _layout(self, adapter: ModelAdapter) -> Hashable | None:
        """All that positions depend on: what was read of the arguments, but for the words among the tokens; ``None``:
        something was given that is no tensor."""
        given = {name for name, value in self.arguments.items() if name in _READ and value is not None}
        if not given <= self.on_host.keys():
            return None
        words = torch.isin(self.on_host["input_ids"], adapter.token_ids_apart, invert=True)
        read = {**self.on_host, "input_ids": self.on_host["input_ids"].masked_fill(words, -1)}
        return tuple((name, one.dtype, one.shape, _bytes(one)) for name, one in read.items())

    def prefetch_vision(
        self,
        adapter: ModelAdapter,
        encode: Encode,
        config: SparseVLMConfig,
        stream: torch.cuda.Stream | None,
        needs: frozenset[str],
    ) -> None:
        """Encode its images, or the share of their tokens that an option asks for, if they are of one kind.

        Parameters
        ----------
        adapter : ModelAdapter
        encode : callable
            See :meth:`~.runner.ModelRunner.encode`.
        config : SparseVLMConfig
        stream : torch.cuda.Stream, optional
            That the tower runs on.
        needs : frozenset of str
            What is read of the tower.
        """
        kind = next(iter(self.layouts))
        grids: Any = self.layouts[kind]  # those of a tower that has a program
        if len(self.layouts) != 1 or _ENCODED in self.visual or grids is None:
            return
        patches = self.visual[adapter.modalities[kind].pixels]
        device = next(adapter.vision.module.parameters()).device
        if patches.device != device:
            return
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # the last request is done with what is overwritten
            patches.record_stream(stream)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            begin = Mark.now(device)
            numbers = self._numbers(adapter, config, grids)
            seen = encode(patches, tuple(grids), numbers, config.image_cache, needs)
            self.pending = PendingVision(tuple(grids), seen, begin, Mark.now(device), stream)

    def _numbers(self, adapter: ModelAdapter, config: SparseVLMConfig, grids: Sequence[Grid]) -> tuple[int, ...] | None:
        """How many tokens of each image the tower computes; ``None``: all."""
        if config.vision_keep >= 1.0:
            return None
        by_sample = visual_grids(adapter, self.layouts, self.ids)
        if sum(map(len, by_sample)) != len(grids):
            by_sample = [[grid] for grid in grids]  # placeholders that do not fit, which is refused later
        return tuple(number for own in by_sample for number in _computed(own, config))  # type: ignore[arg-type]

    def misfit(self, adapter: ModelAdapter) -> str | None:
        """Images whose pixels are not what their grids and the tower say, which the model itself refuses."""
        tower = adapter.vision.program
        if tower is None:  # its own modules look at their inputs
            return None
        grids: Any
        for kind, grids in self.layouts.items():
            pixels = self.visual.get(adapter.modalities[kind].pixels)
            if pixels is None:
                continue
            n_patches = sum(t * h * w for t, h, w in grids or ()) * adapter.vision.patches_per_token
            if grids is None or pixels.ndim != 2 or pixels.shape[0] != n_patches:
                return f"{kind} pixels of shape {tuple(pixels.shape)} for {n_patches} patches"
            if pixels.shape[1] != (size := tower.projection.weight[0].numel()):
                return f"{kind} pixels of shape {tuple(pixels.shape)} for patches of {size} numbers"
        return None


@dataclass(frozen=True)
class Prompt:
    """Tokens of a batch, on the host.

    Attributes
    ----------
    ids : Tensor of shape (batch, q_len), int64
    positions : Tensor of shape (n_axes, batch, q_len), int64
    feature_rows : Tensor of shape (batch, q_len), int64
        Row of the vision tower's output, images before videos, that stands for a visual token; -1 for other tokens.
    n_features : int
        Rows that the tower has to give.
    kept : Tensor of shape (n_kept,), int64, or None
        Rows that the tower gives, ascending, where it computes some only: the others have row -1.
    """

    ids: Tensor
    positions: Tensor
    feature_rows: Tensor
    n_features: int
    kept: Tensor | None = None

    @classmethod
    def of(
        cls, adapter: ModelAdapter, ids: Tensor, positions: Tensor, kinds: Collection[str], copies: int = 1
    ) -> Prompt:
        """Read a prompt that brings images of ``kinds`` ("image", "video"), its rows in groups of ``copies`` equal ones
        that share them."""
        tokens = ids[::copies].numpy().ravel()
        rows = np.full(tokens.shape, -1, dtype=np.int64)
        so_far = 0
        for kind, modality in adapter.modalities.items():
            if kind in kinds:
                found = np.flatnonzero(tokens == modality.token_id)
                rows[found] = np.arange(so_far, so_far + found.size)
                so_far += found.size
        once = torch.from_numpy(rows).view(-1, ids.shape[1])
        return cls(ids, positions, once if copies == 1 else once.repeat_interleave(copies, dim=0), so_far)

    def only(self, kept: Tensor) -> Prompt:
        """The same where the tower computes these rows only."""
        new = torch.full((self.n_features,), -1)
        new[kept] = torch.arange(kept.shape[0])
        visual = self.feature_rows >= 0
        rows = self.feature_rows.clone()
        rows[visual] = new[self.feature_rows[visual]]
        return Prompt(self.ids, self.positions, rows, kept.shape[0], kept)

    @property
    def next_positions(self) -> Tensor:
        """Of the first new token, of shape (n_axes, batch)."""
        return self.positions[:, :, -1] + 1

    def vision_rows(self, request: Request, read: VisionRows, device: torch.device) -> list[VisionRows]:
        """What was read of the vision tower, for the visual tokens of every sample of a request on the host."""
        of_samples = zip(self.feature_rows, request.samples, strict=True)
        return [read.at(to_device(own[sample.visual], device)) for own, sample in of_samples]

    def embeddings(self, adapter: ModelAdapter, features: Tensor) -> Tensor:
        """Of shape (batch, q_len, hidden_size), on the device of ``features``."""
        device = features.device
        embeds: Tensor = adapter.decoder.embed(to_device(self.ids, device))
        rows = self.feature_rows.flatten()
        visual = (rows >= 0).nonzero()[:, 0]
        flat = embeds.flatten(0, 1)
        flat[to_device(visual, device)] = features[to_device(rows[visual], device)].to(flat.dtype)
        return flat.view_as(embeds)

    def late_rows(self, features: Tensor) -> Tensor:
        """Features in the places of their tokens, 0 elsewhere, (batch, q_len, hidden_size)."""
        rows = to_device(self.feature_rows, features.device)
        return features[rows.clamp_min(0)].masked_fill_(rows[..., None] < 0, 0.0)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def _computed(grids: Sequence[Grid], config: SparseVLMConfig) -> list[int]:
    return n_kept(grids, config.vision_keep, config.min_keep, config.min_keep_per_image)


def leave_out(adapter: ModelAdapter, request: Request, prompt: Prompt) -> None:
    """Leave out of a request what the vision tower does not compute, and plan with what is left.

    The budgets stay what they are, averages over all layers in the tokens of the whole image.

    Raises
    ------
    ValueError
        With ``strict``, where a floor binds in the tower, or a budget asks for more than the tower leaves.
    """
    config = request.config
    for b, sample in enumerate(request.samples):
        n_in = sample.visual.shape[0]
        n_asked, n_computed = sum(n_kept(sample.grids, config.vision_keep)), sum(_computed(sample.grids, config))
        if n_computed > n_asked:
            floors = f"min_keep={config.min_keep}"
            if len(sample.grids) > 1:
                floors += f" and min_keep_per_image={config.min_keep_per_image}"
            request.clamp(
                sample,
                f"vision_keep={config.vision_keep} asks for {n_asked} of {n_in} visual tokens, fewer than {floors} "
                f"allow: {n_computed} are computed",
            )
        sample.keep_only((prompt.feature_rows[b, sample.visual] >= 0).nonzero()[:, 0])
        if n_in:
            sample.add_stage(StageRecord(-1, n_in, None, None, kept=sample.alive))
    plan_samples(adapter, request)
