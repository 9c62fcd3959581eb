"""Ways of generating that cannot be pruned, or that transformers fails on: refused before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers.cache_utils import EncoderDecoderCache, QuantizedCache

from .. import compat
from ..models import unwrap
from .session import Session

Check = Callable[[Session, Mapping[str, Any], compat.GenerationSettings], None]
_OR_KEEP_ALL = "or run this request inside state.options(keep=1.0)"
_OTHER_DRAFTS = (
    "Supported are an assistant_model of the same family and prompt_lookup_num_tokens; take one of these, or generate "
    "without drafts."
)


def check_modes(session: Session, arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> None:
    """Refuse a way of generating that is not supported.

    Parameters
    ----------
    session : Session
    arguments : mapping
        Of ``generate``.
    settings : GenerationSettings
        Of the same call.

    Raises
    ------
    NotImplementedError
        For what cannot be pruned, and for what transformers does not do for the model.
    TypeError, ValueError
        For caches and assistants that do not fit.
    """
    for check in _OF_ALL_CALLS:
        check(session, arguments, settings)
    if session.expects_images:
        for check in _OF_IMAGES:
            check(session, arguments, settings)


def _check_early_exit(session: Session, arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> None:
    if settings["assistant_early_exit"] is not None and not hasattr(session.adapter.model.config, "num_hidden_layers"):
        raise NotImplementedError(
            f"assistant_early_exit={settings['assistant_early_exit']}: transformers looks for num_hidden_layers in the "
            f"configuration of the {session.adapter.name}, which has it in text_config alone. {_OTHER_DRAFTS}"
        )


def _check_prefill(session: Session, arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> None:
    if settings["prefill_chunk_size"] is not None:
        raise NotImplementedError(
            "prefill_chunk_size splits a prompt into parts that cannot be judged one by one. Unset it, or remove "
            "SparseVLM for this request with remove_sparsevlm(model)."
        )


def _check_cache(session: Session, arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> None:
    cache, named = compat.cache_of(arguments), settings["cache_implementation"] or ""
    if isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"the cache is an EncoderDecoderCache, and a {session.adapter.name} has a decoder alone. Pass a "
            "DynamicCache, or leave it out."
        )
    device = session.adapter.model.device
    if ("offloaded" in named or getattr(cache, "offloading", False)) and device.type != "cuda":
        raise ValueError(
            f"an offloaded cache keeps keys and values off the GPU, and this {session.adapter.name} is on {device}, "
            "where transformers fails on it. Take the default cache, or cache_implementation='static'."
        )
    if named != "quantized" and not isinstance(cache, QuantizedCache):
        return
    if (settings["num_beams"] or 1) > 1 and not compat.quantized_layers_reorder():
        raise NotImplementedError(
            "num_beams above 1 on a quantized cache: this version of transformers reorders no quantized keys and "
            "values, with SparseVLM and without. Take the default cache, num_beams=1, or transformers 5.24."
        )
    if drafts := _drafts(arguments, settings):
        raise NotImplementedError(
            f"{drafts} on a quantized cache, which cannot be cropped where a draft is rejected. Take the default "
            "cache, or generate without drafts."
        )


def _check_paged(session: Session, arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> None:
    if settings["cache_implementation"] == "paged":
        raise NotImplementedError(
            "cache_implementation='paged' is transformers' continuous batching, which takes token ids alone and leaves "
            "images and videos out without a word. Leave it out, and pass several prompts as one batch."
        )


def _check_guidance(session: Session, arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> None:
    scale = settings["guidance_scale"]
    if scale in (None, 1) or settings["use_cache"] is False or session.adapter.decoder.n_position_axes == 1:
        return
    raise NotImplementedError(
        f"guidance_scale={scale}: transformers gives the pass without the image positions of too many tokens where a "
        f"model has positions of several axes, as the {session.adapter.name}, and fails at the second token. Pass "
        "use_cache=False as well, or leave guidance_scale out."
    )


def _check_drafts(session: Session, arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> None:
    assistant = arguments.get("assistant_model")
    reads_states = {
        "use_mtp": bool(settings["use_mtp"]),
        "speculation_type='dflash'": assistant is not None and settings["speculation_type"] == "dflash",
        f"a {type(assistant).__name__}": "Assistant" in type(assistant).__name__,
    }
    reading = next((name for name, holds in reads_states.items() if holds), None)
    if reading is not None and not session.options.keeps_all:
        raise NotImplementedError(
            f"{reading} drafts from the states, or the keys and values, of all tokens of the prompt, of which pruning "
            f"leaves a part. {_OTHER_DRAFTS[:-1]}, {_OR_KEEP_ALL}."
        )
    if arguments.get("assistant_tokenizer") is not None:
        raise NotImplementedError(
            "assistant_tokenizer: transformers drafts from the prompt as text, in which an image's placeholders are "
            f"other tokens for another tokenizer. {_OTHER_DRAFTS}"
        )
    if assistant is not None and reading is None:
        _check_assistant(session, arguments, unwrap(assistant))
    records = [name for name in ("output_hidden_states", "output_attentions") if settings[name]]
    if records and _drafts(arguments, settings) and not session.options.keeps_all:
        raise NotImplementedError(
            f"{records[0]} with drafts: transformers cuts what layers give by the length of the whole sequence, of "
            f"which pruned layers hold a part. Generate without drafts, {_OR_KEEP_ALL}."
        )


def _check_assistant(session: Session, arguments: Mapping[str, Any], assistant: Any) -> None:
    """Refuse an assistant that does not take what the prompt brings: transformers hands it all of that."""
    taken = {name for method in (assistant.forward, assistant.prepare_inputs_for_generation) for name in _names(method)}
    pixels = [modality.pixels for modality in session.adapter.modalities.values()]
    if foreign := [name for name in pixels if arguments.get(name) is not None and name not in taken]:
        raise ValueError(
            f"assistant_model is a {type(assistant).__name__}, which takes no {', '.join(foreign)}; transformers hands "
            f"it all inputs of the prompt. {_OTHER_DRAFTS}"
        )
    cache = compat.cache_of(arguments)
    if hasattr(vars(assistant).get("generate"), "is_sparsevlm") and cache is not None and cache.get_seq_length() > 0:
        raise NotImplementedError(
            "assistant_model is pruned and would begin with the whole conversation, of which this call brings the last "
            "images alone. Call remove_sparsevlm on it, or begin with a prompt of its own."
        )


def _names(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters)


def _drafts(arguments: Mapping[str, Any], settings: compat.GenerationSettings) -> str:
    """What drafts tokens in a call; empty: nothing."""
    if arguments.get("assistant_model") is not None:
        return "assistant_model"
    return next((name for name in ("prompt_lookup_num_tokens", "use_mtp") if settings[name]), "")


_OF_ALL_CALLS: tuple[Check, ...] = (_check_early_exit, _check_prefill, _check_cache)
_OF_IMAGES: tuple[Check, ...] = (_check_paged, _check_guidance, _check_drafts)
