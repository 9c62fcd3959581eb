"""What was trained of smol: tower, rows of the embedding, and low-rank changes of the decoder (LoRA)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from .model import VISION_TOKENS

SETTINGS_FILE = "parts.json"
_SHARD_SIZE = "12MB"
_TOWER, _ROWS, _LORA_A, _LORA_B = "visual.", "embed_tokens.rows", ".lora_a", ".lora_b"


@dataclass(frozen=True)
class Parts:
    """Trained parts.

    Attributes
    ----------
    tower : dict
        ``vision_config``.
    weights : dict of str to torch.Tensor
        Of the tower and its merger, by the names of the module.
    rows : torch.Tensor
        Embedding rows of ``VISION_TOKENS``, (4, hidden).
    lora : dict of str to tuple of torch.Tensor
        By the name of a decoder's weight, without ``.weight``: ``a`` (rank, in) and ``b`` (out, rank); the weight
        changes by ``lora_scale * b @ a``. Empty where the decoder was frozen.
    lora_scale : float
    """

    tower: dict[str, Any]
    weights: dict[str, torch.Tensor]
    rows: torch.Tensor
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]]
    lora_scale: float = 1.0

    def save(self, folder: Path) -> None:
        """Write bf16 safetensors files of at most 12 MB, and ``parts.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        tensors = {_TOWER + name: weight for name, weight in self.weights.items()} | {_ROWS: self.rows}
        for name, (a, b) in self.lora.items():
            tensors |= {name + _LORA_A: a, name + _LORA_B: b}
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        save_torch_state_dict(tensors, folder, max_shard_size=_SHARD_SIZE)
        settings = {"tower": self.tower, "lora_scale": self.lora_scale}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Parts:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If the folder holds no trained parts, or damaged ones.
        """
        if not (folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(f"no trained parts of smol in {folder}: it has no {SETTINGS_FILE}.")
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            tensors: dict[str, torch.Tensor] = {}
            for file in sorted(folder.glob("*.safetensors")):
                tensors |= load_file(file)
            lora = {
                name.removesuffix(_LORA_A): (a, tensors[name.removesuffix(_LORA_A) + _LORA_B])
                for name, a in tensors.items()
                if name.endswith(_LORA_A)
            }
            weights = {name.removeprefix(_TOWER): w for name, w in tensors.items() if name.startswith(_TOWER)}
            return cls(settings["tower"], weights, tensors[_ROWS], lora, settings["lora_scale"])
        except (KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"the trained parts of smol in {folder} are damaged: {error!r}.") from error

    @torch.no_grad()
    def put_into(self, model: Qwen2_5_VLForConditionalGeneration, *, merge_lora: bool = True) -> None:
        """Set the model's tower and rows, and change its decoder.

        Parameters
        ----------
        model : Qwen2_5_VLForConditionalGeneration
            Of :func:`~sparsevlm.smol.model.build_model`, with this tower.
        merge_lora : bool
            Whether the weights of the decoder change.
        """
        text, first = model.model.language_model, model.config.vision_start_token_id
        model.model.visual.load_state_dict(self.weights)
        text.embed_tokens.weight[first : first + len(VISION_TOKENS)] = self.rows.to(text.embed_tokens.weight)
        if merge_lora:
            for name, (a, b) in self.lora.items():
                weight = text.get_parameter(f"{name}.weight")
                weight += self.lora_scale * (b.to(weight) @ a.to(weight))


def parts_digest(folder: Path) -> str:
    """sha256 over the files of trained parts."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob(SETTINGS_FILE)]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
