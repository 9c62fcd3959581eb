"""Options of a processor's call: which there are, where they go, and which of them cannot be obeyed."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from .device import pick_device

TEXT, IMAGES, VIDEOS, COMMON = "text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs"
# transformers accepts these for any image processor, and those of Qwen2-VL pass over them without a word.
_WITHOUT_EFFECT = ("do_center_crop", "crop_size", "do_pad", "pad_size")
_DEFAULTS = {"return_tensors": "pt", "padding_side": "left"}
_EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def known_options(processor: Any) -> tuple[dict[str, set[str]], set[str]]:
    """Names of the options of a processor's call: by modality, and those of none."""
    declared = processor.valid_processor_kwargs.__annotations__
    parts = {TEXT: None, IMAGES: processor.image_processor, VIDEOS: processor.video_processor}
    known = {
        modality: {*declared[modality].__annotations__, *(part.valid_kwargs.__annotations__ if part else ())}
        for modality, part in parts.items()
    }
    return known, {name for name in declared if not name.endswith("_kwargs")}


def call_options(
    processor: Any,
    options: Mapping[str, Any],
    of_template: Collection[str],
    processor_kwargs: Mapping[str, Any],
    return_tensors: str | None,
) -> dict[str, Any]:
    """Options of the call that follows a chat template.

    Parameters
    ----------
    processor : ProcessorMixin
    options : dict
        Given to the template, where those of the call may be, too.
    of_template : collection of str
        Which of them are the template's.
    processor_kwargs : dict
        Given for the call.
    return_tensors : str or None
        Where ``processor_kwargs`` has none.

    Raises
    ------
    TypeError
        If an option is neither the template's nor the call's.
    ValueError
        If one is given twice.
    """
    known, flat = known_options(processor)
    beside = {name: value for name, value in options.items() if name not in of_template}
    for name in beside:
        check_known(name, {*of_template, *flat, *known}.union(*known.values()))
        if name in processor_kwargs:
            raise ValueError(f"{name} was given twice, in processor_kwargs and beside it; give it once.")
    call = {"return_tensors": return_tensors, **processor_kwargs, **beside}
    if "return_tensors" in (text := dict(call.get(TEXT) or {})):
        call = {**call, "return_tensors": text.pop("return_tensors"), TEXT: text}
    return call


def spread_common(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of ``common_kwargs`` beside the others, which go before them.

    Raises
    ------
    TypeError
        If ``common_kwargs`` is no dict.
    """
    common = options.get(COMMON)
    if common is not None and not isinstance(common, Mapping):
        raise TypeError(f"{COMMON} must be a dict of options, got {type(common).__name__}.")
    return {**(common or {}), **{name: value for name, value in options.items() if name != COMMON}}


def check_options(options: Mapping[str, Any], known: Mapping[str, Collection[str]], flat: Collection[str]) -> None:
    """Raise where a call has an option that there is none of, or that cannot be obeyed.

    Parameters
    ----------
    options : dict
        Of one call: flat ones, and dicts of them by modality.
    known : dict
        Names of the options of each modality.
    flat : collection of str
        Names that are known outside of a modality only.

    Raises
    ------
    TypeError
        If an option is unknown; the message lists the known ones.
    ValueError
        If an option is given flat and within its modality, or cannot be obeyed.
    """
    everywhere = {*flat, *known, COMMON}.union(*known.values())
    for name, value in options.items():
        check_known(name, everywhere)
        if name in known:
            _check_nested(name, value, known[name], options)
        else:
            _check_obeyed(name, value)


def check_known(name: str, known: Collection[str], where: str = "") -> None:
    """Raise ``TypeError`` for the name of an option that is none of the known ones."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise TypeError(f"unknown option {name}{where}.{hint} Known are {', '.join(sorted(known))}.")


def with_bounds_as_size(options: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``min_pixels`` and ``max_pixels`` by the ``size`` that they mean.

    transformers 5.17 passes over one of them without the other, and 5.24 calls both deprecated.

    Parameters
    ----------
    options : dict
        Of one call, checked.
    sizes : dict
        By modality, the ``size`` that holds where none is given.

    Returns
    -------
    dict
        The options, with dicts of their own by modality.

    Raises
    ------
    TypeError
        If ``size`` is no dict.
    """
    flat = {name: value for name, value in options.items() if name not in (*_EDGES, *sizes)}
    nested = {modality: dict(options.get(modality) or {}) for modality in sizes}
    bounds = {
        modality: {edge: one.pop(name, options.get(name)) for name, edge in _EDGES.items()}
        for modality, one in nested.items()
    }
    if any(value is not None for one in bounds.values() for value in one.values()):
        size = flat.pop("size", None)
        for modality, one in nested.items():
            base = one.get("size") or size or sizes[modality]
            if not isinstance(base, Mapping):
                raise TypeError(f"size must be a dict with shortest_edge and longest_edge, got {base!r}.")
            one["size"] = {**base, **{edge: value for edge, value in bounds[modality].items() if value is not None}}
    return {**flat, **{modality: one for modality, one in nested.items() if one}}


def with_our_defaults(options: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Options of transformers' call, with our defaults, and without those that are done with before it.

    Parameters
    ----------
    options, sizes : dict
        As in :func:`with_bounds_as_size`.
    """
    options = with_bounds_as_size(options, sizes)
    nested = {name: dict(options.pop(name) or {}) for name in (TEXT, IMAGES, VIDEOS) if name in options}
    for one in (options, *nested.values()):
        one.pop("input_data_format", None)
    missing = {name: value for name, value in _DEFAULTS.items() if not any(name in one for one in nested.values())}
    return {**missing, **options, **nested}


def effective(options: Mapping[str, Any], modality: str, name: str, default: Any) -> Any:
    """Value of an option for a modality: given within it, flat, or the default."""
    for one in (options.get(modality) or {}, options):
        if one.get(name) is not None:
            return one[name]
    return default


def _check_nested(modality: str, value: Any, known: Collection[str], options: Mapping[str, Any]) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{modality} must be a dict of options, got {type(value).__name__}.")
    for name, one in (value or {}).items():
        check_known(name, known, f" in {modality}")
        if name in options:
            raise ValueError(f"{name} was given twice, in {modality} and beside it; give it once.")
        _check_obeyed(name, one)


def _check_obeyed(name: str, value: Any) -> None:
    if name in _WITHOUT_EFFECT and value:
        raise ValueError(
            f"{name}={value!r} has no effect on the image processor of this model; crop or pad beforehand."
        )
    if name == "device" and value is not None:
        pick_device(str(value))
