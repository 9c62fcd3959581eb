"""Conversations on a kept cache, beside fresh calls with all of what was said and shown."""

from __future__ import annotations

import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.compat import cache_of
from toys import FAMILIES, PROMPTS, join_visual, make_inputs, split_visual, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [1, 3], "keep": 0.6, "turns": "refresh"}
SPECIAL = [*range(80, 94)]
N_NEW = 3
GREEDY = {
    "max_new_tokens": N_NEW,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": SPECIAL,
}
TURNS = {
    "text": [("text", 6)],
    "image": [("text", 2), ("image", 4, 5), ("text", 4)],
}


class Chat:
    """A conversation in every row of a batch: what was given and answered so far, and the pixels of all of it."""

    def __init__(self, family="qwen2_5_vl", prompt="one image", engine=False, **options):
        self.family, self.types = family, FAMILIES[family].type_input
        self.model = tiny_model(family)
        self.state = apply_sparsevlm(self.model, **{**OPTIONS, **options}, engine=engine)
        self.tokens = {}
        self.visual = []
        self.add(PROMPTS[prompt])

    def add(self, rows, seed=0):
        """Append what every row says next; the value is the visual inputs that it brings."""
        more = make_inputs(*rows, seed=seed, family=self.family)
        names = [name for name in ("input_ids", "attention_mask", self.types) if name in more]
        for name in names:
            self.tokens[name] = torch.cat([self.tokens.get(name, more[name][:, :0]), more.pop(name)], dim=1)
        brought = split_visual(more, rows, self.family)
        both = zip(self.visual or [{}] * len(rows), brought, strict=True)
        self.visual = [join_visual([one for one in pair if one], self.family) for pair in both]
        return more

    def answer(self, sequences):
        n = sequences.shape[1] - self.tokens["input_ids"].shape[1]
        for name in self.tokens:
            self.tokens[name] = torch.nn.functional.pad(self.tokens[name], (0, n), value=int(name == "attention_mask"))
        self.tokens["input_ids"] = sequences

    def ask(self, visual, cache=None, **changes):
        inputs = {**self.tokens, **visual, **GREEDY, **changes}
        return self.model.generate(**inputs, **({} if cache is None else {"past_key_values": cache}))

    def fresh(self, **changes):
        """What a call with the whole conversation says, and the report of it."""
        with self.state.options(turns="first"):
            output = self.ask(join_visual([row for row in self.visual if row], self.family), **changes)
        return output, self.state.report

    def check(self, found, exactly=True, **changes):
        own = self.state.report
        wanted, report = self.fresh(**changes)
        assert own.samples == report.samples
        assert any(sample.final_tokens < sample.n_visual for sample in own.samples)
        assert own.path == report.path
        assert torch.equal(found.sequences, wanted.sequences)
        for one, other in zip(found.logits, wanted.logits, strict=True):
            if exactly:
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def begun(family="qwen2_5_vl", prompt="one image", engine=False, more=None, **options):
    """A conversation whose first question is answered, and the cache of that."""
    chat = Chat(family, prompt, engine, **options)
    first = chat.ask(join_visual([row for row in chat.visual if row], family), **(more or {}))
    chat.answer(first.sequences[:: (more or {}).get("num_return_sequences", 1)])
    return chat, cache_of(first)
