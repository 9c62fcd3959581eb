"""Text models that cap their attention scores, as that of PaliGemma 2, are read as they attend."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.hooks import attention_probe, readout
from sparsevlm.selection.scoring import text_to_visual_attention
from toys import PROMPTS, make_inputs, relative_error, tiny_model

TARGET = 2


class Looks:
    """Remembers what it is given of attention."""

    needs = frozenset({"rater_attention", "last_attention"})

    def select(self, context, n_keep):
        self.context = context
        return torch.arange(n_keep)


def read_and_whole():
    """What a selector is given of the last token's attention, and the model's own weights."""
    model, inputs = tiny_model("paligemma2"), make_inputs(*PROMPTS["one image"], family="paligemma2")
    selector = Looks()
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True).attentions[TARGET][0].mean(dim=0)
        apply_sparsevlm(
            model, selector=selector, keep=0.7, min_keep=1, target_layers=[TARGET], raters="all", min_keep_per_image=0
        )
        model(**inputs)
    visual = (inputs["input_ids"][0] == 90).nonzero().squeeze(-1)
    n_raters = selector.context.rater_attention.shape[0]
    return selector.context, whole[-n_raters:, visual]


def test_what_is_read_are_the_weights_of_the_model():
    context, wanted = read_and_whole()
    torch.testing.assert_close(context.rater_attention, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(context.last_attention, wanted[-1], rtol=1e-5, atol=1e-7)


def test_without_the_cap_they_would_be_others(monkeypatch):
    rows = readout._rows_attention
    monkeypatch.setattr(
        readout,
        "_rows_attention",
        lambda *given: rows(*given[:4], dataclasses.replace(given[4], softcap=None), *given[5:]),
    )
    context, wanted = read_and_whole()
    assert relative_error(context.rater_attention, wanted) > 0.02


def test_a_cap_is_put_on_before_the_mask():
    query, key = torch.randn(4, 3, 8), torch.randn(2, 6, 8)
    mask = torch.ones(3, 6, dtype=torch.bool).tril(3)
    rows, visual = torch.arange(3), torch.arange(4)
    read = text_to_visual_attention(query, key, visual, rows + 3, 1.0, softcap=1.5)
    scores = query @ key.repeat_interleave(2, dim=0).transpose(1, 2)
    wanted = (1.5 * (scores / 1.5).tanh()).masked_fill(~mask, -torch.inf).softmax(-1).mean(0)[:, :4]
    torch.testing.assert_close(read, wanted)


def test_scores_that_a_model_caps_unseen_are_refused(monkeypatch):
    model, inputs = tiny_model("gemma3"), make_inputs(*PROMPTS["one image"], family="gemma3")
    monkeypatch.setattr(model.model.language_model.config, "attn_logit_softcapping", 50.0)
    for layer in model.model.language_model.layers:
        monkeypatch.setattr(layer.self_attn.config, "attn_logit_softcapping", 50.0)
    apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[1], selector="fastv")
    with pytest.raises(NotImplementedError, match=r"caps its scores \(attn_logit_softcapping=50\.0\) by itself"):
        model.generate(**inputs, max_new_tokens=1)
    assert not attention_probe.AttentionProbe._armed
