"""Chat template of a processor: special tokens, and the tokens that open and close a prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SENTINELS = ("x1", "y2")  # no common beginning, no common ending


@dataclass(frozen=True)
class Template:
    """Token ids that are no words of the user's.

    Attributes
    ----------
    special : frozenset of int
        Special tokens, wherever they stand.
    prefix, suffix : tuple of int
        With which the chat template opens and closes a user's prompt.
    """

    special: frozenset[int] = frozenset()
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def within(self, text: Sequence[int]) -> slice:
        """Where the user's part of a prompt's text is: each end of the template is left out where it is all there.

        Parameters
        ----------
        text : sequence of int
            Token ids of the prompt, without those of its images.
        """
        found, n_suffix = tuple(text), len(self.suffix)
        start = len(self.prefix) if found[: len(self.prefix)] == self.prefix else 0
        return slice(start, len(found) - n_suffix if n_suffix and found[-n_suffix:] == self.suffix else len(found))


def template_of(processor: Any) -> Template:
    """Look at a processor or tokenizer.

    The opening and closing tokens are what two prompts of different text have in common at their ends. Without a
    template (or without a processor) there are none.
    """
    if processor is None:
        return Template()
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "all_special_ids"):
        raise TypeError(f"processor must be a processor or tokenizer, got {type(processor).__name__}.")
    special = frozenset(tokenizer.all_special_ids)
    if not getattr(processor, "chat_template", None):
        return Template(special)
    prompts = []
    for text in _SENTINELS:
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return Template(special, _common_start(*prompts), _common_start(*(ids[::-1] for ids in prompts))[::-1])


def _common_start(one: list[int], other: list[int]) -> tuple[int, ...]:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(token_id for token_id, _ in equal)
