"""Prompts and the placeholders in them, one for each image and video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .visuals import each_image

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"


def check_prompts(text: Any) -> list[str] | None:
    """Return the prompts of a call as a list; ``None`` where there is no text.

    Raises
    ------
    TypeError
        If a prompt is no text.
    ValueError
        If there are none, or one is empty.
    """
    if text is None:
        return None
    prompts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else [text]
    if wrong := [type(prompt).__name__ for prompt in prompts if not isinstance(prompt, str)]:
        raise TypeError(f"text must be a prompt or a list of prompts, got {wrong[0]}.")
    if not prompts or not all(prompts):
        raise ValueError("text holds no prompt, or an empty one, which cannot be answered; leave it out.")
    return prompts


def check_placeholders(prompts: Sequence[str], given: Mapping[str, int]) -> None:
    """Raise where placeholders and what was given for them differ in number.

    Parameters
    ----------
    prompts : sequence of str
    given : dict
        By placeholder, how many images or videos there are.

    Raises
    ------
    ValueError
        If the prompts hold more or fewer.
    """
    for token, found in given.items():
        if (wanted := sum(prompt.count(token) for prompt in prompts)) != found:
            raise ValueError(f"the text holds {wanted} times {token}, but {found} were given with it.")


def check_shares(prompts: Sequence[str], images: Any, token: str) -> None:
    """Raise where each prompt has a list of images, and one does not fit its placeholders.

    Raises
    ------
    ValueError
        If a list has more or fewer images than its prompt has placeholders.
    """
    if not isinstance(images, (list, tuple)) or len(images) != len(prompts):
        return
    if not all(isinstance(share, (list, tuple)) for share in images):
        return
    for number, (prompt, share) in enumerate(zip(prompts, images, strict=True), 1):
        if (wanted := prompt.count(token)) != (found := sum(1 for _ in each_image(share))):
            raise ValueError(f"prompt {number} holds {wanted} times {token}, but its list has {found} images.")
