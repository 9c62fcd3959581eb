"""Images of a later call on a kept cache: they are those of its new tokens, and stand behind what the cache holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import ModelAdapter
from .inputs import brings_images, images_of, parameters_of, remedy_of_later_images
from .kept_features import size_names
from .later_inputs import gives_all, input_ids_of

_MISMATCH = "tokens do not match"  # how transformers says that features and placeholders differ in number


@contextlib.contextmanager
def later_images(adapter: ModelAdapter, arguments: dict[str, Any], past_len: int) -> Iterator[dict[str, Any]]:
    """Context of a later call of ``generate``; the value is its arguments, with positions of its images.

    Where ``mm_token_type_ids`` are given, an image has the positions of a grid behind those of the tokens in the cache,
    as in a call with the whole conversation. transformers would ask for the sizes of earlier images, or not read them.
    Where the call fails, what the model remembers of positions is as it was.

    Parameters
    ----------
    adapter : ModelAdapter
    arguments : dict
    past_len : int
        Tokens in the cache, 1 at least.

    Raises
    ------
    ValueError
        If the images or the kinds are not those of the new tokens.
    """
    ids = input_ids_of(arguments)
    if ids is None or not brings_images(adapter, arguments):
        yield arguments
        return
    new = ids[:, past_len:] if gives_all(arguments, ids) else ids
    check_new_images(adapter, arguments, new)
    deltas = getattr(adapter.base_model, "rope_deltas", None)
    try:
        with explained_mismatch():
            yield _with_positions(adapter, arguments, new, past_len, deltas)
    except BaseException:
        if deltas is not None:
            adapter.base_model.rope_deltas = deltas
        raise


def check_new_images(adapter: ModelAdapter, arguments: Mapping[str, Any], new: Tensor) -> None:
    """Refuse images other than those of the new tokens, (batch, q_len), as far as their sizes are known.

    Raises
    ------
    ValueError
    """
    for kind in images_of(adapter, arguments):
        modality = adapter.modalities[kind]
        n = int((new == modality.token_id).sum())
        n_given = _n_given(adapter, arguments, new, modality.token_id) if n else 0
        if n_given is None or n == n_given > 0:
            continue
        given = " and ".join((modality.pixels, *modality.size_inputs))
        raise ValueError(
            f"the new tokens, behind those in the cache, hold {n} {kind} placeholders, and {given} were given"
            f"{f' for {n_given}' if n_given else ''}. {remedy_of_later_images(modality, n)}"
        )


def _n_given(adapter: ModelAdapter, arguments: Mapping[str, Any], new: Tensor, token_id: int) -> int | None:
    """How many placeholders of a kind, or of kinds that share it, pixels have; ``None``: their sizes do not tell."""
    kinds = [kind for kind in images_of(adapter, arguments) if adapter.modalities[kind].token_id == token_id]
    known = {**arguments, "input_ids": new}
    if any(arguments.get(adapter.modalities[kind].pixels) is None for kind in kinds):
        return None
    found = [adapter.family.n_placeholders(adapter, kind, known) for kind in kinds]
    return None if None in found else sum(n or 0 for n in found)


@contextlib.contextmanager
def explained_mismatch() -> Iterator[None]:
    """Context in which transformers' refusal of images that are not those of the new tokens says what to give."""
    try:
        yield
    except ValueError as error:
        if _MISMATCH not in str(error):
            raise
        raise ValueError(
            f"the images do not fit the new tokens ({error}). What the cache holds is not encoded again: give the "
            "pixels of new images alone."
        ) from error


def _with_positions(
    adapter: ModelAdapter, arguments: dict[str, Any], new: Tensor, past_len: int, deltas: Any
) -> dict[str, Any]:
    """Arguments with positions of the new tokens, (batch, q_len), where kinds of tokens are given to make them of.

    ``deltas``: how far positions of the tokens in the cache, (batch, 1), are ahead of their number.
    """
    types, base_model = arguments.get("mm_token_type_ids"), adapter.base_model
    reads_types = "mm_token_type_ids" in parameters_of(getattr(base_model, "get_rope_index", lambda: None))
    if types is None or not reads_types or arguments.get("position_ids") is not None:
        return arguments
    (batch, n), device = new.shape, new.device
    is_whole = types.shape[1] == past_len + n
    if types.shape[0] != batch or (types.shape[1] > n and not is_whole):
        raise ValueError(
            f"mm_token_type_ids has shape {tuple(types.shape)}; wanted is {(batch, past_len + n)}, one entry per "
            f"token. Give those of all tokens or of the new ones, up to {n}, or leave it out."
        )
    if deltas is None and is_whole and not bool(types[:, :past_len].any()):
        deltas = torch.zeros((batch, 1), dtype=torch.long, device=device)
    if deltas is None or batch % deltas.shape[0]:
        raise ValueError(
            "mm_token_type_ids ask for positions behind those in the cache, and the last prompt that this model has "
            "run was none of theirs. Leave it out, or begin anew with a new cache, all tokens and all pixels."
        )
    # An answer may stand before what a processor has made.
    types = types[:, -n:] if is_whole else torch.nn.functional.pad(types, (n - types.shape[1], 0))
    mask = arguments.get("attention_mask")
    mask = torch.ones((batch, past_len + n), dtype=torch.long) if mask is None else mask.cpu()
    known = {name: arguments[name] for name in size_names(adapter) if arguments.get(name) is not None}
    of_new = {"input_ids": new, "attention_mask": mask[:, past_len:], "mm_token_type_ids": types, **known}
    on_host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in of_new.items()}
    # Of the new tokens as a prompt of their own: the first axis counts tokens, the others are coordinates.
    positions = adapter.model._prepare_position_ids_for_generation(on_host["input_ids"], on_host)
    before = deltas.cpu().repeat_interleave(batch // deltas.shape[0], dim=0)
    n_seen = mask[:, :past_len].sum(dim=1, keepdim=True)
    positions = torch.cat([positions[:1] + n_seen, positions[1:] + n_seen + before])
    base_model.rope_deltas = (base_model.rope_deltas + before).to(deltas.device)
    return {**arguments, "position_ids": positions.to(device)}
