"""From a task's generation options to those of ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_NEW_TOKENS = 128  # where a task names none; lmms-eval's own Qwen2.5-VL takes the same
_FILLER = "\n\n"  # lmms-eval's stop text for tasks that name none: it would cut answers of several paragraphs
_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")
_KNOWN = {"max_new_tokens", "max_gen_toks", "do_sample", "until", *_SAMPLING, *_PASSED}


def generation_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Greedy unless the task samples; what is not given is the checkpoint's own.

    ``do_sample`` decides. Where it is missing, a temperature above zero means sampling, as in lmms-eval's own models.

    Parameters
    ----------
    given : mapping
        ``generation_kwargs`` of a task, ``--gen_kwargs`` included.

    Returns
    -------
    options : dict
        Arguments of ``generate``.
    stops : tuple of str
        Texts at which the answer ends.

    Raises
    ------
    ValueError
        If ``until`` is neither a text nor a list of texts.
    """
    temperature = given.get("temperature") or 0.0
    samples = bool(given.get("do_sample", temperature > 0)) and given.get("temperature", 1.0) != 0
    options: dict[str, Any] = {
        "max_new_tokens": int(given.get("max_new_tokens") or given.get("max_gen_toks") or MAX_NEW_TOKENS),
        "do_sample": samples,
    }
    for name in _SAMPLING:
        # Unset for greedy, where generate would warn about what the checkpoint's own options hold.
        if not samples or given.get(name) is not None:
            options[name] = given.get(name) if samples else None
    options.update({name: given[name] for name in _PASSED if given.get(name) is not None})
    return options, _stops(given.get("until"))


def unused_options(given: Mapping[str, Any]) -> list[str]:
    """Names that :func:`generation_options` does not act on: unknown ones, and a temperature without sampling."""
    idle = set(given) - _KNOWN
    if (given.get("temperature") or 0) > 0 and not generation_options(given)[0]["do_sample"]:
        idle.add("temperature")
    return sorted(idle)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def _stops(until: Any) -> tuple[str, ...]:
    if until is None:
        return ()
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"until must be a text or a list of texts, got {until!r}.")
    return tuple(stop for stop in stops if stop and stop != _FILLER)
