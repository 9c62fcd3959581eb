"""States without what is common to all of a sample."""

from __future__ import annotations

from torch import Tensor

from .dispatch import use_triton

# Of what is left of a state, the share of the longest that is rounding.
ROUNDING = 1e-6


def centre(states: Tensor, valid: Tensor) -> Tensor:
    """Minus their mean, scaled so that the mean length is 1; what rounding leaves of equal states becomes 0.

    Parameters
    ----------
    states : Tensor of shape (n_samples, n_visual, hidden_size)
        Overwritten where it is float32.
    valid : Tensor of shape (n_samples, n_visual), bool
        The other rows become 0.

    Returns
    -------
    Tensor of the same shape, float32
    """
    if use_triton(states):
        from .triton.centre import centre as triton_version

        return triton_version(states, valid)
    return centre_reference(states, valid)


def centre_reference(states: Tensor, valid: Tensor) -> Tensor:
    """Reference in plain torch."""
    states, outside = states.float(), ~valid.unsqueeze(-1)
    n_valid = valid.sum(dim=-1, keepdim=True).unsqueeze(-1).clamp_min(1)
    states.masked_fill_(outside, 0.0)
    rounding = ROUNDING * states.norm(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    states -= states.sum(dim=-2, keepdim=True) / n_valid
    states.masked_fill_(outside, 0.0)
    length = states.norm(dim=-1, keepdim=True)
    states /= (length.sum(dim=-2, keepdim=True) / n_valid).clamp_min(1e-30)
    return states.masked_fill_(length <= rounding, 0.0)
