"""What is known of a chat template."""

from __future__ import annotations

import pytest

from sparsevlm.template import Template, template_of


class Characters:
    """A processor whose tokens are characters."""

    all_special_ids = (ord("<"), ord(">"))

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert add_generation_prompt
        return self.chat_template.format(messages[0]["content"][0]["text"])

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(character) for character in text]}


def ids(text):
    return tuple(map(ord, text))


@pytest.mark.parametrize(("prefix", "suffix"), [("<system>user:", "<end>assistant:"), ("", "."), ("Q", ""), ("", "")])
def test_what_stands_around_the_users_text(prefix, suffix):
    processor = Characters(f"{prefix}{{}}{suffix}")
    wanted = Template(frozenset(ids("<>")), ids(prefix), ids(suffix))
    assert template_of(processor) == wanted


def test_without_processor_or_template():
    assert template_of(None) == Template()
    assert template_of(Characters(None)) == Template(frozenset(ids("<>")))
    with pytest.raises(TypeError, match="must be a processor or tokenizer, got str"):
        template_of("qwen")
