"""Forward pass through the Hugging Face modules for a packed batch of pictures and chats.

The model's own forward pass splits window attention into one call per window and synchronises with the host. Here all
samples lie one behind the other without padding, every index is made once, and attention runs per span of equal
lengths, so that a whole training step fits into a CUDA graph. The result is the same; a unit test compares the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision, rotate_half
from transformers.vision_utils import get_vision_position_ids

from sparsevlm.scenes import Layout
from training.groups import TOKEN, Group
from training.pixels import MERGE

# The layer whose output is asked where each visual token lies: its first two layers can know that much.
PLACE_LAYER = 1

Spans = tuple[tuple[int, int], ...]  # (sequences, length of each), one behind the other


class Starts(NamedTuple):
    """Where sequences of any lengths begin that lie one behind the other.

    Attributes
    ----------
    starts : torch.Tensor
        int32 of shape (sequences + 1,), from 0 to all tokens.
    longest : int
        No sequence is longer.
    """

    starts: torch.Tensor
    longest: int


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans | Starts, causal: bool
) -> torch.Tensor:
    """Attention within each sequence of a packed batch.

    Parameters
    ----------
    query, key, value : torch.Tensor
        Shape (total_len, heads, head_dim); key and value may have fewer heads.

    Returns
    -------
    torch.Tensor
        Shape (total_len, heads * head_dim).
    """
    if isinstance(spans, Starts):
        return _attend_any(query, key, value, spans, causal).flatten(1)
    mixed, start = [], 0
    for count, length in spans:
        stop = start + count * length
        q, k, v = (x[start:stop].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        mixed.append(out.transpose(1, 2).reshape(stop - start, -1))
        start = stop
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def _attend_any(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Starts, causal: bool
) -> torch.Tensor:
    # Written out, as versions of torch differ in whether fewer heads have to be asked for.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if query.is_cuda:
        starts, longest = spans
        reach = (-1, 0) if causal else (-1, -1)
        mixed: torch.Tensor = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=reach)
        return mixed
    parts = [x.tensor_split(spans.starts[1:-1].long(), dim=0) for x in (query, key, value)]
    return torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one), is_causal=causal).transpose(0, 1)
            for one in zip(*parts, strict=True)
        ]
    )


def vision_block(block: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Spans | Starts):
    """One vision block; shapes (patches, hidden) and (patches, head_dim)."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(hidden)).view(hidden.shape[0], 3, attention.num_heads, -1)
    query, key, value = qkv.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    hidden = hidden + attention.proj(attend(query, key, value, spans, causal=False))
    return hidden + block.mlp(block.norm2(hidden))


