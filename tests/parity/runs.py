"""A tiny model under pruning, its inputs, and the comparison of what it says with the reference."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import flash_emulation
import torch
from oracle import dropped_from, joined_positions, masked_run, recorded_positions, removed_run
from transformers import StaticCache

from sparsevlm import apply_sparsevlm
from sparsevlm.selection.scoring import top_k
from toys import (
    AUDIO,
    AUDIO_START,
    FAMILIES,
    IMAGE,
    INDICATORS,
    VIDEO,
    VISION_START,
    equally_long,
    family_of,
    join_visual,
    make_inputs,
    relative_error,
    split_visual,
    tiny_model,
    use_attention,
)

NEW_TOKENS = 5
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    # The reference could not tell generated placeholders, and what stands before them, from real ones.
    "suppress_tokens": [*INDICATORS, IMAGE, VIDEO, VISION_START, AUDIO, AUDIO_START],
}
OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3], "recycle": False}
# Second turns that keep unequal numbers; a batch takes them one after the other.
IMAGE_TURNS = (
    [("text", 2), ("image", 4, 5), ("text", 4)],
    [("text", 3), ("image", 3, 4), ("text", 11)],
)
OF_TOKENS = {
    "input_ids": 0,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "attention_mask": 1,
}  # and what stands for a generated token


class AtRandom:
    """A selector before the decoder: a fixed draw."""

    placement = "before_decoder"
    default_schedule = "single"

    def select(self, context, n_keep):
        return torch.randperm(context.n_visual, generator=torch.Generator().manual_seed(5))[:n_keep].sort().values


class BeforeAndInside:
    """A selector before the decoder and at target layers: at random, then by the attention of the last token."""

    placement = "both"
    needs = frozenset({"last_attention"})

    def select(self, context, n_keep):
        if context.layer < 0:
            assert context.last_attention is None
            return AtRandom().select(context, n_keep)
        return top_k(context.last_attention, n_keep)


VARIANTS = {
    "by attention": {**OPTIONS, "selector": "sparsevlm"},
    "by span": {**OPTIONS, "selector": "span"},
    "random": {**OPTIONS, "selector": "random"},
    "rank adaptive": {**OPTIONS, "keep": None, "rank_tolerance": 0.3},
    "before the decoder": {"keep": 0.5, "min_keep": 3, "selector": AtRandom()},
    "before and inside": {**OPTIONS, "keep": 0.5, "selector": BeforeAndInside()},
}


@dataclass
class Run:
    """A pruned model and one prompt."""

    model: Any
    family: str
    rows: list
    inputs: dict[str, torch.Tensor]
    state: Any
    attention: str
    cache: str
    place: Any

    @property
    def batch(self) -> int:
        return self.inputs["input_ids"].shape[0]

    @property
    def cache_options(self) -> dict[str, Any]:
        """How ``generate`` is told which cache to make."""
        if self.cache == "static" and self.attention != flash_emulation.NAME:
            return {"cache_implementation": "static"}
        return self.new_cache()  # flash attention with a buffer that gets full has a test of its own

    def new_cache(self) -> dict[str, Any]:
        """A cache to hand over, with room for more than one turn; the dynamic one the model makes by itself."""
        if self.cache == "static":
            return {"past_key_values": StaticCache(config=self.model.config.get_text_config(), max_cache_len=200)}
        return {} if self.cache == "dynamic" else {"use_cache": False}

    def make(self, *rows, seed: int):
        """Further inputs, at the same place."""
        return placed(make_inputs(*rows, seed=seed, family=self.family), self.place)

    def expanded(self, repeats: int) -> dict[str, torch.Tensor]:
        """The inputs of every sample ``repeats`` times."""
        samples = split_visual(self.inputs, self.rows, self.family)
        tokens = {n: v.repeat_interleave(repeats, dim=0) for n, v in self.inputs.items() if n in OF_TOKENS}
        return tokens | join_visual([sample for sample in samples for _ in range(repeats)], self.family)

    def reference_logits(self, inputs, sequences, dropped, positions=None):
        """The oracle hands out 4D masks, which flash attention does not take."""
        self.state.detach()
        if self.attention == flash_emulation.NAME:
            use_attention(self.model, "sdpa")
        if FAMILIES[self.family].is_hybrid:
            return removed_run(self.model, inputs, sequences, dropped, positions)
        return masked_run(self.model, inputs, sequences, dropped, positions).logits


def build(
    rows, variant, place, *, attention="sdpa", family="qwen2_5_vl", cache="dynamic", mask=True, seed: int = 0,
    text_options=None, noisy: bool = False,
) -> Run:  # fmt: skip
    """Make the model and its inputs at the place of a test, and prune it.

    ``noisy``: the dense model's own rounding, four times, is allowed where it is more than the place allows.
    """
    if place.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    flash_emulation.register()
    model = tiny_model(family, text_options=text_options)
    use_attention(model, attention)
    model = model.to(place.device, place.dtype)
    inputs = placed(make_inputs(*rows, pad=mask, seed=seed, family=family), place)
    if FAMILIES[family].is_hybrid or noisy:
        use_attention(model, "sdpa" if attention == flash_emulation.NAME else attention)
        place = replace(place, tolerance=max(place.tolerance, 4 * dense_noise(model, inputs)))
        use_attention(model, attention)
    if place.dtype != torch.float32 and getattr(model.config.get_text_config(), "num_experts_per_tok", None):
        place = replace(place, tolerance=0.3)  # rounding sends a token to another expert now and then
    return Run(model, family, rows, inputs, apply_sparsevlm(model, **variant), attention, cache, place)


def placed(inputs, place) -> dict[str, torch.Tensor]:
    """Inputs on the device of a place, pixels in its dtype: not every tower casts them."""
    return {n: v.to(place.device, place.dtype if v.is_floating_point() else v.dtype) for n, v in inputs.items()}


def dense_noise(model, inputs) -> float:
    """How far a dense model's steps from a cache are from what it says of the whole sequence."""
    output = model.generate(**inputs, **GREEDY)
    start = inputs["input_ids"].shape[1] - 1
    given = (model, inputs, output.sequences[:, :-1], [{}] * len(output.sequences))
    wanted = removed_run(*given) if family_of(model).is_hybrid else masked_run(*given).logits
    return max(relative_error(got, wanted[:, start + step]) for step, got in enumerate(output.logits))


