"""Visual features that the decoder adds behind its first layers, for the tokens that are left there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..request.request import Request
from ..request.step import Survivors


class LateRows:
    """Takes the addition over from the decoder, which would look for all tokens of the prompt.

    Parameters
    ----------
    request : Request
    mask : Tensor of shape (batch, q_len), bool
        Visual tokens.
    features : sequence of Tensor of shape (n_visual, hidden_size)
        Of all visual tokens of the batch, by layer.
    """

    def __init__(self, request: Request, mask: Tensor, features: Sequence[Tensor]) -> None:
        order = mask.flatten().cumsum(dim=0).view_as(mask) - 1
        of_samples = [order[b, sample.positions.to(order.device)] for b, sample in enumerate(request.samples)]
        self._left = {
            layer: [all_rows[own.to(all_rows.device)] for own in of_samples] for layer, all_rows in enumerate(features)
        }

    def add(self, request: Request, layer: int, hidden_states: Tensor) -> Tensor:
        """Output of a layer, (batch, n_rows, hidden_size), with its features."""
        features = self._left.pop(layer, None)
        if features is None:
            return hidden_states
        hidden_states = hidden_states.clone()
        for b, (sample, own) in enumerate(zip(request.samples, features, strict=True)):
            rows = request.local_rows(b, sample.positions)
            hidden_states[b, rows] = hidden_states[b, rows] + own.to(hidden_states.device, hidden_states.dtype)
        return hidden_states

    def keep(self, survivors: Sequence[Survivors]) -> None:
        """Leave out those of dropped tokens, and merge them as the states are."""
        for layer, features in self._left.items():
            self._left[layer] = [kept.of(own) for kept, own in zip(survivors, features, strict=True)]
