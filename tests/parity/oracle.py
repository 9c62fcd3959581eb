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


def layer_keys(n_layers: int, valid: torch.Tensor, dropped: list[dict[int, int]]) -> list[torch.Tensor]:
    """Boolean (batch, length) of each layer: the keys that it may see."""
    layers = []
    for layer in range(n_layers):
        keys = valid.bool().clone()
        for b, of_sample in enumerate(dropped):
            for position, first in of_sample.items():
                keys[b, position] &= layer < first
        layers.append(keys)
    return layers


def layer_mask(keys: torch.Tensor, given) -> torch.Tensor:
    """Boolean (batch, 1, length, length) mask of a layer: what ``given`` shows, or causal, without all other keys."""
    own = torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
    shown = torch.ones_like(own).tril()
    if given is not None:
        shown = given if given.dtype == torch.bool else given == 0
    mask = shown & keys[:, None, None, :]
    return mask | (own & ~mask.any(dim=-1, keepdim=True))  # rows that see nothing must stay finite


@contextlib.contextmanager
def masked_layers(model, keys):
    """Run the decoder's layers with the given keys alone."""
    decoder = family_of(model).decoder_of(model)
    additive = decoder.config._attn_implementation == "eager"

    def hook(own):
        def before(module, args, kwargs):
            dtype, mask = args[0].dtype, layer_mask(own, kwargs["attention_mask"])
            given = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min) if additive else mask
            return args, {**kwargs, "attention_mask": given, "position_ids": None}

        return before

    handles = [
        layer.register_forward_pre_hook(hook(own.to(next(layer.parameters()).device)), with_kwargs=True)
        for layer, own in zip(decoder.layers, keys, strict=True)
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
    inputs, valid = continued(model, inputs, sequences)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    keys = layer_keys(len(family_of(model).decoder_of(model).layers), valid.cpu(), dropped)
    forget_positions(model)
    with torch.no_grad(), masked_layers(model, keys):
        return model(**inputs, use_cache=False, **options)


def continued(model, inputs, sequences):
    """The inputs of a prompt with what was generated behind it, and which of its tokens are no padding."""
    n_new = sequences.shape[1] - inputs["input_ids"].shape[1]
    inputs = dict(inputs, input_ids=sequences)
    of_generated = {"mm_token_type_ids": 0, "token_type_ids": int(family_of(model).prefix), "attention_mask": 1}
    for name, value in of_generated.items():
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, n_new), value=value)
    return inputs, inputs.get("attention_mask", torch.ones_like(sequences))


@contextlib.contextmanager
def without_rows(decoder, dropped: dict[int, int]):
    """Run the layers of one sample over the rows that are left, each row going where ``dropped`` says."""
    left = None

    def before(layer_idx):
        def hook(module, args, kwargs):
            nonlocal left
            hidden = args[0]
            if layer_idx == 0:
                left = torch.arange(hidden.shape[1])
            keep = torch.tensor([dropped.get(int(at), layer_idx + 1) > layer_idx for at in left], dtype=torch.bool)
            left = left[keep]
            hidden = hidden[:, keep]
            tables = tuple(table[:, left] for table in kwargs["position_embeddings"])
            mask = torch.ones(len(left), len(left), dtype=torch.bool).tril()[None, None]
            if decoder.config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
            mask = None if decoder.config.layer_types[layer_idx] == "linear_attention" else mask.to(hidden.device)
            given = {"position_embeddings": tables, "attention_mask": mask, "position_ids": None}
            return (hidden, *args[1:]), {**kwargs, **given}

        return hook

    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(decoder.layers)]
    try:
        yield lambda: left
    finally:
        for handle in handles:
            handle.remove()


def removed_run(model, inputs, sequences, dropped, position_ids=None):
    """Logits of every sample by itself, unpadded and without a cache, its dropped tokens taken out of the sequence.

    (batch, length, vocab_size), NaN where a token was dropped or is padding.
    """
    inputs, valid = continued(model, inputs, sequences)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    decoder, given = family_of(model).decoder_of(model), {}
    forget_positions(model)
    handle = decoder.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
        handle.remove()
        embeds, positions = given["inputs_embeds"], given["position_ids"]
        rows = []
        for b, of_sample in enumerate(dropped):
            own = valid[b].nonzero().squeeze(-1)
            first = {int((own < at).sum()): layer for at, layer in of_sample.items()}
            with without_rows(decoder, first) as left:
                if positions is None:
                    axes = torch.arange(len(own), device=own.device)[None]
                else:
                    axes = positions[:, b : b + 1, own] if positions.ndim == 3 else positions[b : b + 1, own]
                hidden = decoder(inputs_embeds=embeds[b : b + 1, own], position_ids=axes, use_cache=False)[0]
                logits = model.lm_head(hidden)[0]
                row = logits.new_full((sequences.shape[1], logits.shape[-1]), torch.nan)
                row[own[left().to(own.device)]] = logits
                rows.append(row)
    return torch.stack(rows)
