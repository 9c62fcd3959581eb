"""Text and pictures to model inputs, with or without torchvision."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import checkpoint_folder, read_json, read_model_type
from .conversation import conversation_images, conversation_videos, flat_images, flat_videos
from .frames import DEFAULT_VIDEO_SIZE, seconds_per_step, video_patches
from .torchvision_guard import torchvision_works

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"


def load_processor(path_or_id: str | Path, *, local_files_only: bool = False) -> Any:
    """Load what turns text and pictures into inputs: ``AutoProcessor``, or :class:`ImageTextProcessor` in its place.

    ``AutoProcessor`` of Qwen2-VL and Qwen2.5-VL needs torchvision for its video processor. Where that is missing or
    broken, tokenizer and PIL image processor do the same. Batches are padded on the left either way.

    Parameters
    ----------
    path_or_id : str or Path
        A folder, or a hub id; a folder never touches the network.
    local_files_only : bool
        Whether a hub id must come from the local hub cache.

    Raises
    ------
    FileNotFoundError, ValueError
        If the checkpoint is missing, or has no tokenizer or image processor.
    """
    folder = checkpoint_folder(path_or_id, weights=False, local_files_only=local_files_only)
    processor: Any = None
    if torchvision_works():
        processor = _auto_processor(folder)
    if processor is None:
        processor = ImageTextProcessor.from_folder(folder)
    processor.tokenizer.padding_side = "left"
    return processor


def _auto_processor(folder: Path) -> Any | None:
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        logger.info("AutoProcessor does not load from %s (%s); using tokenizer and PIL image processor", folder, error)
        return None
    # Without a processor config, AutoProcessor quietly returns a tokenizer or an image processor.
    return processor if isinstance(processor, ProcessorMixin) else None


class ImageTextProcessor:
    """Tokenizer and PIL image processor behind the calls of transformers' ``Qwen2_5_VLProcessor``.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    image_processor : Qwen2VLImageProcessorPil
    video_size : dict, optional
        Bounds on the pixels of a video frame, ``shortest_edge`` and ``longest_edge``.
    chat_template : str, optional
        Jinja template; the tokenizer's own where omitted.
    returns_seconds : bool
        Whether videos come with ``second_per_grid_ts`` (Qwen2.5-VL) or not (Qwen2-VL).
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        video_size: dict[str, int] | None = None,
        chat_template: str | None = None,
        returns_seconds: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.video_size = dict(video_size or DEFAULT_VIDEO_SIZE)
        self.chat_template = chat_template or tokenizer.chat_template
        self.returns_seconds = returns_seconds
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in vocabulary]:
            raise ValueError(f"the tokenizer does not know {', '.join(missing)}: it is none of a Qwen2-VL family.")
        self.image_token_id: int = vocabulary[IMAGE_TOKEN]
        self.video_token_id: int = vocabulary[VIDEO_TOKEN]

    @classmethod
    def from_folder(cls, folder: Path) -> ImageTextProcessor:
        """Load from a checkpoint folder, without torchvision and without network.

        Raises
        ------
        ValueError
            If tokenizer or image processor is missing or does not fit.
        """
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} has no usable tokenizer and image processor: {error}") from error
        video = read_json(folder / "processor_config.json").get("video_processor")
        video = video or read_json(folder / "video_preprocessor_config.json")
        return cls(
            tokenizer,
            image_processor,
            video_size=_video_size(video or read_json(folder / "preprocessor_config.json")),
            chat_template=tokenizer.chat_template or read_json(folder / "chat_template.json").get("chat_template"),
            returns_seconds=read_model_type(folder) != "qwen2_vl",
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        padding: bool | str = False,
        return_tensors: str | None = "pt",
        video_metadata: Sequence[Any] | None = None,
        **tokenizer_options: Any,
    ) -> Any:
        """Return ``input_ids``, masks and patches of a batch of prompts.

        Parameters
        ----------
        images : PIL image or (nested) list of them, optional
            In the order of their placeholders through the batch.
        text : str or list of str
            Prompts with one placeholder per image or video.
        videos : list of PIL frames, or list of such lists, optional
        padding : bool or str
            As in a tokenizer; padding is on the left.
        video_metadata : list of dict, optional
            ``fps`` (and ``frames_indices``, ``total_num_frames``) per video; 24 frames per second where omitted.

        Returns
        -------
        BatchFeature
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (0 text, 1 image, 2 video), each (batch, length);
            ``pixel_values`` and ``image_grid_thw``; ``pixel_values_videos``, ``video_grid_thw`` and
            ``second_per_grid_ts``.

        Raises
        ------
        ValueError
            If placeholders and pictures differ in number.
        """
        import torch
        from transformers import BatchFeature

        if text is None:
            raise ValueError("text is missing: give one prompt, or a list of them.")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}.")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures, clips = flat_images(images), flat_videos(videos)
        data: dict[str, Any] = {}
        if pictures:
            data.update(self.image_processor(images=pictures, return_tensors="pt"))
        if clips:
            data.update(self._video_inputs(clips, video_metadata))
        prompts = self._expand(prompts, data)
        tokens = self.tokenizer(prompts, padding=padding, padding_side="left", return_tensors="pt", **tokenizer_options)
        types = torch.zeros_like(tokens["input_ids"])
        types[tokens["input_ids"] == self.image_token_id] = 1
        types[tokens["input_ids"] == self.video_token_id] = 2
        return BatchFeature({**tokens, "mm_token_type_ids": types, **data})

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        chat_template: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **template_options: Any,
    ) -> Any:
        """Render one conversation, or a list of them, and turn it into inputs where ``tokenize`` is set.

        Pictures come from the messages: ``{"type": "image", "image": PIL image or path}`` and
        ``{"type": "video", "video": list of PIL frames or folder}``.

        Returns
        -------
        str, list of str, or BatchFeature
            Text; with ``tokenize`` the inputs (``input_ids`` alone without ``return_dict``).

        Raises
        ------
        ValueError
            If there is no chat template, or a picture is an address on the network.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("this checkpoint has no chat template; write the prompt yourself and call the processor.")
        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        text = self.tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=template,
            **template_options,
        )
        if not tokenize:
            return text
        conversations = conversation if is_batch else [conversation]
        options = {"return_tensors": return_tensors, **(processor_kwargs or {})}
        inputs = self(
            text=text,
            images=conversation_images(conversations),
            videos=conversation_videos(conversations),
            **options,
        )
        return inputs if return_dict else inputs["input_ids"]

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **options)

    def decode(self, *args: Any, **options: Any) -> str:
        """The tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **options)

    def _video_inputs(self, clips: list[list[Image.Image]], metadata: Sequence[Any] | None) -> dict[str, Any]:
        import numpy as np
        import torch

        if metadata is not None and len(metadata) != len(clips):
            raise ValueError(f"got {len(clips)} videos, but metadata of {len(metadata)}.")
        cut = [video_patches(self.image_processor, frames, self.video_size) for frames in clips]
        inputs = {
            "pixel_values_videos": torch.from_numpy(np.concatenate([patches for patches, _ in cut])),
            "video_grid_thw": torch.tensor([grid for _, grid in cut]),
        }
        if self.returns_seconds:
            depth = self.image_processor.temporal_patch_size
            seconds = [seconds_per_step(one, depth) for one in metadata or [None] * len(clips)]
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs

    def _expand(self, prompts: list[str], data: dict[str, Any]) -> list[str]:
        """Repeat every placeholder once per visual token of its picture."""
        merged = self.image_processor.merge_size**2
        counts = {
            token: [int(grid.prod()) // merged for grid in data.get(name, ())]
            for token, name in ((self.image_token, "image_grid_thw"), (self.video_token, "video_grid_thw"))
        }
        for token, found in counts.items():
            if (wanted := sum(prompt.count(token) for prompt in prompts)) != len(found):
                raise ValueError(f"the text holds {wanted} times {token}, but {len(found)} were given with it.")
        queues = {token: iter(found) for token, found in counts.items()}
        pattern = "|".join(map(re.escape, counts))
        return [re.sub(pattern, lambda match: match[0] * next(queues[match[0]]), prompt) for prompt in prompts]


def _video_size(config: dict[str, Any]) -> dict[str, int]:
    size = dict(config.get("size") or DEFAULT_VIDEO_SIZE)
    for edge, legacy in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if config.get(legacy) is not None:
            size[edge] = config[legacy]
    return size
