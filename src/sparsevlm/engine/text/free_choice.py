"""The choice before the decoder of a selector that says itself how many tokens it takes, and that is not captured.

The host waits for the choice itself, and the prompt is then laid out as if the other tokens had never been there.
"""

from __future__ import annotations

import dataclasses

import torch

from ...models import ModelAdapter
from ...request.request import Request
from ...request.step import Readout, prune_step
from ..call import Prompt
from ..cuda_graphs import to_device
from ..vision.program import VisionOutput


def choose_freely(
    adapter: ModelAdapter, request: Request, prompt: Prompt, seen: VisionOutput
) -> tuple[Prompt, VisionOutput]:
    """Choose, and leave out of the request what does not go on; waits for the choice.

    Parameters
    ----------
    adapter : ModelAdapter
    request : Request
        Its samples are on the host; they and its records are brought up to date. It has seen what the selector needs.
    prompt : Prompt
    seen : VisionOutput
        Of the tower.

    Returns
    -------
    Prompt, VisionOutput
        The same, or where tokens were merged copies with rows of their own behind the others: samples may share images.
    """
    features, device = seen.tokens, seen.tokens.device
    dtype = adapter.decoder.embed.weight.dtype
    rows = [
        to_device(own[sample.positions], device)
        for own, sample in zip(prompt.feature_rows, request.samples, strict=True)
    ]
    request.to(device)
    (target,) = request.target_layers
    survivors = prune_step(request, target, lambda b: features[rows[b]].to(dtype), Readout(vision=request.vision)) or []
    request.to(torch.device("cpu"))
    if not any(kept.merges for kept in survivors):
        return prompt, seen
    feature_rows, planes = prompt.feature_rows.clone(), [[plane] for plane in (features, *seen.late)]
    n_rows = features.shape[0]
    for b, kept in enumerate(survivors):
        if not kept.merges:
            continue
        feature_rows[b, kept.after.cpu()] = torch.arange(n_rows, n_rows + kept.after.shape[0])
        n_rows += kept.after.shape[0]
        for parts in planes:
            parts.append(kept.merged(parts[0][rows[b]]).to(parts[0].dtype))
    tokens, *late = map(torch.cat, planes)
    prompt = dataclasses.replace(prompt, feature_rows=feature_rows)
    return prompt, dataclasses.replace(seen, tokens=tokens, late=tuple(late))
