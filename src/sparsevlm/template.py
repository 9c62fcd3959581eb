"""What a processor knows of its chat template: special tokens, and the tokens that close a prompt."""

from __future__ import annotations

from typing import Any

_SENTINELS = ("x1", "y2")  # no common ending


def special_and_suffix(processor: Any) -> tuple[frozenset[int], tuple[int, ...]]:
    """Special token ids of a processor or tokenizer, and the ids with which its template closes a user's prompt.

    The closing tokens are what two prompts of different text have in common at their end. Without a template (or
    without a processor) there are none.
    """
    if processor is None:
        return frozenset(), ()
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "all_special_ids"):
        raise TypeError(f"processor must be a processor or tokenizer, got {type(processor).__name__}.")
    special = frozenset(tokenizer.all_special_ids)
    if not getattr(processor, "chat_template", None):
        return special, ()
    prompts = []
    for text in _SENTINELS:
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    common = 0
    shortest = min(map(len, prompts))
    while common < shortest and prompts[0][-1 - common] == prompts[1][-1 - common]:
        common += 1
    return special, tuple(prompts[0][len(prompts[0]) - common :])
