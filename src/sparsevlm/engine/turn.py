"""A call that goes on with a kept cache: which of its tokens are new, and the request that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..compat import cache_of
from ..kernels.attention import RaggedCache
from ..models import ModelAdapter
from ..request.placeholders import reason_of_text
from ..request.request import Request
from ..request.session import Session
from .call import Call, Prompt
from .capacities import power_of_two, row_capacity
from .cuda_graphs import to_device
from .runner import ModelRunner
from .text.kept_cache import Left, fill_cache
from .text.prefill import PackedRows
from .text.second_turn import SecondTurn
from .vision.program import VisionOutput


@dataclass
class Turn:
    """New tokens of a call on a kept cache, on the host.

    Attributes
    ----------
    cache : DynamicCache
    ids : Tensor of shape (batch, q_len), int64
    mask : Tensor of shape (batch, past_len + q_len)
    positions : Tensor of shape (n_axes or 1, batch, q_len), int64
    is_text : bool
    rows : list of Tensor
        By layer, its own among the packed keys, once it has run.
    """

    cache: DynamicCache
    ids: Tensor
    mask: Tensor
    positions: Tensor
    is_text: bool
    rows: list[Tensor]

    @classmethod
    def of(
        cls, call: Call, adapter: ModelAdapter, input_ids: Tensor, prepared: Mapping[str, Any], mask_length: int
    ) -> Turn:
        """Read a call as transformers has prepared it; ``mask_length`` is that of a mask that it has left out.

        Raises
        ------
        ValueError
            Why it is not for the engine.
        """
        ids, mask = call.prepared("input_ids", input_ids), call.prepared("attention_mask", prepared["attention_mask"])
        cache, positions, n_axes = cache_of(prepared), prepared["position_ids"].cpu(), adapter.decoder.n_position_axes
        length = mask_length if mask is None else mask.shape[1]
        if positions.ndim == 2:
            positions = positions[None]
        if ids.shape[1] == length:  # of the whole conversation
            ids = ids[:, call.past_len :]
        n = ids.shape[1]
        if not n or length != call.past_len + n or positions.shape[-1] < n:
            raise ValueError(f"an attention_mask for {length} tokens, of which {call.past_len} are kept and {n} new")
        mask = torch.ones((len(ids), length), dtype=torch.bool) if mask is None else mask
        if not bool(mask[:, -1].all()):
            raise ValueError("a prompt whose last token is masked")
        positions = positions[-n_axes:, :, -n:].expand(n_axes, len(ids), -1)
        return cls(cache, ids, mask, positions, not call.layouts, [])

    @property
    def text(self) -> list[Tensor]:
        """Positions of the new tokens that are no padding, by sample."""
        return [row.nonzero()[:, 0] for row in self.mask[:, -self.ids.shape[1] :]]

    @property
    def inputs(self) -> dict[str, Any]:
        """As the base model would be given them."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "past_key_values": self.cache}

    def prompt(self, adapter: ModelAdapter) -> Prompt:
        """Of text."""
        return Prompt.of(adapter, self.ids, self.positions, ())

    def open_text(self, session: Session) -> Request:
        """Begin the request of a turn of text."""
        request = session.new_request(self.cache, *self.ids.shape)
        request.skip(reason_of_text(session, self.ids, self.mask), [own.shape[0] for own in self.text])
        request.run_on("engine", "packed samples")
        return request

    def run(
        self, adapter: ModelAdapter, runner: ModelRunner, request: Request, prompt: Prompt, encoded: VisionOutput | None
    ) -> Tensor:
        """Run it.

        Parameters
        ----------
        adapter : ModelAdapter
        runner : ModelRunner
        request : Request
        prompt : Prompt
        encoded : VisionOutput, optional
            ``None``: of text.

        Returns
        -------
        Tensor of shape (batch, vocab_size)
            Logits of every sample's last row.
        """
        weight, positions = adapter.decoder.embed.weight, self.text
        if encoded is not None and encoded.rows is not None:
            request.see_vision(prompt.vision_rows(request, encoded.rows, weight.device))
        if encoded is not None:
            request.to(weight.device)
            positions = [sample.all_positions for sample in request.samples]
        packed = PackedRows([own.to(weight.device) for own in positions], self.ids.shape[1])
        seen = self.mask[:, : -self.ids.shape[1]].bool()
        space = runner.prefill.make_room(
            row_capacity(seen.numel() + packed.n_rows + 1), power_of_two(self.ids.shape[0])
        )
        embeds = prompt.embeddings(adapter, weight[:0] if encoded is None else encoded.tokens)
        late = () if encoded is None else tuple(map(prompt.late_rows, encoded.late))
        axes = to_device(prompt.positions, weight.device)
        of_rows = [axes[:, b, own] for b, own in enumerate(packed.positions)]
        rows, *late_rows = (
            torch.cat([one[b, own] for b, own in enumerate(packed.positions)]) for one in (embeds, *late)
        )
        assert runner.weights is not None  # since it was looked at
        turn = SecondTurn(adapter, runner.weights, space, self.cache, to_device(seen, weight.device))
        pruned = None if encoded is None else request
        if pruned is not None:
            request.see_embeddings(embeds)
        logits = turn.run(pruned, packed, rows, torch.cat(of_rows, dim=1), late_rows)
        request.forget_embeddings()
        self.rows = turn.rows
        per_row, n_layers = 2 * space.keys[0][0].numel() * space.keys[0].element_size(), len(space.keys)
        request.count_past((per_row * n_layers * seen.numel(), per_row * turn.n_past))
        request.finish(self.cache, (per_row * n_layers * self.mask.numel(), per_row * turn.n_keys))
        return logits

    def keep(self, request: Request, caches: Sequence[RaggedCache], n_new: int) -> None:
        """Leave its keys and values, and those of ``n_new`` tokens that came after, in the cache."""
        left = [Left(own, rows) for own, rows in zip(caches, self.rows, strict=True)]
        fill_cache(self.cache, request, left, n_new, self.text if self.is_text else (), self.ids.shape[1])
