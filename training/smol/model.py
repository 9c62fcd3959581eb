"""The model at the beginning of a run, what is trained of it, and its trained parts."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from sparsevlm.bundled import bundled_path
from sparsevlm.smol.decoder import Decoder, read_decoder
from sparsevlm.smol.model import VISION_TOKENS, build_model, bundled_tower, make_tokenizer
from sparsevlm.smol.parts import Parts
from sparsevlm.smol.source import open_source
from training.adapters import LowRank, Rows
from training.architecture import cast_weights
from training.optimiser import Trained, split_weights
from training.smol.settings import SmolSettings


class SmolModel:
    """Smol with what is trained of it.

    Parameters
    ----------
    settings : SmolSettings
    device : torch.device
    dtype : torch.dtype
    decoder : Decoder, optional
        Instead of the one that ``settings.source`` names.

    Attributes
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        All that is not trained asks for no gradient.
    tokenizer : PreTrainedTokenizerFast
    trained : Trained
    original : nn.Module or None
        The decoder without its changes, where it is trained.
    """

    def __init__(
        self, settings: SmolSettings, device: torch.device, dtype: torch.dtype, decoder: Decoder | None = None
    ):
        decoder = decoder or _read(settings.source)
        parts = Parts.load(Path(settings.init)) if settings.init else None
        self._tower = parts.tower if parts else deeper_tower(settings.tower_depth)
        model = build_model(decoder, self._tower)
        if parts is None:
            begin_tower(model)
        else:
            parts.put_into(model, merge_lora=False)
        self.model: Qwen2_5_VLForConditionalGeneration = cast_weights(model.to(device), dtype)
        self.tokenizer: PreTrainedTokenizerFast = make_tokenizer(decoder)
        self.original: nn.Module | None = None
        if settings.lora_rank:
            self.original = copy.deepcopy(model.model.language_model).requires_grad_(False)
        self._rows = Rows(model.lm_head.weight, model.config.vision_start_token_id, len(VISION_TOKENS))
        self._low_rank = self._make_low_rank(settings, parts)
        self.trained = self._mark_trained()

    def _make_low_rank(self, settings: SmolSettings, parts: Parts | None) -> LowRank | None:
        start = parts.lora if parts else {}
        if not settings.lora_rank:
            if start:
                raise ValueError(f"{settings.init} was trained with changes of the decoder: give its --lora-rank")
            return None
        if start and (rank := next(iter(start.values()))[0].shape[0]) != settings.lora_rank:
            raise ValueError(f"{settings.init} was trained with --lora-rank {rank}, got {settings.lora_rank}")
        self._lora_scale = parts.lora_scale if parts and start else settings.lora_scale
        return LowRank(decoder_matrices(self.model), settings.lora_rank, self._lora_scale, start)

    def _mark_trained(self) -> Trained:
        visual = self.model.model.visual
        self.model.requires_grad_(False)
        visual.requires_grad_(True)
        trained = split_weights(list(visual.parameters()), (*visual.blocks, visual.merger))
        trained.adapters.append(self._rows)
        if self._low_rank is not None:
            trained.adapters.append(self._low_rank)
        for adapter in trained.adapters:
            for weight in adapter.weights:
                weight.requires_grad_(True)
        return trained

    def parts(self) -> Parts:
        """The trained parts as they are now."""
        weights = {name: weight.detach() for name, weight in self.model.model.visual.state_dict().items()}
        rows = self._rows.masters[0].detach()
        if self._low_rank is None:
            return Parts(self._tower, weights, rows, {})
        return Parts(self._tower, weights, rows, self._low_rank.factors(), self._lora_scale)


def _read(source: str) -> Decoder:
    with open_source(source or None) as path:
        return read_decoder(path)


def decoder_matrices(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Matrices of attention and MLPs of the decoder, by their names without ``.weight``."""
    text = model.model.language_model
    return {
        f"layers.{name}": module.weight for name, module in text.layers.named_modules() if isinstance(module, nn.Linear)
    }


def deeper_tower(depth: int) -> dict[str, Any]:
    """``vision_config`` of the bundled model's tower with ``depth`` blocks, the old ones spread evenly among them.

    Raises
    ------
    ValueError
        If the bundled tower has more blocks.
    """
    tower = bundled_tower()
    old = tower["depth"]
    if depth < old:
        raise ValueError(f"tower_depth must be at least {old}, the blocks of the bundled tower, got {depth}")
    full = [_new_place(index, old, depth) for index in tower["fullatt_block_indexes"]]
    return tower | {"depth": depth, "fullatt_block_indexes": full}


def _new_place(index: int, old: int, new: int) -> int:
    return index * new // old


@torch.no_grad()
def begin_tower(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Give a new tower what the bundled one knows; added blocks change nothing yet.

    The merger's last projection, the only matrix of another size, is drawn so that visual tokens are as large as the
    rows of the embedding.
    """
    bundled = Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_path(), dtype="float32").model.visual
    visual = model.model.visual
    old, new = len(bundled.blocks), len(visual.blocks)
    visual.patch_embed.load_state_dict(bundled.patch_embed.state_dict())
    visual.merger.ln_q.load_state_dict(bundled.merger.ln_q.state_dict())
    visual.merger.mlp[0].load_state_dict(bundled.merger.mlp[0].state_dict())
    for block in visual.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in (block.attn.proj, block.mlp.down_proj):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for index, block in enumerate(bundled.blocks):
        visual.blocks[_new_place(index, old, new)].load_state_dict(block.state_dict())
    last = visual.merger.mlp[2]
    size = model.lm_head.weight.square().mean().sqrt()
    nn.init.normal_(last.weight, std=float(size) * last.in_features**-0.5)
    nn.init.zeros_(last.bias)
