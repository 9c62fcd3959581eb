"""Modes of ``generate`` and what becomes of each: the table of docs/generation_modes.md, which the tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import BaseStreamer

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from toys import tiny_model

PRUNED = {"keep": 0.5, "min_keep": 3, "target_layers": [1, 3]}
ENGINE, HOOKS = "engine", "plain"
REFUSED, TRANSFORMERS = "refused", "refused by transformers"


@dataclass(frozen=True)
class Mode:
    """A mode: options of a call, made anew for every call, and what becomes of it.

    ``on``: ``"engine"`` or ``"plain"`` (where it runs if the engine is on), or who refuses it. ``error``: a part of the
    message. ``as_greedy``: gives the tokens of the greedy call. ``remark``: what the page says beside it.
    """

    on: str
    options: Callable[[Any, dict[str, Any]], dict[str, Any]] = field(repr=False)
    error: str = ""
    as_greedy: bool = False
    remark: str = ""
    family: str = "qwen2_5_vl"
    drops_inputs: tuple[str, ...] = ()


class Ignored(BaseStreamer):
    """Takes what it is given."""

    def put(self, value):
        pass

    def end(self):
        pass


class Shifts(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.roll(1, dims=-1)


def after(n_tokens: int):
    """Stops an answer of any prompt after some tokens."""
    lengths = []

    def criterion(input_ids, scores, **kwargs):
        lengths.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(lengths) >= n_tokens)

    return StoppingCriteriaList([criterion])


def text_model() -> Any:
    config = Qwen2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def smaller_model() -> Any:
    """A model of the same family that is narrower."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_model(seed=3, vision_options={"out_hidden_size": 32}, text_options=text)


def pruned_assistant() -> Any:
    """As wide as the target: a dense one hands it its own features."""
    model = tiny_model(seed=3)
    apply_sparsevlm(model, **PRUNED)
    return model


def always(**options: Any) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    return lambda model, inputs: options


def a_cache(make: Callable[[Any], Any]) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    return lambda model, inputs: {"past_key_values": make(model.config.get_text_config())}


