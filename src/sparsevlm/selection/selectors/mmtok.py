"""MMTok: visual tokens that cover the text and the picture at once.

Source: Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs" (ICLR 2026),
arXiv 2508.18264, text-vision and vision-vision coverage and their weighted sum; without the optional agent that
rewrites the text. Runs before the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...config import check_above_zero
from ...kernels.places import first_picks
from ..context import BEFORE_DECODER, SelectionContext
from ..greedy import cover, cover_padded
from ..padded import PaddedContext, PaddedSelection
from ..similarity import cosines, padded_unit_rows, row_chunks, unit_rows


@dataclass(frozen=True)
class MMTokSelector:
    """Greedy facility location on ``Σ_m max_{j∈S} P_mj + α Σ_u max_{j∈S} Q_uj``.

    ``P = softmax_j(cos(t_m, x_j) / τ_t) / n_text`` for the text tokens t_m and ``Q = softmax_j(cos(x_u, x_j) / τ_v) /
    n_visual`` for the visual tokens, each row a distribution over the visual tokens.

    Parameters
    ----------
    text_temperature, visual_temperature : float
        τ_t and τ_v, above 0; the authors' by default, as the next.
    alpha : float
        α, above 0.
    """

    name = "mmtok"
    placement = BEFORE_DECODER
    needs = frozenset({"features", "text_features"})
    default_schedule = "single"
    most_padded = 1 << 13  # of which all values are held
    text_temperature: float = 0.02
    visual_temperature: float = 0.2
    alpha: float = 0.5

    def __post_init__(self) -> None:
        for option in ("text_temperature", "visual_temperature", "alpha"):
            check_above_zero(option, getattr(self, option))

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Choose ``n_keep`` rows that cover the text and the other rows."""
        assert context.features is not None  # declared in needs
        assert context.text_features is not None
        unit, text = unit_rows(context.features), unit_rows(context.text_features)
        covered = torch.cat([text, unit])
        n_text, n_visual = text.shape[0], unit.shape[0]
        sharpness = covered.new_full((n_text + n_visual,), 1.0 / self.visual_temperature)
        sharpness[:n_text] = 1.0 / self.text_temperature
        # log of the softmax' denominator and of the factor in front, so that v = exp(sharpness · cos − offset)
        offset = covered.new_full((n_text + n_visual,), math.log(n_visual / self.alpha))
        offset[:n_text] = math.log(max(1, n_text))
        for rows in row_chunks(n_text + n_visual, n_visual):
            offset[rows] += torch.logsumexp(cosines(covered[rows], unit) * sharpness[rows, None], dim=-1)

        def value(cosine: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
            return torch.exp(cosine * sharpness[rows, None] - offset[rows, None])

        return cover(covered, unit, n_keep, value=value)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.text_features is not None  # declared in needs
        assert context.is_text is not None
        valid, is_text = context.valid, context.is_text
        unit = padded_unit_rows(context.hidden_states, valid)
        covered = torch.cat([padded_unit_rows(context.text_features, is_text), unit], dim=1)

        def value(cosine: torch.Tensor, some: slice) -> torch.Tensor:
            return self._shares(cosine, is_text[some], valid[some])

        order = cover_padded(covered, unit, valid, context.most_kept, value=value)
        return PaddedSelection(first_picks(order, context.n_keep, valid))

    def _shares(self, cosine: torch.Tensor, is_text: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """P and Q one below the other, in the place of their cosines, (batch, n_text + n_visual, n_visual)."""
        cosine[:, : is_text.shape[1]] *= 1.0 / self.text_temperature
        cosine[:, is_text.shape[1] :] *= 1.0 / self.visual_temperature
        cosine.masked_fill_(~valid[:, None], -torch.inf)
        per_text = is_text.sum(dim=1, keepdim=True).clamp_min(1).double().log().expand_as(is_text)
        per_visual = (valid.sum(dim=1, keepdim=True).double() / self.alpha).log().expand_as(valid)
        offset = torch.cat([per_text, per_visual], dim=1).float() + torch.logsumexp(cosine, dim=-1)
        outside = ~torch.cat([is_text, valid], dim=1)
        return cosine.sub_(offset[..., None]).exp_().masked_fill_(outside[..., None], 0.0)
