"""A real processor of transformers, of small sizes, whose tokenizer is made in code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from .kinds import EOS, PAD

_WORDS = ("\n", "what", "is", "in", "the", "picture", "video", "user", "assistant", "Here", "and", "crops")
_TEMPLATE = (
    "{% for message in messages %}user {% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'video' %}VIDEO{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant \n{% endif %}"
)


@dataclass(frozen=True)
class Processed:
    """What makes the processor of a family.

    Attributes
    ----------
    name : str
        Of its class.
    tokens : mapping of str to int
        Special tokens of its tokenizer.
    image, video : str
        What a chat template writes for one; empty: there are no videos.
    named : mapping of str to str
        Attributes of the tokenizer that hold special tokens.
    parts : callable
        ``parts()`` makes what it is made of beside the tokenizer.
    options : dict
        More arguments.
    has_template : bool
        Whether prompts come from a chat template.
    needs : tuple of str
        Packages without which it cannot be made.
    """

    name: str
    tokens: Mapping[str, int]
    image: str
    parts: Callable[[], dict[str, Any]]
    video: str = ""
    named: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    has_template: bool = True
    needs: tuple[str, ...] = ()

    def make(self) -> ProcessorMixin:
        """The processor, of small sizes."""
        template = _TEMPLATE.replace("IMAGE", self.image).replace("VIDEO", self.video)
        tokenizer = _tokenizer(self.tokens, self.named)
        cls = getattr(transformers, self.name)
        template = template if self.has_template else None
        return cls(**self.parts(), tokenizer=tokenizer, chat_template=template, **self.options)


def _tokenizer(tokens: Mapping[str, int], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Words and special tokens at given ids; a line break is a token of its own."""
    vocabulary = {"[UNK]": 0, **{word: i for i, word in enumerate(_WORDS, 1)}, "<eos>": EOS, "<pad>": PAD, **tokens}
    taken = set(vocabulary.values())
    vocabulary |= {f"[free {i}]": i for i in range(PAD + 1) if i not in taken}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), "removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>", pad_token="<pad>", bos_token="<eos>",
        padding_side="left", extra_special_tokens=dict(named),
    )  # fmt: skip


def made(**classes: Any) -> Callable[[], dict[str, Any]]:
    """Parts by their classes' names and arguments; image processors are Pillow's where torchvision is missing."""

    def make() -> dict[str, Any]:
        return {part: _class(name)(**options) for part, (name, options) in classes.items()}

    return make


def _class(name: str) -> type:
    from transformers.utils import is_torchvision_available

    has_other = not is_torchvision_available() and hasattr(transformers, f"{name}Pil")
    return getattr(transformers, f"{name}Pil" if has_other else name)
