"""From the messages of a request to the inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ..inputs.turns import process, render_turn
from ..models import ModelAdapter
from ..request.counting import visual_counts
from .errors import RequestError
from .images import ImageReader
from .protocol import ChatRequest, ImagePart, Message
from .settings import ServerSettings

# A token of any vocabulary has fewer characters than that on average: longer texts are refused before they are read.
_MOST_CHARACTERS_PER_TOKEN = 64
# Names under which processors keep what stands for images and sounds in a text.
_PLACEHOLDERS = (
    *("image_token", "video_token", "audio_token", "fake_image_token", "global_image_token", "image_break_token"),
    *("image_end_token", "start_image_token", "end_image_token", "boi_token", "eoi_token", "vision_start_token"),
    *("vision_end_token", "row_col_token", "boa_token", "eoa_token"),
)
_TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class Prepared:
    """A request that the model can be given.

    Attributes
    ----------
    inputs : dict of Tensor
        Of one sample, on the host.
    n_prompt, n_visual : int
        Tokens of the prompt, and visual tokens among them.
    max_new_tokens : int
    """

    inputs: dict[str, Tensor]
    n_prompt: int
    n_visual: int
    max_new_tokens: int


class PromptMaker:
    """Makes inputs of requests; called from several threads.

    Parameters
    ----------
    adapter : ModelAdapter
    processor : ProcessorMixin
    images : ImageReader
    settings : ServerSettings
    """

    def __init__(self, adapter: ModelAdapter, processor: Any, images: ImageReader, settings: ServerSettings) -> None:
        self._adapter, self._processor, self._images, self._settings = adapter, processor, images, settings
        # One thread: tokenizers cannot be used by two, and torch keeps threads of its own for each that computes.
        self._processing = ThreadPoolExecutor(1, "sparsevlm-process")
        tokens = (getattr(processor, name, None) for name in _PLACEHOLDERS)
        ids = [modality.token_id for modality in adapter.modalities.values()]
        of_model = processor.tokenizer.convert_ids_to_tokens(ids)
        self._placeholders = {token for token in (*tokens, *of_model) if isinstance(token, str) and token.strip()}
        text_config = adapter.model.config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None)
        self._context = context if isinstance(context, int) and context > 0 else None

    def prepare(self, request: ChatRequest, give_up: float) -> Prepared:
        """Read images, write the prompt, and count.

        Parameters
        ----------
        request : ChatRequest
        give_up : float
            When images have to be there, by ``time.monotonic``.

        Raises
        ------
        RequestError
        """
        self._check_texts(request.messages)
        urls = [
            (part.image_url.url, f"messages.{i}.content.{j}.image_url")
            for i, message in enumerate(request.messages)
            for j, part in enumerate(message.parts)
            if isinstance(part, ImagePart)
        ]
        images = self._images.read(urls, give_up)
        try:
            inputs = self._processing.submit(self._inputs, request.messages, images).result()
        except Exception as error:  # templates and processors refuse with any type of error
            raise RequestError(
                f"the model's processor does not take these messages: {error}", param="messages"
            ) from error
        n_prompt = int(inputs["input_ids"].shape[1])
        if n_prompt > self._settings.max_prompt_tokens:
            raise self._too_long(n_prompt, "tokens")
        (n_visual,) = visual_counts(self._adapter, inputs)
        return Prepared(inputs, n_prompt, n_visual, self._new_tokens(request.asked_tokens, n_prompt))

    def close(self) -> None:
        """Make no prompts any more."""
        self._processing.shutdown(wait=False, cancel_futures=True)

    def _inputs(self, messages: list[Message], images: list[Image.Image]) -> dict[str, Tensor]:
        prompt = render_turn(self._processor, _as_template_takes(messages))
        inputs = process(self._processor, [prompt], [images])
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def _check_texts(self, messages: list[Message]) -> None:
        if not getattr(self._processor, "chat_template", None) and [one.role for one in messages] != ["user"]:
            raise RequestError(
                "the model has no chat template: it takes one message, of the role user.", param="messages"
            )
        texts = [part.text for message in messages for part in message.parts if not isinstance(part, ImagePart)]
        n_characters = sum(map(len, texts))
        if n_characters > self._settings.max_prompt_tokens * _MOST_CHARACTERS_PER_TOKEN:
            raise self._too_long(n_characters, "characters")
        for message in messages:
            # As a template may write them: one after the other, without the spaces around them.
            whole = "".join(part.text.strip() for part in message.parts if not isinstance(part, ImagePart))
            if found := [token for token in self._placeholders if token in whole]:
                raise RequestError(
                    f"a text holds {found[0]!r}, which stands for an image; send images as parts of their own.",
                    param="messages",
                )
        for text in texts:
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise RequestError("a text holds half of a surrogate pair.", param="messages") from None

    def _too_long(self, n: int, unit: str) -> RequestError:
        most = self._settings.max_prompt_tokens
        return RequestError(
            f"the prompt has {n} {unit}, and this server takes up to {most} tokens.", param="messages", code=_TOO_LONG
        )

    def _new_tokens(self, asked: int | None, n_prompt: int) -> int:
        most = self._settings.max_new_tokens
        if asked is not None and asked > most:
            raise RequestError(
                f"{asked} new tokens were asked for, and this server makes up to {most}.",
                param="max_completion_tokens",
            )
        if self._context is None:
            return most if asked is None else asked
        left = self._context - n_prompt
        if left < (asked or 1):
            raise RequestError(
                f"the prompt has {n_prompt} tokens and {asked or 1} are to follow, and the model takes "
                f"{self._context} in all.",
                param="messages",
                code=_TOO_LONG,
            )
        return min(most, left) if asked is None else asked


def _as_template_takes(messages: list[Message]) -> list[Mapping[str, Any]]:
    """Messages with their content as parts: some templates drop a content that is a text."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in message.parts
            ],
        }
        for message in messages
    ]
