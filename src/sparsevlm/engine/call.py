"""One call of ``generate``: what it brings, read before the device has work, and its pictures, encoded ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.clock import Mark
from ..runtime.prompt import PIXELS
from ..runtime.view import ModelView
from .vision import Grids, Seen, VisionPrograms

_READ = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts")


@dataclass
class Ahead:
    """Pictures whose encoding is under way, on a stream of its own where there are streams.

    Attributes
    ----------
    grids : tuple of (t, h, w)
        In patches.
    seen : Seen
    begin, end : Mark
    stream : torch.cuda.Stream or None
    """

    grids: Grids
    seen: Seen
    begin: Mark
    end: Mark
    stream: torch.cuda.Stream | None

    def n_tokens(self, view: ModelView) -> int:
        """Visual tokens of the pictures."""
        return sum(t * h * w for t, h, w in self.grids) // view.spatial_merge_size**2

    def kept(self) -> Tensor | None:
        """Which of them are encoded, on the host, if not all; waits for the choice alone."""
        if self.seen.ready is not None:
            self.seen.ready.synchronize()
        return self.seen.kept

    def wait(self) -> None:
        """Let what the current stream does next come after it."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_stream(self.stream)
            for tensor in () if self.seen.stays else (self.seen.hidden, self.seen.tokens):
                tensor.record_stream(current)


@dataclass
class Call:
    """One call of ``generate``.

    Attributes
    ----------
    given : dict
        Its arguments.
    on_host : dict
        Copies of those that say where the pictures are.
    ahead : Ahead or None
    samples_once : bool
        Whether every row of the batch is answered once, without beams or drafts.
    """

    given: dict[str, Any] = field(default_factory=dict)
    on_host: dict[str, Tensor] = field(default_factory=dict)
    ahead: Ahead | None = None
    samples_once: bool = False

    @classmethod
    def of(cls, given: dict[str, Any]) -> Call:
        """Read the arguments of a call; waits for what the device does."""
        tensors = {name: given.get(name) for name in _READ}
        return cls(given, {name: tensor.cpu() for name, tensor in tensors.items() if isinstance(tensor, Tensor)})

    def read(self, name: str, tensor: Any) -> Any:
        """A tensor on the host, without waiting where it is the one that the call was given."""
        if not isinstance(tensor, Tensor):
            return tensor
        return self.on_host[name] if name in self.on_host and tensor is self.given[name] else tensor.cpu()

    def note(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """Send a tensor to the device, and remember what it holds."""
        self.on_host[name], self.given[name] = tensor, to_device(tensor, device)
        sent: Tensor = self.given[name]
        return sent

    def read_all(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments on the host, pixels left out."""
        pixels = PIXELS.values()
        return {name: self.read(name, value) for name, value in arguments.items() if name not in pixels}

    def look_ahead(
        self, view: ModelView, programs: VisionPrograms, share: float, stream: torch.cuda.Stream | None
    ) -> None:
        """Encode its pictures, or this share of their tokens, if it has pictures of one kind."""
        kinds = [kind for kind, name in PIXELS.items() if isinstance(self.given.get(name), Tensor)]
        if len(kinds) != 1 or f"{kinds[0]}_grid_thw" not in self.on_host:
            return
        patches = self.given[PIXELS[kinds[0]]]
        grids: Grids = tuple((t, h, w) for t, h, w in self.on_host[f"{kinds[0]}_grid_thw"].tolist())
        device = next(view.vision_tower.parameters()).device
        if patches.device != device or patches.shape[0] != sum(t * h * w for t, h, w in grids):
            return
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # the last request is done with what is overwritten
            patches.record_stream(stream)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            begin = Mark.now(device)
            seen = programs(patches, grids, share)
            self.ahead = Ahead(grids, seen, begin, Mark.now(device), stream)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device that nobody waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
