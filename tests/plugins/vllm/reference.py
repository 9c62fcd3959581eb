"""What the transformers path answers to the same prompts with the same selectors before the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from PIL import Image

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.plugins.vllm.budget import kept_per_run
from sparsevlm.plugins.vllm.compat import vllm_version
from sparsevlm.plugins.vllm.options import Options
from sparsevlm.selection.context import BEFORE_DECODER, Selection

NEW_TOKENS = 8
FPS = 2.0


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes
    ----------
    images : tuple of (int, int)
        Height and width of each image, in tokens, and what it is drawn from.
    video : (int, int, int), optional
        Frames (two to a token), height and width in tokens.
    options : dict
        Of the request.
    """

    text: str = "what is in the picture"
    images: tuple[tuple[int, int, int], ...] = ()
    video: tuple[int, int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def pictures(self) -> list[Image.Image]:
        """Its images."""
        return [Image.fromarray(_noise(seed, height * 28, width * 28, 3)) for height, width, seed in self.images]

    def frames(self) -> Any:
        """Its video, (frames, height, width, 3)."""
        assert self.video is not None
        frames, height, width = self.video
        return _noise(frames, frames, height * 28, width * 28, 3)

    def metadata(self) -> dict[str, Any]:
        """What is known of its video."""
        assert self.video is not None
        n_frames = self.video[0]
        return {
            "fps": FPS, "duration": n_frames / FPS, "total_num_frames": n_frames,
            "frames_indices": list(range(n_frames)), "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip

    def messages(self) -> list[dict[str, Any]]:
        """As a chat template takes them."""
        parts = [{"type": "image"} for _ in self.images] + ([{"type": "video"}] if self.video else [])
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


def _noise(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@dataclass(frozen=True)
class PerRun:
    """A selector asked for each image, or frame, by itself."""

    inner: Any
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    name = "per-run"
    placement = BEFORE_DECODER
    default_schedule = "single"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.inner.needs)

    def select(self, context: Any, n_keep: int) -> Selection:
        """Selections of the runs, one behind the other."""
        assert n_keep == sum(self.counts)
        keep, targets, weights, start = [], [], [], 0
        for size, count in zip(self.sizes, self.counts, strict=True):
            rows = torch.arange(size)
            one = Selection(rows)
            if count < size:
                own = context.at(start + rows)
                own = dataclasses.replace(own, n_images=1, image_idx=torch.zeros_like(rows), sample=0)
                one = self.inner.select(own, count)
                one = one if isinstance(one, Selection) else Selection(one)
            kept = torch.zeros(size, dtype=torch.bool)
            kept[one.keep_idx] = True
            target = torch.where(kept, rows, -1) if one.merge_target is None else one.merge_target
            keep.append(one.keep_idx + start)
            targets.append(torch.where(target >= 0, target + start, -1))
            weights.append(kept.float() if one.weight is None else one.weight)
            start += size
        return Selection(torch.cat(keep), torch.cat(targets), torch.cat(weights))


class Reference:
    """The transformers path of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        cls = getattr(transformers, config.architectures[0])
        self.model = cls.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.frames_apart = "qwen3" in config.model_type
        # Older vLLM does not tell Qwen2.5-VL's processor when frames were taken, which then counts on 24 a second.
        self._is_told_times = self.frames_apart or Version(vllm_version()) >= Version("0.31")
        self._answers: dict[str, tuple[int, list[int]]] = {}

    def text(self, prompt: Prompt) -> str:
        """A prompt as the chat template writes it."""
        return self.processor.apply_chat_template(prompt.messages(), tokenize=False, add_generation_prompt=True)

    def text_for_vllm(self, prompt: Prompt) -> str:
        """The same for vLLM; up to 0.25 it wants markers around a video of Qwen3-VL, and replaces them as well."""
        text = self.text(prompt)
        if self.frames_apart and Version(vllm_version()) < Version("0.26"):
            text = text.replace("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>")
        return text

    def answer(self, prompt: Prompt, options: Options) -> tuple[int, list[int]]:
        """Tokens of the pruned prompt, and the new ones, under an engine's options."""
        options = options.of_request(prompt.options)
        key = repr((prompt, options.key()))
        if key not in self._answers:
            self._answers[key] = self._answer(prompt, options)
        return self._answers[key]

    def _answer(self, prompt: Prompt, options: Options) -> tuple[int, list[int]]:
        visual: dict[str, Any] = {}
        if prompt.images:
            visual["images"] = prompt.pictures()
        if prompt.video:
            visual |= {"videos": [prompt.frames()], "do_sample_frames": False}
            if self._is_told_times:
                known = {name: value for name, value in prompt.metadata().items() if name != "do_sample_frames"}
                visual["video_metadata"] = [known]
        inputs = self.processor(text=[self.text(prompt)], return_tensors="pt", **visual)
        sizes, counts = self._runs(inputs, options)
        if sum(counts) < sum(sizes):
            selector = PerRun(options.chooser[0], sizes, counts)
            apply_sparsevlm(
                self.model, processor=self.processor, engine=False, selector=selector, schedule=(sum(counts),),
                min_keep=1, min_keep_per_image=0, seed=options.seed,
            )  # fmt: skip
        try:
            new = self.model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
            )
        finally:
            remove_sparsevlm(self.model)
        n_prompt = inputs["input_ids"].shape[1]
        return n_prompt - sum(sizes) + sum(counts), new[0, n_prompt:].tolist()

    def _runs(self, inputs: Any, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes: list[int] = []
        counts: list[int] = []
        for kind in ("image", "video"):
            for frames, height, width in inputs.get(f"{kind}_grid_thw", torch.zeros(0, 3)).long().tolist():
                own = self._sizes(kind, frames, height * width // 4)
                sizes += own
                counts += kept_per_run(own, options)
        return tuple(sizes), tuple(counts)

    def _sizes(self, kind: str, frames: int, per_frame: int) -> Sequence[int]:
        return [per_frame] * frames if kind == "video" and self.frames_apart else [frames * per_frame]