_LOADS_CODE = "transformers loads it from the hub and asks for `trust_remote_code=True`"
MODES = {
    "greedy": Mode(ENGINE, always(), as_greedy=True),
    "`do_sample=True`": Mode(ENGINE, always(do_sample=True)),
    "`num_return_sequences`": Mode(ENGINE, always(do_sample=True, num_return_sequences=3)),
    "`num_beams`": Mode(HOOKS, always(num_beams=3, num_return_sequences=2)),
    "`num_beams` and `do_sample`": Mode(HOOKS, always(num_beams=3, do_sample=True)),
    "`num_beam_groups`": Mode(
        TRANSFORMERS, always(num_beams=4, num_beam_groups=2, diversity_penalty=0.5), "trust_remote_code",
        remark=_LOADS_CODE,
    ),
    "`force_words_ids`, `constraints`": Mode(
        TRANSFORMERS, always(num_beams=3, force_words_ids=[[5]]), "trust_remote_code", remark=_LOADS_CODE
    ),
    "`penalty_alpha` (contrastive search)": Mode(
        TRANSFORMERS, always(penalty_alpha=0.6, top_k=4), "trust_remote_code", remark=_LOADS_CODE
    ),
    "`dola_layers`": Mode(TRANSFORMERS, always(dola_layers="low"), "trust_remote_code", remark=_LOADS_CODE),
    "`custom_generate` (a callable)": Mode(
        HOOKS,
        always(custom_generate=lambda model, input_ids, **rest: type(model)._sample(model, input_ids, **rest)),
        as_greedy=True,
        remark="the loop is its own; what it asks the model is pruned",
    ),
    "`assistant_model`, dense": Mode(
        HOOKS, lambda *_: {"assistant_model": smaller_model()}, as_greedy=True,
        remark="transformers lets it draft without the images",
    ),
    "`assistant_model`, pruned": Mode(
        HOOKS, lambda *_: {"assistant_model": pruned_assistant()}, as_greedy=True,
        remark="it sees the images, [more](#assistants)",
    ),
    "`assistant_model`, the model itself": Mode(HOOKS, lambda model, _: {"assistant_model": model}, as_greedy=True),
    "`assistant_model` of text alone": Mode(
        REFUSED, lambda *_: {"assistant_model": text_model()}, "takes no pixel_values",
        remark="transformers hands it pixels and fails",
    ),
    "`assistant_tokenizer` (universal assisted decoding)": Mode(
        REFUSED,
        lambda *_: {"assistant_model": smaller_model(), "tokenizer": object(), "assistant_tokenizer": object()},
        "assistant_tokenizer: transformers drafts from the prompt as text",
    ),
    "`prompt_lookup_num_tokens`": Mode(HOOKS, always(prompt_lookup_num_tokens=3), as_greedy=True),
    "`assistant_early_exit`": Mode(
        REFUSED, always(assistant_early_exit=2), "looks for num_hidden_layers", remark="transformers fails as well"
    ),
    "`use_mtp`": Mode(
        REFUSED, always(use_mtp=True), "use_mtp drafts from the states", remark="with `keep=1.0` transformers decides"
    ),
    '`speculation_type="dflash"`': Mode(
        REFUSED, lambda *_: {"assistant_model": smaller_model(), "speculation_type": "dflash"},
        "drafts from the states",
        remark="with `keep=1.0` transformers decides; so for Gemma 4's assistants",
    ),
    "drafts and `output_hidden_states` or `output_attentions`": Mode(
        REFUSED, always(prompt_lookup_num_tokens=3, output_hidden_states=True, return_dict_in_generate=True),
        "output_hidden_states with drafts", remark="with `keep=1.0` transformers decides",
    ),
    "`streamer`": Mode(ENGINE, lambda *_: {"streamer": Ignored()}, as_greedy=True),
    "`stopping_criteria`, `max_time`": Mode(ENGINE, lambda *_: {"stopping_criteria": after(3), "max_time": 600.0}),
    "`stop_strings` with `tokenizer`": Mode(
        ENGINE,
        lambda *_: {"stop_strings": ["no such words"], "tokenizer": AutoTokenizer.from_pretrained(bundled_path())},
        as_greedy=True, remark="in the model's own `generation_config`: hooks",
    ),
    "`logits_processor`": Mode(ENGINE, lambda *_: {"logits_processor": LogitsProcessorList([Shifts()])}),
    "`watermarking_config`": Mode(ENGINE, lambda *_: {"watermarking_config": WatermarkingConfig()}),
    "`guidance_scale`, positions of one axis": Mode(ENGINE, always(guidance_scale=1.5), family="llava"),
    "`guidance_scale`, of three (Qwen-VL, GLM)": Mode(
        REFUSED, always(guidance_scale=1.5), "guidance_scale=1.5: transformers gives the pass",
        remark="transformers fails as well",
    ),
    "`guidance_scale` and `use_cache=False`": Mode(HOOKS, always(guidance_scale=1.5, use_cache=False)),
    "`negative_prompt_ids`": Mode(
        ENGINE,
        lambda model, inputs: {"guidance_scale": 1.5, "negative_prompt_ids": inputs["input_ids"][:, -5:].clone()},
        family="llava",
        remark="it is text, without images",
    ),
    "`return_dict_in_generate`, `output_scores`, `output_logits`": Mode(
        ENGINE, always(return_dict_in_generate=True, output_scores=True, output_logits=True), as_greedy=True
    ),
    "`output_hidden_states`": Mode(
        HOOKS, always(return_dict_in_generate=True, output_hidden_states=True), as_greedy=True,
        remark="of the tokens that each layer has",
    ),
    "`output_attentions`": Mode(
        HOOKS, always(return_dict_in_generate=True, output_attentions=True), as_greedy=True,
        remark="of the tokens that each layer has",
    ),
    '`cache_implementation="dynamic"`': Mode(ENGINE, always(cache_implementation="dynamic"), as_greedy=True),
    '`cache_implementation="static"`': Mode(
        HOOKS, always(cache_implementation="static"), as_greedy=True, remark="saves no memory; not compiled"
    ),
    '`cache_implementation="hybrid"`, `"sliding_window"`': Mode(
        HOOKS, always(cache_implementation="hybrid"), as_greedy=True, remark="layers with a window: refused"
    ),
    '`cache_implementation="quantized"`': Mode(
        TRANSFORMERS, always(cache_implementation="quantized"), "optimum-quanto",
        remark="without `optimum-quanto`; with it hooks, [more](#quantized-caches)",
    ),
    '`cache_implementation="offloaded"`, `"offloaded_static"`': Mode(
        REFUSED, always(cache_implementation="offloaded"), "keeps keys and values off the GPU",
        remark="on a CPU, where transformers fails; on a GPU hooks, [more](#offloaded-caches)",
    ),
    '`cache_implementation="paged"`': Mode(
        REFUSED, always(cache_implementation="paged"), "takes token ids alone", remark="[more](#continuous-batching)"
    ),
    "`cache` (`past_key_values`), a `DynamicCache`": Mode(
        ENGINE, a_cache(lambda config: DynamicCache(config=config)), as_greedy=True
    ),
    "`cache` (`past_key_values`), a `StaticCache`": Mode(
        HOOKS, a_cache(lambda config: StaticCache(config=config, max_cache_len=80)), as_greedy=True
    ),
    "`cache` (`past_key_values`), an `EncoderDecoderCache`": Mode(
        REFUSED, a_cache(lambda config: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))),
        "is an EncoderDecoderCache",
    ),
    "`use_cache=False`": Mode(HOOKS, always(use_cache=False), as_greedy=True, remark="what was chosen first holds"),
    "`prefill_chunk_size`": Mode(REFUSED, always(prefill_chunk_size=8), "prefill_chunk_size splits a prompt"),
    "`compile_config`, `disable_compile`": Mode(
        ENGINE, lambda *_: {"compile_config": CompileConfig()}, as_greedy=True,
        remark="nothing is compiled by transformers",
    ),
    "`synced_gpus`": Mode(
        TRANSFORMERS, always(synced_gpus=True), "process group", remark="without a process group; with one hooks"
    ),
    "`inputs_embeds` with pixels": Mode(
        HOOKS, lambda model, inputs: {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])},
        drops_inputs=("input_ids",),
    ),
}  # fmt: skip


def rows() -> list[str]:
    """Rows of the page's table."""
    shown = {ENGINE: "engine", HOOKS: "hooks", REFUSED: "**refused**", TRANSFORMERS: "**refused by transformers**"}
    return [f"| {name} | {shown[mode.on]} | {mode.remark} |" for name, mode in MODES.items()]
