"""Forward pass through the Hugging Face modules for batches of equally sized images.

The model's own forward pass splits window attention into one call per window and synchronises with the host. Here all
windows of a batch are one attention call and every index is made once, so that a whole training step fits into a CUDA
graph. The result is the same; a unit test compares the two.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from training.pixels import MERGE, PATCH


def vision_block(
    block: nn.Module, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segment: int
) -> torch.Tensor:
    """One vision block whose attention stays within segments of ``segment`` tokens.

    Parameters
    ----------
    hidden_states : torch.Tensor
        Shape (batch, patches, hidden).
    cos, sin : torch.Tensor
        Shape (patches, head_dim).
    """
    attention = block.attn
    batch, patches, hidden = hidden_states.shape
    qkv = attention.qkv(block.norm1(hidden_states)).view(batch, patches, 3, attention.num_heads, -1)
    query, key, value = qkv.unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    query, key, value = (x.reshape(-1, segment, *x.shape[2:]).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value)
    hidden_states = hidden_states + attention.proj(mixed.transpose(1, 2).reshape(batch, patches, hidden))
    return hidden_states + block.mlp(block.norm2(hidden_states))


def text_layer(layer: nn.Module, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One decoder layer, causal, without a cache; shapes (batch, seq_len, hidden) and (1, seq_len, head_dim)."""
    return layer(hidden_states, attention_mask=None, position_embeddings=(cos, sin))


class SceneForward:
    """Logits of the answer tokens for a batch of same-sized images, each followed by text.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        With SDPA attention.
    head_ids : torch.Tensor
        int64 of shape (head,): prompt before the image.
    grid : tuple of int
        Patches (rows, cols) per image; whole windows only.
    compiled : bool
        Compile one vision block and one decoder layer and reuse them for all.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        head_ids: torch.Tensor,
        grid: tuple[int, int],
        compiled: bool = False,
    ):
        self.model = model
        self._head_ids = head_ids
        self._merged = (grid[0] // MERGE, grid[1] // MERGE)
        visual, device = model.model.visual, head_ids.device
        side = visual.window_size // PATCH // MERGE
        rows, cols = self._merged
        if rows % side or cols % side:
            raise ValueError(f"{rows}x{cols} merged tokens are no whole number of {side}x{side} windows")
        self._side = side
        self._window = (side * MERGE) ** 2
        positions = get_vision_position_ids(torch.tensor([[1, *grid]], device=device), MERGE)
        positions = self._to_windows(positions.view(1, rows * cols, -1)).view(-1, 2)
        self._vision_cos, self._vision_sin = visual.rotary_pos_emb(visual.patch_embed.proj.weight, positions)
        self._vision_block: Callable = torch.compile(vision_block, dynamic=False) if compiled else vision_block
        self._text_layer: Callable = torch.compile(text_layer, dynamic=False) if compiled else text_layer

    def visual_features(self, patches: torch.Tensor) -> torch.Tensor:
        """Merged visual tokens in window order.

        Parameters
        ----------
        patches : torch.Tensor
            Shape (batch, patches, 3 * 14 * 14), one temporal slice in the processor's order.

        Returns
        -------
        torch.Tensor
            Shape (batch, visual tokens, text hidden).
        """
        visual = self.model.model.visual
        # Both temporal slices of an image are the same, so their weights add up.
        hidden = F.linear(patches, visual.patch_embed.proj.weight.sum(dim=2).flatten(1))
        batch, patches, width = hidden.shape
        hidden = self._to_windows(hidden.view(batch, -1, MERGE**2 * width)).view(batch, patches, width)
        for index, block in enumerate(visual.blocks):
            segment = patches if index in visual.fullatt_block_indexes else self._window
            hidden = self._vision_block(block, hidden, self._vision_cos, self._vision_sin, segment)
        return visual.merger(hidden).view(batch, -1, self.model.config.text_config.hidden_size)

    def answer_logits(self, features: torch.Tensor, tail_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Next-token logits at chosen rows of the text after the image.

        Parameters
        ----------
        features : torch.Tensor
            From :meth:`visual_features`.
        tail_ids : torch.Tensor
            int64 of shape (batch, tail).
        rows : torch.Tensor
            int64 of shape (batch, n), indices into the tail.

        Returns
        -------
        torch.Tensor
            float32 of shape (batch, n, vocabulary).
        """
        text = self.model.model.language_model
        head = text.embed_tokens(self._head_ids).expand(features.shape[0], -1, -1)
        hidden = torch.cat([head, self._to_raster(features), text.embed_tokens(tail_ids)], dim=1)
        cos, sin = text.rotary_emb(hidden, self._text_positions(tail_ids.shape[1])[:, None])
        for layer in text.layers:
            hidden = self._text_layer(layer, hidden, cos, sin)
        at = rows + head.shape[1] + features.shape[1]
        chosen = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
        return self.model.lm_head(text.norm(chosen)).float()

    def _to_windows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Raster order to window order, (batch, merged tokens, width); a permutation of axes, so cheap to reverse."""
        (rows, cols), side = self._merged, self._side
        return tokens.unflatten(1, (rows // side, side, cols // side, side)).transpose(2, 3).flatten(1, 4)

    def _to_raster(self, tokens: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`_to_windows`."""
        (rows, cols), side = self._merged, self._side
        return tokens.unflatten(1, (rows // side, cols // side, side, side)).transpose(2, 3).flatten(1, 4)

    def _text_positions(self, tail: int) -> torch.Tensor:
        """M-RoPE positions of a prompt with one image, int64 of shape (3, seq_len)."""
        device, head, (rows, cols) = self._head_ids.device, self._head_ids.shape[0], self._merged
        row = torch.arange(rows, device=device).repeat_interleave(cols)
        col = torch.arange(cols, device=device).repeat(rows)
        image = torch.stack([torch.zeros_like(row), row, col]) + head
        before = torch.arange(head, device=device).expand(3, -1)
        after = (torch.arange(tail, device=device) + head + max(rows, cols)).expand(3, -1)
        return torch.cat([before, image, after], dim=1)
