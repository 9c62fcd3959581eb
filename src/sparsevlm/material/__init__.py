"""Drawn tasks of the kinds that people ask about, for training and, held apart, for evaluation."""

from .draw import FAMILIES, check_packages, draw
from .example import Example, Turn
from .splits import EVALUATION, TRAINING

__all__ = ["EVALUATION", "FAMILIES", "TRAINING", "Example", "Turn", "check_packages", "draw"]
