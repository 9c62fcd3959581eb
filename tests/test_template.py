"""What is known of a chat template."""

from __future__ import annotations

import pytest

from sparsevlm import apply_sparsevlm
from sparsevlm.report import Report
from sparsevlm.template import Template, template_of
from toys import PROMPTS, make_inputs, tiny_model


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


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    ("options", "reads"),
    [({"selector": "span"}, True), ({"selector": "sparsevlm", "keep": 0.6}, True),
     ({"selector": "mmtok", "keep": 0.6}, True), ({}, False), ({"keep": 0.6}, False),
     ({"selector": "sparsevlm", "keep": 1.0}, False)],
)  # fmt: skip
def test_the_report_says_where_the_template_was_read_as_text(options, reads, engine):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    for processor in (None, Characters("<user:{}<end>")):
        state = apply_sparsevlm(model, min_keep=4, engine=engine, processor=processor, **options)
        model.generate(**inputs, max_new_tokens=1)
        said = reads and processor is None
        assert ("pass processor= to apply_sparsevlm" in str(state.report)) == said
        assert Report.from_dict(state.report.to_dict()) == state.report
    older = {name: value for name, value in state.report.to_dict().items() if name != "text_note"}
    assert Report.from_dict(older) == state.report
