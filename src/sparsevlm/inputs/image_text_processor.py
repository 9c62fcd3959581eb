"""Processor of the Qwen2-VL families without torchvision. Imported once torchvision was looked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, BatchFeature, Qwen2_5_VLProcessor
from transformers.image_utils import SizeDict
from transformers.utils.chat_template_utils import _get_template_variables

from .chat import read_conversations
from .checkpoint import checkpoint_folder, read_json
from .image_processor import PilImageProcessor, is_elsewhere
from .options import (
    IMAGES,
    VIDEOS,
    call_options,
    check_options,
    effective,
    known_options,
    spread_common,
    with_our_defaults,
)
from .placeholders import IMAGE_TOKEN, VIDEO_TOKEN, check_placeholders, check_prompts, check_shares
from .video_processor import PilVideoProcessor
from .visuals import check_visuals, flat_images, flat_videos

# Of apply_chat_template itself; any other option is the template's or the call's.
_CHAT_OPTIONS = (
    *("tools", "documents", "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    *("return_dict", "sanitize_control_tokens"),
)


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """transformers' ``Qwen2_5_VLProcessor`` (or ``Qwen2VLProcessor``) where torchvision is missing.

    It differs in what it is made of: a PIL image processor, and a video processor of ours that needs no torchvision; in
    what it takes: local paths, ``file://`` and ``data:`` addresses wherever an image or video may be, and never the
    network; in what it refuses: options that do not exist or have no effect; and in two defaults:
    ``return_tensors="pt"``, and padding on the left.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    image_processor : Qwen2VLImageProcessorPil
    video_size : dict, optional
        Bounds on the pixels of a video frame, ``shortest_edge`` and ``longest_edge``, which ``video_processor`` is set
        to; its own where omitted, or else transformers' default.
    chat_template : str or dict, optional
        Jinja template; the tokenizer's own where omitted.
    returns_seconds : bool
        Whether videos come with ``second_per_grid_ts`` (Qwen2.5-VL) or not (Qwen2-VL).
    video_processor : PilVideoProcessor, optional
        With the settings of the image processor where omitted.

    Raises
    ------
    ValueError
        If the tokenizer has no tokens for images and videos.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        video_size: dict[str, int] | None = None,
        chat_template: str | dict[str, str] | None = None,
        returns_seconds: bool = True,
        video_processor: PilVideoProcessor | None = None,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in (IMAGE_TOKEN, VIDEO_TOKEN) if token not in vocabulary]:
            raise ValueError(f"the tokenizer does not know {', '.join(missing)}: it is none of a Qwen2-VL family.")
        if video_processor is None:
            settings = {**image_processor.to_dict(), "size": dict(PilVideoProcessor.size)}
            video_processor = PilVideoProcessor.from_dict(settings)
        if video_size is not None:
            video_processor.size = SizeDict(**video_size)
        self.returns_seconds = returns_seconds
        super().__init__(image_processor, tokenizer, video_processor, chat_template or tokenizer.chat_template)

    @property
    def video_size(self) -> dict[str, int]:
        """Bounds on the pixels of a video frame, ``shortest_edge`` and ``longest_edge``."""
        return dict(self.video_processor.size)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs that a call may return."""
        return [name for name in super().model_input_names if self.returns_seconds or name != "second_per_grid_ts"]

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Names of the parts, in the order in which transformers' processor takes them."""
        return ["image_processor", "tokenizer", "video_processor"]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageTextProcessor:
        """Load from a folder, of a checkpoint or written by :meth:`save_pretrained`; no network.

        Raises
        ------
        ValueError
            If tokenizer or image processor is missing or does not fit.
        """
        folder = Path(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            image_processor = PilImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} has no usable tokenizer and image processor: {error}") from error
        files = [read_json(folder / name) for name in ("processor_config.json", "config.json")]
        video = files[0].get("video_processor") or read_json(folder / "video_preprocessor_config.json")
        settings = video or files[0].get("image_processor") or read_json(folder / "preprocessor_config.json")
        family = str(files[1].get("model_type") or files[0].get("processor_class"))
        return cls(
            tokenizer,
            image_processor,
            chat_template=tokenizer.chat_template or read_json(folder / "chat_template.json").get("chat_template"),
            returns_seconds=family not in ("qwen2_vl", "Qwen2VLProcessor"),
            video_processor=PilVideoProcessor.from_dict(settings),
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, local_files_only: bool = False
    ) -> ImageTextProcessor:
        """Load from a folder or a hub id, as :func:`sparsevlm.inputs.load_processor` without torchvision.

        Raises
        ------
        FileNotFoundError, ValueError
            As :func:`sparsevlm.inputs.load_processor`.
        """
        path = os.fspath(pretrained_model_name_or_path)
        return cls.from_folder(checkpoint_folder(path, weights=False, local_files_only=local_files_only))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: None = None,
        **options: Any,
    ) -> BatchFeature:
        """Return ``input_ids``, masks and patches of a batch of prompts.

        Parameters
        ----------
        images : object, optional
            An image or a (nested) list of them, in the order of their placeholders through the batch; as
            :func:`~sparsevlm.inputs.visuals.flat_images` takes them.
        text : str or list of str, optional
            Prompts with one placeholder per image or video. Without, patches alone are returned.
        videos : object, optional
            A video or a (nested) list of them; as :func:`~sparsevlm.inputs.visuals.flat_videos` takes them.
        audio : None
        **options
            As of transformers' processor, flat or in ``text_kwargs``, ``images_kwargs`` and ``videos_kwargs``:
            ``padding``, ``truncation``, ``max_length``, ``size``, ``min_pixels``, ``max_pixels``, ``do_resize``,
            ``video_metadata`` (one dict per video with ``fps``; 24 frames per second where omitted), ...
            ``device``: where images and videos are resized, normalised and cut, to the same values as on the CPU;
            their patches stay there.
            ``return_tensors`` is ``"pt"`` and ``padding_side`` is ``"left"`` where omitted.

        Returns
        -------
        BatchFeature
            ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` (0 text, 1 image, 2 video), each (batch, length);
            ``pixel_values`` and ``image_grid_thw``; ``pixel_values_videos``, ``video_grid_thw`` and
            ``second_per_grid_ts``.

        Raises
        ------
        TypeError
            If an option is unknown or of the wrong type, or something is no text, image or video.
        ValueError
            If placeholders and visuals differ in number, truncation would cut within the placeholders of one, an option
            cannot be obeyed, or an image or video cannot be read.
        FileNotFoundError
            If there is no such image or video.
        """
        if audio is not None:
            raise ValueError("this model takes no audio; leave audio out.")
        options = spread_common(options)
        check_options(options, *known_options(self))
        pictures = flat_images(images, effective(options, IMAGES, "input_data_format", None))
        clips = flat_videos(videos, effective(options, VIDEOS, "input_data_format", None))
        prompts = check_prompts(text)
        if prompts is None and not pictures and not clips:
            raise ValueError("text is missing: give one prompt, or a list of them.")
        if prompts is not None and not options.get("sanitize_control_tokens"):
            check_shares(prompts, images, self.image_token)
        self._check_visuals(pictures, clips, options)
        options = with_our_defaults(
            options, {IMAGES: dict(self.image_processor.size), VIDEOS: dict(self.video_processor.size)}
        )
        try:
            inputs = super().__call__(images=pictures or None, text=prompts, videos=clips or None, **options)
        except StrictDataclassError as error:
            raise TypeError(" ".join(str(error).split())) from error
        if not self.returns_seconds:
            inputs.pop("second_per_grid_ts", None)
        for modality, name in ((IMAGES, "pixel_values"), (VIDEOS, "pixel_values_videos")):
            device = effective(options, modality, "device", None)
            if name in inputs and is_elsewhere(device):  # an image processor of transformers' leaves it on the host
                inputs[name] = inputs[name].to(device)
        return inputs

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Render one conversation, or a list of them, and turn it into inputs where ``tokenize`` is set.

        Parameters
        ----------
        conversation : list of dict, or list of such lists
            Messages; :func:`~sparsevlm.inputs.chat.read_conversations` says how their parts name images and videos.
        chat_template : str, optional
            A Jinja template, or the name of one of the checkpoint's.
        tokenize : bool
        return_tensors : str, optional
        processor_kwargs : dict, optional
            Options of a call, such as ``padding``.
        **options
            As in transformers (``add_generation_prompt``, ``return_dict``, ``continue_final_message``, ``tools``, ...),
            variables of the template, and options of a call.

        Returns
        -------
        str, list of str, or BatchFeature
            Text; with ``tokenize`` the inputs (``input_ids`` alone without ``return_dict``).

        Raises
        ------
        ValueError
            If there is no chat template, a part of a message is of an unknown kind or names no image, an image is an
            address on the network or cannot be read; or as a call.
        TypeError
            If an option is unknown, or a message is no dict; or as a call.
        FileNotFoundError
            If there is no such image or video.
        """
        template = self._template(chat_template)
        of_template = {*_CHAT_OPTIONS, *_get_template_variables(template)}
        call = call_options(self, options, of_template, processor_kwargs or {}, return_tensors)
        is_batch = not isinstance(conversation, Mapping) and not hasattr(conversation, "messages")
        if is_batch and not len(conversation):
            raise ValueError("the conversation is empty; give at least one message.")
        is_batch = is_batch and not isinstance(conversation[0], Mapping)
        conversations = read_conversations(conversation if is_batch else [conversation], load=tokenize)
        return super().apply_chat_template(
            conversations if is_batch else conversations[0],
            template,
            tokenize=tokenize,
            return_tensors=call["return_tensors"],
            processor_kwargs=call,
            **{name: value for name, value in options.items() if name not in call},
        )

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check that placeholders and visuals are as many, which transformers 5.17 does not.

        Raises
        ------
        ValueError
            If they are not.
        """
        if text is not None:
            check_placeholders(text, {self.image_token: len(images or ()), self.video_token: len(videos or ())})
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write what ``AutoProcessor`` and :meth:`from_folder` read back.

        Raises
        ------
        NotImplementedError
            With ``push_to_hub``.
        """
        if push_to_hub:
            raise NotImplementedError("save_pretrained does not upload; call push_to_hub(repo_id) instead.")
        files = super().save_pretrained(save_directory, **kwargs)
        self.tokenizer._set_processor_class(self._transformers_class)
        self.tokenizer.save_pretrained(save_directory)
        return files

    def to_dict(self) -> dict[str, Any]:
        """Settings as transformers' class has them."""
        settings = super().to_dict()
        settings.pop("returns_seconds", None)
        return {**settings, "processor_class": self._transformers_class}

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Check a part's class; that of transformers' video processors needs torchvision.

        Raises
        ------
        TypeError
            If it is another.
        """
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, PilVideoProcessor):
            raise TypeError(f"video_processor must be a PilVideoProcessor, got {type(argument).__name__}.")
        return PilVideoProcessor

    @property
    def _transformers_class(self) -> str:
        return "Qwen2_5_VLProcessor" if self.returns_seconds else "Qwen2VLProcessor"

    def _template(self, chat_template: str | None) -> str:
        templates = self.chat_template
        if isinstance(templates, dict):
            template = templates.get(chat_template or "default", chat_template)
        else:
            template = chat_template or templates
        if template is None:
            raise ValueError("this checkpoint has no chat template; write the prompt yourself and call the processor.")
        return template

    def _check_visuals(self, pictures: list[Any], clips: list[np.ndarray], options: Mapping[str, Any]) -> None:
        parts = (
            (IMAGES, self.image_processor, "image", pictures),
            (VIDEOS, self.video_processor, "video", [clip[0] for clip in clips]),
        )
        for modality, part, noun, visuals in parts:
            check_visuals(
                visuals,
                noun,
                is_resized=effective(options, modality, "do_resize", part.do_resize),
                is_rescaled=effective(options, modality, "do_rescale", part.do_rescale),
                multiple=part.patch_size * part.merge_size,
            )
