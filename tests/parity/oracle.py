"""The reference: a dense run over the whole sequence in which dropped tokens are hidden as keys, layer by layer."""

from __future__ import annotations

import contextlib

import torch

from toys import PAD


def dropped_from(report, sample: int) -> dict[int, int]:
    """Position of every dropped visual token and the first layer that must not see it."""
    dropped: dict[int, int] = {}
    found = report.samples[sample]
    for stage in found.stages:
        if stage.skipped_because:
            continue
        kept = {*stage.kept, *stage.recycled}
        for index, position in enumerate(found.visual_positions):
            if index not in kept:
                dropped.setdefault(position, stage.layer + 1)
    return dropped


def layer_masks(n_layers: int, valid: torch.Tensor, dropped: list[dict[int, int]]) -> list[torch.Tensor]:
    """Boolean (batch, 1, length, length) mask of each layer."""
    batch, length = valid.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masks = []
    for layer in range(n_layers):
        keys = valid.bool().clone()
        for b in range(batch):
            for position, first in dropped[b].items():
                keys[b, position] &= layer < first
        mask = (causal & keys[:, None, :]).unsqueeze(1)
        masks.append(mask | torch.eye(length, dtype=torch.bool))  # hidden rows must stay finite
    return masks


@contextlib.contextmanager
def masked_layers(model, masks):
    """Run the model's layers under the given masks."""
    additive = model.model.language_model.config._attn_implementation == "eager"

    def hook(mask):
        def before(module, args, kwargs):
            dtype = args[0].dtype
            given = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min) if additive else mask
            return args, {**kwargs, "attention_mask": given, "position_ids": None}

        return before

    layers = model.model.language_model.layers
    handles = [
        layer.register_forward_pre_hook(hook(mask.to(next(layer.parameters()).device)), with_kwargs=True)
        for layer, mask in zip(layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def oracle_logits(model, inputs, sequences, dropped, position_ids=None, valid=None):
    """Logits of the dense masked run at every position of ``sequences``.

    ``inputs`` are the prompt's, expanded to the batch of ``sequences``; ``dropped`` one dict per row.
    """
    n_new = sequences.shape[1] - inputs["input_ids"].shape[1]
    inputs = dict(inputs, input_ids=sequences)
    for name, value in (("mm_token_type_ids", 0), ("attention_mask", 1)):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, n_new), value=value)
    if valid is None:
        valid = inputs.get("attention_mask", torch.ones_like(sequences))
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    masks = layer_masks(len(model.model.language_model.layers), valid.cpu(), dropped)
    model.model.rope_deltas = None
    with torch.no_grad(), masked_layers(model, masks):
        return model(**inputs, use_cache=False).logits


def expand(inputs, repeats: int):
    """Repeat every sample, pixels included, as ``generate`` does for beams (one image per sample)."""
    out = {}
    for name, value in inputs.items():
        if name.startswith("pixel_values"):
            n = value.shape[0] // inputs["input_ids"].shape[0]
            out[name] = torch.cat([chunk.repeat(repeats, 1) for chunk in value.split(n)])
        else:
            out[name] = value.repeat_interleave(repeats, dim=0)
    return out


def prompt_valid(inputs):
    """Mask of tokens that are no padding."""
    return inputs["input_ids"] != PAD
