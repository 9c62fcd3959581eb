"""Reads at a target layer, while it runs, what its selector asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..request.request import Request
from ..request.step import Readout, reads_text
from ..selection.scoring import text_to_visual_attention, visual_head_count
from .attention_probe import AttentionInputs, AttentionProbe


def read_target_layer(
    attention: nn.Module, request: Request, hidden: Tensor, offset: int, readout: Readout
) -> AttentionProbe | None:
    """Take what is needed of a layer's input, and prepare to read the attention to come.

    Parameters
    ----------
    attention : nn.Module
        Of the layer.
    request : Request
    hidden : Tensor of shape (batch, n_rows, hidden_size)
    offset : int
        Slot of the layer's cache that the first row goes to.
    readout : Readout
        Filled in, now and while the layer runs.

    Returns
    -------
    AttentionProbe or None
        To be disarmed when the layer has run.
    """
    needs, config = request.traits.needs, request.config
    if "previous_hidden_states" in needs:
        readout.previous = [
            hidden[b, request.local_rows(b, sample.positions)] for b, sample in enumerate(request.samples)
        ]
    text, last, prior = reads_text(request), "last_attention" in needs, "prior_attention" in needs
    if not (text or last or prior):
        return None

    @torch.no_grad()
    def read(inputs: AttentionInputs) -> None:
        n_heads = inputs.query.shape[1]
        n_top_heads = visual_head_count(n_heads) if config.heads == "visual" else None
        samples = list(enumerate(request.samples))
        if text:
            readout.text = [
                _rows_attention(request, b, sample.rater_candidates, offset, inputs, n_top_heads)
                for b, sample in samples
            ]
        if last:  # apart from the text rows, which are the same numbers with it and without
            readout.last = [_rows_attention(request, b, sample.last, offset, inputs)[0] for b, sample in samples]
        if prior:
            readout.prior = [_rows_attention(request, b, sample.behind, offset, inputs)[0] for b, sample in samples]

    return AttentionProbe(attention, read, request.tp_group)


def _rows_attention(
    request: Request, b: int, positions: Tensor, offset: int, inputs: AttentionInputs, n_top_heads: int | None = None
) -> Tensor:
    """Attention of a sample's tokens at some positions to its visual tokens, (n_positions, n_visual)."""
    query, key, mask = inputs.query[b], inputs.key[b], inputs.mask
    # The layer may be on another device than what it is given, which is moved inside of it.
    rows = request.local_rows(b, positions).to(query.device)
    visual_rows = request.local_rows(b, request.samples[b].positions).to(query.device)
    row_mask = key_mask = None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        row_mask = mask[min(b, mask.shape[0] - 1), 0][rows]
    elif isinstance(mask, Tensor):
        key_mask = torch.nn.functional.pad(mask[b].bool(), (0, key.shape[1] - mask.shape[1]))
    return text_to_visual_attention(
        query[:, rows],
        key,
        visual_rows + offset,
        rows + offset,
        inputs.scaling,
        row_mask,
        key_mask,
        n_top_heads,
        inputs.softcap,
    )
