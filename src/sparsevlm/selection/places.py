"""Orders of scores of samples filled up to one size, found without waiting for any value of the device."""

from __future__ import annotations

from ..kernels.score_order import highest, place_by_score

__all__ = ["highest", "place_by_score"]
