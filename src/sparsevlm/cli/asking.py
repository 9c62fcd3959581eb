"""One question to a model: inputs, answer, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..inputs.turns import move_inputs, process, render_turn


@dataclass(frozen=True)
class Answer:
    """Answer of a model and the time it took.

    Attributes
    ----------
    text : str
    n_tokens : int
        New tokens, the end of the turn included.
    first_token_ms, total_ms : float
        From the call of ``generate`` to its first new token, and to its end.
    """

    text: str
    n_tokens: int
    first_token_ms: float
    total_ms: float


class _Watch:
    """A streamer that only looks at the clock; ``generate`` gives it the prompt first."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if self.times:
            self._on_token()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Part of the protocol of streamers."""


def build_inputs(
    processor: Any,
    prompt: str,
    *,
    images: Sequence[Image.Image] = (),
    frames: Sequence[Image.Image] = (),
    fps: float = 2.0,
) -> Any:
    """Return the inputs of one user turn: images, then the video's frames, then the text.

    Raises
    ------
    ValueError
        If the processor takes no videos, or there is no way to write a prompt.
    """
    content: list[dict[str, Any]] = [{"type": "image"}] * len(images) + [{"type": "video"}] * bool(frames)
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    clip = {"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    videos, metadata = ([[list(frames)]], [clip]) if frames else ([], [])
    return process(processor, [render_turn(processor, messages)], [images], videos, metadata)


def ask(
    model: Any, processor: Any, inputs: Any, max_new_tokens: int, on_token: Callable[[], None] = lambda: None
) -> Answer:
    """Generate greedily; every token that arrives calls ``on_token``."""
    watch = _Watch(on_token)
    inputs = move_inputs(inputs, model)
    begin = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=watch)
    end = time.perf_counter()
    new = output[0, inputs["input_ids"].shape[1] :]
    text = processor.batch_decode([new], skip_special_tokens=True)[0].strip()
    return Answer(text, len(new), (watch.times[1] - begin) * 1e3, (end - begin) * 1e3)
