"""Accuracy of pruning: suites of questions, a grid of settings, results with intervals."""

from .run import Evaluation, EvaluationRun
from .settings import ALL, DENSE, DOWNSAMPLE, EvalConfig, Setting, make_settings

__all__ = ["ALL", "DENSE", "DOWNSAMPLE", "EvalConfig", "Evaluation", "EvaluationRun", "Setting", "make_settings"]
