"""From a user's turn to the inputs of a model, by the processor of any family."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def render_turn(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a conversation, by the chat template.

    Without one, as of models that were not trained to chat, it is the placeholders of all images and videos and then
    the text.

    Parameters
    ----------
    processor : ProcessorMixin
    messages : sequence of dict
        Their content is a list of parts of the types text, image and video.

    Raises
    ------
    ValueError
        If there is neither a chat template nor a placeholder.
    """
    if getattr(processor, "chat_template", None):
        prompt: str = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return prompt
    parts = [part for message in messages for part in message["content"]]
    kinds = [part["type"] for part in parts if part["type"] != "text"]
    tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in kinds}
    if missing := [kind for kind, token in tokens.items() if not isinstance(token, str)]:
        raise ValueError(
            f"{type(processor).__name__} has neither a chat template nor a placeholder of {' and '.join(missing)}s. "
            "Save one with the checkpoint (chat_template.jinja), or write the prompt yourself and call the processor."
        )
    logger.info("%s has no chat template: the prompt is placeholders and text", type(processor).__name__)
    return "".join(str(tokens[kind]) for kind in kinds) + "\n".join(
        part["text"] for part in parts if part["type"] == "text"
    )


def process(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Any]],
    videos: Sequence[Sequence[Any]] = (),
    video_metadata: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """Inputs of a batch of prompts, padded to one length.

    Parameters
    ----------
    processor : ProcessorMixin
    prompts : sequence of str
    images : sequence of sequences of PIL images
        Of each prompt.
    videos : sequence of sequences of lists of PIL images
        Of each prompt; every frame is taken.
    video_metadata : sequence of dict
        ``fps``, ``total_num_frames`` and ``frames_indices`` of each video, in order.

    Returns
    -------
    BatchFeature

    Raises
    ------
    ValueError
        If the processor takes no videos, or as its call.
    """
    options: dict[str, Any] = {}
    if any(images):
        # By prompt, as a chat template gives them: some take several images of one prompt otherwise than single ones.
        options["images"] = [list(own) for own in images]
    if any(videos):
        if getattr(processor, "video_processor", None) is None:
            raise ValueError(f"{type(processor).__name__} takes no videos; give frames as images, one by one.")
        # Lists of frames are taken for several videos by some.
        options["videos"] = [[np.stack([np.asarray(frame) for frame in clip]) for clip in own] for own in videos]
        options |= {"video_metadata": [dict(one) for one in video_metadata], "do_sample_frames": False}
    inputs = processor(text=list(prompts), padding=True, return_tensors="pt", **options)
    inputs.pop("labels", None)  # of a prompt to be learned, which some processors add to any
    return inputs


def move_inputs(inputs: Any, model: Any) -> Any:
    """Inputs on the device of a model, pixels in its precision."""
    inputs = inputs.to(model.device)
    for name, value in inputs.items():
        if name.startswith("pixel_values") and value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    return inputs
