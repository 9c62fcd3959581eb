"""Forward pass over a packed batch through the Hugging Face modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from training.drawn.packing import PER_TOKEN, Limits, Packed
from training.forward import Starts, text_layer, vision_block
from training.pixels import Patchifier


class PackedForward:
    """Forward pass whose shapes are those of the limits, whatever a batch holds.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
    limits : Limits
    compiled : bool
        Compile one vision block and one decoder layer and reuse them for all.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, limits: Limits, compiled: bool = False):
        self.model, self._limits = model, limits
        self._pixels = Patchifier(model.device)
        self._vision_block: Callable = torch.compile(vision_block, dynamic=False) if compiled else vision_block
        self._text_layer: Callable = torch.compile(text_layer, dynamic=False) if compiled else text_layer

    def decode(self, batch: Packed, visual_tokens: torch.Tensor) -> torch.Tensor:
        """Logits at ``batch.rows``, float32 of shape (answered, vocabulary)."""
        text = self.model.model.language_model
        # The tower's output lies behind the text's embeddings, to be taken from both.
        hidden = torch.cat([text.embed_tokens(batch.ids), visual_tokens])[batch.take]
        cos, sin = (table[0][:, None] for table in text.rotary_emb(hidden, batch.positions[:, None]))
        chats = Starts(batch.chat_starts, 2 * self._limits.longest)
        for layer in text.layers:
            hidden = self._text_layer(layer, hidden, cos, sin, chats)
        logits: torch.Tensor = self.model.lm_head(text.norm(hidden[batch.rows]))
        return logits.float()

    def visual_tokens(self, batch: Packed) -> torch.Tensor:
        """Merged visual tokens in the order of windows, (visual, text hidden)."""
        visual = self.model.model.visual
        # Both temporal slices of an image are the same, so their weights add up.
        weight = visual.patch_embed.proj.weight.sum(dim=2).flatten(1)
        hidden = F.linear(self._pixels.normalised(batch.patches, weight.dtype), weight)
        cos, sin = visual.rotary_pos_emb(hidden, batch.places)
        windows = Starts(batch.window_starts, self._limits.side**2 * PER_TOKEN)
        pictures = Starts(batch.picture_starts, self._limits.longest * PER_TOKEN)
        for index, block in enumerate(visual.blocks):
            spans = pictures if index in visual.fullatt_block_indexes else windows
            hidden = self._vision_block(block, hidden, cos, sin, spans)
        merged: torch.Tensor = visual.merger(hidden)
        return merged
