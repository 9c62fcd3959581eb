"""Smol: SmolLM2-135M-Instruct with a vision tower of ours, as a Qwen2.5-VL; a second model to measure accuracy on."""

from .folder import default_folder, smol_path

__all__ = ["default_folder", "smol_path"]
