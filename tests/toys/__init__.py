"""Tiny random models and inputs, made in code; what the tests have to know of a model family is a row of FAMILIES."""

from .kinds import AUDIO, AUDIO_END, AUDIO_START, IMAGE, INDICATORS, IS_OLD, PAD, VIDEO, VISION_END, VISION_START
from .models import FAMILIES, ON_ENGINE, family_of, of_each_decoder, tiny_model, use_attention
from .prompts import PROMPTS, equally_long, join_visual, make_inputs, relative_error, runs_on_engine, split_visual

__all__ = [
    "AUDIO",
    "AUDIO_END",
    "AUDIO_START",
    "FAMILIES",
    "IMAGE",
    "INDICATORS",
    "IS_OLD",
    "ON_ENGINE",
    "PAD",
    "PROMPTS",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "equally_long",
    "family_of",
    "join_visual",
    "make_inputs",
    "of_each_decoder",
    "relative_error",
    "runs_on_engine",
    "split_visual",
    "tiny_model",
    "use_attention",
]