def text_layer(layer: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Spans | Starts):
    """One decoder layer, causal, without a cache; shapes (total_len, hidden) and (total_len, 1, head_dim)."""
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    query, key, value = (
        proj(states).view(hidden.shape[0], -1, attention.head_dim)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
    hidden = hidden + attention.o_proj(attend(query, key, value, spans, causal=True))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class TextForward:
    """Forward pass of a decoder over text alone, with its embedding as its head.

    Parameters
    ----------
    text : nn.Module
        ``model.language_model`` of a Qwen2.5-VL.
    count, length : int
        Sequences in a batch, tokens of each.
    compiled : bool
        Compile one decoder layer and reuse it for all.
    """

    def __init__(self, text: nn.Module, count: int, length: int, compiled: bool = False):
        self._text, self._spans = text, ((count, length),)
        weight = text.embed_tokens.weight
        positions = torch.arange(length, device=weight.device).expand(3, 1, -1)
        self._cos, self._sin = (table[0].repeat(count, 1)[:, None] for table in text.rotary_emb(weight, positions))
        self._layer: Callable = torch.compile(text_layer, dynamic=False) if compiled else text_layer

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, float32 of shape (count * length, vocabulary), of int64 ``ids`` of shape (count, length)."""
        hidden = self._text.embed_tokens(ids.flatten())
        for layer in self._text.layers:
            hidden = self._layer(layer, hidden, self._cos, self._sin, self._spans)
        return F.linear(self._text.norm(hidden), self._text.embed_tokens.weight).float()


@dataclass(frozen=True)
class Decoded:
    """What the decoder says of a group.

    Attributes
    ----------
    logits : torch.Tensor
        float32 of shape (count, tail, vocabulary).
    places : torch.Tensor
        Visual tokens after ``PLACE_LAYER`` in raster order, (n_images, tokens, hidden), a sample's pictures side by
        side.
    """

    logits: torch.Tensor
    places: torch.Tensor


class SceneForward:
    """Packed forward pass for fixed groups.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
    head_ids, between_ids : torch.Tensor
        int64: prompt before the first picture, and between two.
    groups : sequence of Group
    tail : int
        Text tokens after the last picture.
    compiled : bool
        Compile one vision block and one decoder layer and reuse them for all.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        head_ids: torch.Tensor,
        between_ids: torch.Tensor,
        groups: Sequence[Group],
        tail: int,
        compiled: bool = False,
    ):
        self.model, self.groups, self._tail = model, tuple(groups), tail
        self._head_ids, self._between_ids = head_ids, between_ids
        visual, text, device = model.model.visual, model.model.language_model, head_ids.device
        self._side = visual.window_size // TOKEN
        per_token, n_patches = MERGE**2, sum(g.n_images * g.tokens for g in groups) * MERGE**2
        window = self._side**2 * per_token
        self._windows: Spans = ((n_patches // window, window),)
        self._pictures: Spans = tuple((g.n_images, g.tokens * per_token) for g in groups)
        positions = [self._patch_positions(group.layouts[0]).repeat(group.n_images, 1) for group in groups]
        table = visual.rotary_pos_emb(visual.patch_embed.proj.weight, torch.cat(positions))
        self._vision_cos, self._vision_sin = table
        self._chats: Spans = tuple((g.count, self._length(g)) for g in groups)
        tables = [
            text.rotary_emb(text.embed_tokens.weight, self._text_positions(group).to(device)[:, None])
            for group in groups
        ]
        self._text_cos, self._text_sin = (
            torch.cat([tab[i][0].repeat(g.count, 1) for tab, g in zip(tables, groups, strict=True)])[:, None]
            for i in range(2)
        )
        self._vision_block: Callable = torch.compile(vision_block, dynamic=False) if compiled else vision_block
        self._text_layer: Callable = torch.compile(text_layer, dynamic=False) if compiled else text_layer

    def visual_features(self, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Merged visual tokens in raster order.

        Parameters
        ----------
        patches : sequence of torch.Tensor
            Per group (n_images, patches, 3 * 14 * 14), one temporal slice in the processor's order.

        Returns
        -------
        list of torch.Tensor
            Per group (n_images, tokens, text hidden).
        """
        visual = self.model.model.visual
        # Both temporal slices of an image are the same, so their weights add up.
        weight = visual.patch_embed.proj.weight.sum(dim=2).flatten(1)
        packed = []
        for group, pixels in zip(self.groups, patches, strict=True):
            merged = pixels.view(group.n_images, group.tokens, -1)
            packed.append(self._to_windows(merged, group.layouts[0]).reshape(-1, pixels.shape[-1]))
        hidden = F.linear(torch.cat(packed), weight)
        for index, block in enumerate(visual.blocks):
            spans = self._pictures if index in visual.fullatt_block_indexes else self._windows
            hidden = self._vision_block(block, hidden, self._vision_cos, self._vision_sin, spans)
        tokens = visual.merger(hidden)
        sizes = [group.n_images * group.tokens for group in self.groups]
        return [
            self._to_raster(part.view(group.n_images, group.tokens, -1), group.layouts[0])
            for part, group in zip(tokens.split(sizes), self.groups, strict=True)
        ]

    def decode(self, features: Sequence[torch.Tensor], tail_ids: Sequence[torch.Tensor]) -> list[Decoded]:
        """Run the decoder.

        Parameters
        ----------
        features : sequence of torch.Tensor
            From :meth:`visual_features`.
        tail_ids : sequence of torch.Tensor
            Per group int64 of shape (count, tail).
        """
        text = self.model.model.language_model
        packed = [
            self._embedded(group, seen, tails).flatten(0, 1)
            for group, seen, tails in zip(self.groups, features, tail_ids, strict=True)
        ]
        hidden, places = torch.cat(packed), None
        for index, layer in enumerate(text.layers):
            hidden = self._text_layer(layer, hidden, self._text_cos, self._text_sin, self._chats)
            if index == min(PLACE_LAYER, len(text.layers) - 1):
                places = hidden
        decoded, start = [], 0
        for group, (count, length) in zip(self.groups, self._chats, strict=True):
            rows = slice(start, start + count * length)
            last = hidden[rows].view(count, length, -1)[:, length - self._tail :]
            assert places is not None
            decoded.append(
                Decoded(
                    self.model.lm_head(text.norm(last)).float(),
                    self._visual_rows(group, places[rows].view(count, length, -1)),
                )
            )
            start += count * length
        return decoded

    def _length(self, group: Group) -> int:
        n_images = len(group.layouts)
        between = self._between_ids.shape[0] * (n_images - 1)
        return self._head_ids.shape[0] + between + n_images * group.tokens + self._tail

    def _embedded(self, group: Group, features: torch.Tensor, tail_ids: torch.Tensor) -> torch.Tensor:
        embed = self.model.model.language_model.embed_tokens
        seen = features.unflatten(0, (group.count, -1))
        parts = [embed(self._head_ids).expand(group.count, -1, -1), seen[:, 0]]
        if group.is_pair:
            parts += [embed(self._between_ids).expand(group.count, -1, -1), seen[:, 1]]
        return torch.cat([*parts, embed(tail_ids)], dim=1)

    def _visual_rows(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        start, pictures = self._head_ids.shape[0], []
        for _ in group.layouts:
            pictures.append(hidden[:, start : start + group.tokens])
            start += group.tokens + self._between_ids.shape[0]
        return torch.stack(pictures, dim=1).flatten(0, 1)

    def _to_windows(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Raster order to window order, (batch, tokens, width); a permutation of axes, so cheap to reverse."""
        rows, cols, side = *_grid(layout), self._side
        return tokens.unflatten(1, (rows // side, side, cols // side, side)).transpose(2, 3).flatten(1, 4)

    def _to_raster(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Inverse of :meth:`_to_windows`."""
        rows, cols, side = *_grid(layout), self._side
        return tokens.unflatten(1, (rows // side, cols // side, side, side)).transpose(2, 3).flatten(1, 4)

    def _patch_positions(self, layout: Layout) -> torch.Tensor:
        """Rotary positions of one picture's patches in window order, (patches, 2)."""
        rows, cols = _grid(layout)
        if rows % self._side or cols % self._side:
            raise ValueError(f"{rows}x{cols} merged tokens are no whole number of {self._side}x{self._side} windows")
        grid = torch.tensor([[1, rows * MERGE, cols * MERGE]], device=self._head_ids.device)
        positions = get_vision_position_ids(grid, MERGE)
        return self._to_windows(positions.view(1, rows * cols, -1), layout).reshape(-1, 2)

    def _text_positions(self, group: Group) -> torch.Tensor:
        """M-RoPE positions of a sample, int64 of shape (3, length)."""
        head, between = self._head_ids.shape[0], self._between_ids.shape[0]
        parts: list[int | tuple[int, int]] = [head, _grid(group.layouts[0])]
        for layout in group.layouts[1:]:
            parts += [between, _grid(layout)]
        return mrope_positions([*parts, self._tail])


def mrope_positions(parts: Sequence[int | tuple[int, int]]) -> torch.Tensor:
    """M-RoPE positions of text and pictures that follow each other (Qwen2-VL, section 2.1).

    Parameters
    ----------
    parts : sequence of int or tuple of int
        Tokens of a piece of text, or a picture's rows and columns of tokens.

    Returns
    -------
    torch.Tensor
        int64 of shape (3, tokens).
    """
    found, start = [], 0
    for part in parts:
        if isinstance(part, int):
            found.append((torch.arange(part) + start).expand(3, -1))
            start += part
        else:
            rows, cols = part
            row, col = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
            found.append(torch.stack([torch.zeros_like(row), row, col]) + start)
            start += max(rows, cols)
    return torch.cat(found, dim=1)


def _grid(layout: Layout) -> tuple[int, int]:
    """Merged visual tokens by row and column."""
    return layout.height // TOKEN, layout.width // TOKEN
