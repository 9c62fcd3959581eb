"""The reference: a dense run over the whole sequence in which dropped tokens are hidden as keys, layer by layer."""

from __future__ import annotations

import contextlib
import operator

import torch

from sparsevlm.compat import cache_of
from toys import family_of


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


def layer_masks(
    n_layers: int, valid: torch.Tensor, dropped: list[dict[int, int]], prefix: int = 0
) -> list[torch.Tensor]:
    """Boolean (batch, 1, length, length) mask of each layer; the first ``prefix`` tokens all see each other."""
    batch, length = valid.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    causal[:prefix, :prefix] = True
    masks = []
    for layer in range(n_layers):
        keys = valid.bool().clone()
        for b in range(batch):
            for position, first in dropped[b].items():
                keys[b, position] &= layer < first
        mask = (causal & keys[:, None, :]).unsqueeze(1)
        sees_nothing = ~mask.any(dim=-1, keepdim=True)
        masks.append(mask | (torch.eye(length, dtype=torch.bool) & sees_nothing))  # such rows must stay finite
    return masks


@contextlib.contextmanager
def masked_layers(model, masks):
    """Run the decoder's layers under the given masks."""
    decoder = family_of(model).decoder_of(model)
    additive = decoder.config._attn_implementation == "eager"

    def hook(mask):
        def before(module, args, kwargs):
            dtype = args[0].dtype
            given = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min) if additive else mask
            return args, {**kwargs, "attention_mask": given, "position_ids": None}

        return before

    handles = [
        layer.register_forward_pre_hook(hook(mask.to(next(layer.parameters()).device)), with_kwargs=True)
        for layer, mask in zip(decoder.layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def recorded_positions(model):
    """Collect the positions that the decoder is given, call by call."""
    seen = []

    def record(module, args, kwargs):
        batch, length = kwargs["inputs_embeds"].shape[:2]
        positions, cache = kwargs.get("position_ids"), cache_of(kwargs)
        if positions is None:  # the decoder goes on from its cache
            start = 0 if cache is None else int(cache.get_seq_length())
            positions = torch.arange(start, start + length, device=kwargs["inputs_embeds"].device)[None]
        seen.append((batch, positions))

    handle = family_of(model).decoder_of(model).register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def joined_positions(model, seen) -> torch.Tensor:
    """Recorded positions one after the other, of shape (axes, batch, length), or (batch, length) where there is one."""
    axes = family_of(model).n_position_axes
    if axes == 1:
        return torch.cat([positions.expand(batch, -1) for batch, positions in seen], dim=-1)
    return torch.cat([positions[-axes:].expand(axes, batch, -1) for batch, positions in seen], dim=-1)


def forget_positions(model) -> None:
    """Make the next call begin anew, whatever calls came before."""
    for name in family_of(model).remembered:
        owner, _, attribute = name.rpartition(".")
        setattr(operator.attrgetter(owner)(model) if owner else model, attribute, None)


def masked_run(model, inputs, sequences, dropped, position_ids=None, **options):
    """The dense masked run over ``sequences``, without a cache.

    ``inputs`` are the prompt's, expanded to the batch of ``sequences``; ``dropped`` one dict per row.
    """
    n_new = sequences.shape[1] - inputs["input_ids"].shape[1]
    inputs = dict(inputs, input_ids=sequences)
    for name, value in (("mm_token_type_ids", 0), ("attention_mask", 1)):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, n_new), value=value)
    valid = inputs.get("attention_mask", torch.ones_like(sequences))
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    family, inputs = family_of(model), {name: value for name, value in inputs.items() if name != "token_type_ids"}
    prefix = sequences.shape[1] - n_new if family.prefix else 0
    masks = layer_masks(len(family.decoder_of(model).layers), valid.cpu(), dropped, prefix)
    forget_positions(model)
    with torch.no_grad(), masked_layers(model, masks):
        return model(**inputs, use_cache=False, **options)
