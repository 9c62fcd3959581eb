"""The bodies of OpenAI's chat completions: what is read of a request, and what is written."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import RequestError

_MOST_MESSAGES, _MOST_PARTS = 1000, 100_000
_MOST_VALUES = 1 << 19  # of a body: nothing else runs while they are read, some seconds for ten million
_MOST_KEYS = 64  # of an object: each that is unknown would be an error of its own
_MOST_STOPS = 4
# Parameters that are taken with the value that asks for nothing, and refused with any other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "moderation": (),
    "web_search_options": (),
}
# What says who asks, and asks for nothing.
_NAMES = ("user", "safety_identifier", "prompt_cache_key")
# Of an answer that is sent back as a message: null or empty.
_OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "name")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_small(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > _MOST_KEYS:
            raise ValueError(f"an object of {len(data)} keys is no part of a request")
        return data


class TextPart(_Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """Where an image is."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=_MOST_PARTS, fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _as_older(cls, data: Any) -> Any:
        """Without what answers hold empty, and with the role ``developer`` by its older name, which templates know."""
        if not isinstance(data, dict):
            return data
        if data.get("role") == "developer":
            data = {**data, "role": "system"}
        return {key: value for key, value in data.items() if key not in _OF_ANSWERS or value not in (None, [])}

    @model_validator(mode="after")
    def _images_are_users(self) -> Message:
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError(f"images belong into messages of the role user, not {self.role}")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of a request; parameters that are not among these were refused or ask for nothing."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=_MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sparsevlm: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if not all(self.stops):
            raise ValueError("stop takes texts that are not empty")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens are the same here; name one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def asked_tokens(self) -> int | None:
        """New tokens at most, where the request says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def includes_usage(self) -> bool:
        """Tells whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse(body: bytes) -> ChatRequest:
    """Read a request.

    Raises
    ------
    RequestError
    """
    data = _json(body)
    for name in _NAMES:
        if not isinstance(data.pop(name, None), (str, type(None))):
            raise RequestError(f"{name} must be a text or left out.", param=name)
    for name in [name for name in data if name in _NEUTRAL]:
        value = data.pop(name)
        if value is not None and not any(_is_same(value, neutral) for neutral in _NEUTRAL[name]):
            taken = " or ".join(json.dumps(neutral) for neutral in _NEUTRAL[name]) or "null"
            raise RequestError(
                f"{name} is not supported: leave it out, or pass {taken}.", param=name, code="unsupported_parameter"
            )
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _described(error) from None


def _is_same(value: Any, neutral: Any) -> bool:
    """Equal, where 0 is not false."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _json(body: bytes) -> dict[str, Any]:
    def refuse(text: str) -> Any:
        raise ValueError(f"it holds {text}, which JSON does not have")

    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:  # each value follows one of them
        raise RequestError("the body holds more lists, objects and commas than any request does.", code="invalid_json")
    try:
        data = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise RequestError("the body is nested too deeply to be read.", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object.", code="invalid_json")
    return data


def _described(error: ValidationError) -> RequestError:
    """The first error, where it is, and what was got unless that is long."""
    found = error.errors(include_url=False, include_context=False)
    # Of a text or a list, what is wrong with the list where one was given.
    first = next(
        (one for one in found if not (one["loc"][-1:] == ("str",) and isinstance(one["input"], list))), found[0]
    )
    steps = [str(step) for step in first["loc"]]
    if steps and steps[-1] == "str":
        steps.pop()
    place = ".".join(step for step in steps if not step.startswith(("list[", "function-", "constrained-")))
    said = str(first["msg"]).removeprefix("Value error, ")
    got = first.get("input")
    shown = f", got {got!r}" if isinstance(got, (int, float, bool, type(None))) and first["type"] != "missing" else ""
    if isinstance(got, str) and len(got) <= 40:
        shown = f", got {got!r}"
    if first["type"] == "extra_forbidden":
        return RequestError(f"{place} is not supported: leave it out.", param=place, code="unsupported_parameter")
    return RequestError(f"{place or 'the body'}: {said}{shown}.", param=place or None)


def completion(request_id: str, created: int, model: str, text: str, end: dict[str, Any]) -> dict[str, Any]:
    """The body of an answer; ``end`` holds ``finish_reason``, ``usage`` and ``sparsevlm``."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": end["finish_reason"]}],
        "usage": end["usage"],
        "sparsevlm": end["sparsevlm"],
    }


class Chunks:
    """Events of one streamed answer.

    Parameters
    ----------
    request_id : str
    created : int
        Seconds since 1970.
    model : str
    includes_usage : bool
        Whether the last event tells of the usage, and the others that they do not.
    """

    def __init__(self, request_id: str, created: int, model: str, *, includes_usage: bool) -> None:
        self._head = {"id": request_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._no_usage: dict[str, Any] = {"usage": None} if includes_usage else {}

    def opening(self) -> bytes:
        """Event that names the role."""
        return self._event({"role": "assistant", "content": ""})

    def text(self, text: str) -> bytes:
        """Event with a piece of the answer."""
        return self._event({"content": text})

    def closing(self, end: dict[str, Any]) -> list[bytes]:
        """Events that end the answer."""
        events = [self._event({}, end["finish_reason"], sparsevlm=end["sparsevlm"])]
        if self._no_usage:
            events.append(event({**self._head, "choices": [], "usage": end["usage"]}))
        return [*events, b"data: [DONE]\n\n"]

    def _event(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "choices": [choice], **self._no_usage, **more})


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