def assert_prunes(report) -> None:
    """The comparison only bites if something was dropped."""
    assert any(sample.final_tokens < sample.n_visual for sample in report.samples)


def all_dropped(report, batch: int) -> list[dict[int, int]]:
    return [dropped_from(report, b) for b in range(batch)]


def check_steps(run: Run, output, logits, start: int) -> None:
    """Compare every step of ``generate`` with the reference's logits from position ``start`` on."""
    assert len(output.logits) == output.sequences.shape[1] - start - 1 > 0
    for step, got in enumerate(output.logits):
        assert relative_error(got, logits[:, start + step]) <= run.place.tolerance, f"step {step}"


def check_generated(run: Run, output, repeats: int = 1) -> None:
    """Compare one prompt's answer, of ``repeats`` sequences a sample, with the reference, which differs from dense."""
    report, batch = run.state.report, output.sequences.shape[0]
    assert_prunes(report)
    assert batch == repeats * run.batch
    inputs, start = run.expanded(repeats), run.inputs["input_ids"].shape[1] - 1
    wanted = run.reference_logits(inputs, output.sequences[:, :-1], all_dropped(report, batch))
    check_steps(run, output, wanted, start)
    dense = run.reference_logits(inputs, output.sequences[:, :-1], [{}] * batch)
    near, away = (relative_error(output.logits[0], logits[:, start]) for logits in (wanted, dense))
    assert away > max(1e-3, min(run.place.tolerance, 3 * near))


@dataclass
class SecondTurn:
    """A second answer, and what its reference takes: the inputs and positions of both turns, what is dropped of them.

    ``past_len`` is the length of the first.
    """

    output: Any
    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor | None
    dropped: list[dict[int, int]]
    past_len: int


def take_second_turn(run: Run, *turns, options=None, watched=True) -> SecondTurn:
    """Answer, then go on with the cache by the next of ``turns`` in every sample.

    ``options``, if given, are applied in between. Positions are recorded by a hook, unless nothing is to be watched.
    """
    model, batch = run.model, run.batch
    with recorded_positions(model) if watched else contextlib.nullcontext() as seen:
        first = model.generate(**run.inputs, **GREEDY, **run.new_cache())
        assert_prunes(run.state.report)
        dropped = all_dropped(run.state.report, batch)
        past_len = int(first.past_key_values.get_seq_length())
        assert past_len == first.sequences.shape[1] - 1
        rows = equally_long([turns[b % len(turns)] for b in range(batch)], run.family)
        more = run.make(*rows, seed=9)
        assert bool(more["attention_mask"].all())  # padding would stand in the middle
        brings_image = any(kind != "text" for row in rows for kind, *_ in row)
        second = {name: value for name, value in more.items() if name not in OF_TOKENS}
        for name in run.inputs.keys() & OF_TOKENS:
            generated = (0, NEW_TOKENS)
            before = torch.nn.functional.pad(run.inputs[name], generated, value=OF_TOKENS[name])
            second[name] = torch.cat([first.sequences if name == "input_ids" else before, more[name]], dim=1)
        if brings_image and FAMILIES[run.family].n_position_axes > 1:
            # transformers takes a new image on a kept cache in no other way than with linear positions
            second.pop("mm_token_type_ids", None)
        if options is not None:
            run.state = apply_sparsevlm(model, **options)
        output = model.generate(**second, **GREEDY, past_key_values=first.past_key_values)
    if brings_image:
        for b, of_sample in enumerate(dropped):
            of_sample |= {past_len + at: layer for at, layer in dropped_from(run.state.report, b).items()}
    samples = split_visual(run.inputs, run.rows, run.family)
    if brings_image:
        later = split_visual(more, rows, run.family)
        samples = [join_visual(pair, run.family) for pair in zip(samples, later, strict=True)]
    both = {name: value for name, value in second.items() if name in OF_TOKENS} | join_visual(samples, run.family)
    return SecondTurn(output, both, joined_positions(model, seen) if watched else None, dropped, past_len)


def check_second_turn(run: Run, *turns, options=None) -> SecondTurn:
    """Take a second turn, and compare its answer with the reference."""
    turn = take_second_turn(run, *turns, options=options)
    logits = run.reference_logits(turn.inputs, turn.output.sequences[:, :-1], turn.dropped, turn.positions)
    check_steps(run, turn.output, logits, turn.inputs["input_ids"].shape[1] - 1)
    return turn
