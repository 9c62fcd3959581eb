"""Offline inference over a dataset of Ray Data: a callable class for ``map_batches``."""

from __future__ import annotations

from .predictor import SparseVLMPredictor

__all__ = ["SparseVLMPredictor"]
