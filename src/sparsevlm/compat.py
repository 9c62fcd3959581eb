"""Names of transformers that move between its versions, and the check of its version."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMode, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What a call may be refused for, in some of its values.
_SPECIAL = frozenset(
    {
        *("assistant_early_exit", "assistant_model", "assistant_tokenizer", "cache", "cache_implementation"),
        *("guidance_scale", "past_key_values", "prefill_chunk_size", "prompt_lookup_num_tokens", "speculation_type"),
        "use_mtp",
    }
)
# Layers of quantized caches; before transformers 5.24 those of all kinds have a rest that is not packed.
QuantizedLayerBase: Any = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
# Of generate, and of what it gives: the first before transformers 5.24, the second since.
_CACHE_NAMES = ("past_key_values", "cache")
_CACHE = next(field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput) if field.name in _CACHE_NAMES)
OLDEST, NEWEST = "5.17.0", "5.24.0"  # both ends of the range that the tests run on
logger = logging.getLogger(__name__)


@functools.cache
def check_transformers(allow_untested: bool = False, version: str | None = None) -> None:
    """Refuse a transformers outside of the tested range; warn, once per process, of a newer patch within it.

    Parameters
    ----------
    allow_untested : bool
        Warn instead of refusing.
    version : str, optional
        Instead of the installed one's.

    Raises
    ------
    ImportError
        With the command that installs a tested version.
    """
    version = version or transformers.__version__
    found, oldest, newest = Version(version), Version(OLDEST), Version(NEWEST)
    if oldest <= found <= newest:
        return
    tested = f"{oldest.major}.{oldest.minor} to {newest.major}.{newest.minor}"
    if found.release[:2] == newest.release[:2] and found > newest:
        logger.warning("sparsevlm: tested on transformers up to %s; this is its patch %s.", NEWEST, version)
    elif allow_untested:
        logger.warning("sparsevlm: tested on transformers %s; %s was allowed by allow_untested.", tested, version)
    else:
        raise ImportError(
            f"transformers {version} is installed; sparsevlm was tested on {tested}, and other versions can answer "
            f'wrongly without an error. Run `pip install "transformers>={oldest.major}.{oldest.minor},'
            f'<{newest.major}.{newest.minor + 1}"`, or pass allow_untested=True to apply_sparsevlm at your own risk.'
        )


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among a model's arguments or outputs: ``cache`` since 5.24, ``past_key_values`` before."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def with_cache_named(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` with the cache under the name that this version has for it, whichever was given."""
    if _CACHE in arguments:
        return arguments
    return {_CACHE if name in _CACHE_NAMES else name: value for name, value in arguments.items()}


def check_layer_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse to prune where a decoder layer is called by other names than those of the tested versions.

    Parameters
    ----------
    arguments : mapping
        Keyword arguments of the layer.

    Raises
    ------
    RuntimeError
    """
    unknown = [f"no {name}" for name in ("attention_mask", "position_embeddings") if name not in arguments]
    if cache_of(arguments) is None:
        unknown += [f"a cache as {name}" for name, value in arguments.items() if isinstance(value, Cache)]
    if unknown:
        raise RuntimeError(
            f"a decoder layer is given {', '.join(unknown)} ({', '.join(sorted(arguments))}): this version of "
            "transformers calls it in another way than those that were tested, and what is pruned would be wrong. "
            "Install a tested version, or call remove_sparsevlm(model)."
        )


def other_generation(model: Any, plain: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why a call of ``generate`` does not run by a loop that we choose; ``None``: it does.

    Parameters
    ----------
    model : PreTrainedModel
    plain : callable
        The ``generate`` that is called.
    arguments : mapping
        Of the call.
    """
    heals = getattr(arguments.get("generation_config"), "token_healing", None) or arguments.get("token_healing")
    reasons = {
        "custom_generate": arguments.get("custom_generate") is not None,
        "trust_remote_code": bool(arguments.get("trust_remote_code")),
        "continuous batching": arguments.get("cache_implementation") == "paged",
        # transformers has the tokenizer that these need only where it chooses the loop
        "token healing": bool(heals),
        "stop_strings in the model's generation_config": model.generation_config.stop_strings is not None,
        "a generate that takes no custom_generate": not _takes_custom_generate(getattr(plain, "__func__", plain)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.lru_cache(maxsize=8)
def _takes_custom_generate(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(one.name == "custom_generate" or one.kind is one.VAR_KEYWORD for one in parameters)


def split_mode_arguments(model: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``generate`` without those that transformers drops where it is given a callable, and these.

    Parameters
    ----------
    model : PreTrainedModel
    arguments : mapping

    Returns
    -------
    arguments, modes : dict
        ``modes`` may hold streamer, synced_gpus, assistant_model, tokenizer and assistant_tokenizer.
    """
    rest = dict(arguments)
    given = [rest.pop(name, None) for name in ("synced_gpus", "assistant_model", "streamer")]
    modes: dict[str, Any] = model._extract_generation_mode_kwargs(None, rest, *given)
    if "tokenizer" in modes:
        _move_stop_strings(rest, modes["tokenizer"])
    return rest, modes


def _move_stop_strings(arguments: dict[str, Any], tokenizer: Any) -> None:
    """Turn ``stop_strings`` into the stopping criterion that transformers makes of them with the tokenizer."""
    config = arguments.get("generation_config")
    if (strings := arguments.pop("stop_strings", None)) is None and config is not None:
        strings = config.stop_strings
        arguments["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if strings is not None:
        criterion = StopStringCriteria(tokenizer, strings)
        arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), criterion])


def decoding_method(model: Any, generation_config: Any, modes: Mapping[str, Any]) -> tuple[Any, bool]:
    """The loop that transformers would run, and whether it drafts tokens (assisted decoding).

    Raises
    ------
    ValueError
        For what transformers refuses, decoding methods that it has moved to the hub among it.
    """
    mode = generation_config.get_generation_mode(modes.get("assistant_model"))
    model._get_deprecated_gen_repo(mode, trust_remote_code=False, custom_generate=None)
    model._validate_generation_mode(mode, generation_config, modes)
    is_assisted = mode == GenerationMode.ASSISTED_GENERATION
    return getattr(type(model), GENERATION_MODES_MAPPING[mode]), is_assisted


def samples_or_greedy(generation_config: Any, modes: Mapping[str, Any]) -> bool:
    """Tells whether a call generates greedily or by sampling, one token at a time."""
    mode = generation_config.get_generation_mode(modes.get("assistant_model"))
    return mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def tensor_parallel_group(model: Any) -> ProcessGroup | None:
    """Processes over which transformers has spread the weights of each layer; ``None``: this one has them all."""
    if getattr(model, "_tp_size", None) in (None, 1):
        return None
    mesh = model._device_mesh
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def unsupported_parallelism(model: Any) -> str | None:
    """Why a model that is spread over processes cannot be pruned, with the remedy; ``None``: it can.

    Tensor parallelism of transformers can, and copies of which each answers prompts of its own, sharded ones (FSDP)
    among them.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "PipelineIdentityLayer":
            return (
                f"pipeline-parallel models are not supported: {name} is on another rank. Load with tp_plan='auto', or "
                "with a device_map, by which one process has its layers on several devices."
            )
    if tensor_parallel_group(model) is not None or not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    spread = next((name for name, weight in model.named_parameters() if isinstance(weight, DTensor)), None)
    if spread is None:
        return None
    return (
        f"{spread} is spread over processes by other means than transformers' own, which do not tell who has which "
        "heads. Load with tp_plan='auto' (in newer transformers DistributedConfig(tp_plan='auto'))."
    )


def mask_length(generation_config: Any) -> int:
    """Length of an attention mask of ones, which transformers leaves out since 5.24; -1: it left none out."""
    return getattr(generation_config, "_mask_length", -1)


def generation_output(
    sequences: Tensor, scores: tuple[Tensor, ...] | None, logits: tuple[Tensor, ...] | None, cache: Cache
) -> GenerateDecoderOnlyOutput:
    """What ``generate`` gives under ``return_dict_in_generate``.

    Parameters
    ----------
    sequences : Tensor of shape (batch, length), int64
    scores, logits : tuple of Tensor of shape (batch, vocab_size), optional
        By new token.
    cache : Cache
    """
    values: dict[str, Any] = {"sequences": sequences, "scores": scores, "logits": logits, _CACHE: cache}
    return GenerateDecoderOnlyOutput(**values)


def is_paged(cache: Any) -> bool:
    """Tells whether a cache is that of continuous batching, which holds many sequences in pages."""
    return type(cache).__name__ == "PagedAttentionCache"


def is_draft(arguments: Mapping[str, Any]) -> bool:
    """Tells whether a call of ``generate`` is a target's, which asks an assistant model for drafts."""
    return bool(getattr(arguments.get("generation_config"), "is_assistant", False))


def quantized_layers_reorder() -> bool:
    """Tells whether beams can be reordered in quantized caches; layers that cannot reorder an empty rest."""
    return "reorder_cache" in vars(cache_utils.QuantizedLayer)


class GenerationSettings:
    """Settings of a call of ``generate``, before transformers has put them together.

    Parameters
    ----------
    model : PreTrainedModel
    arguments : mapping
        Of the call.
    """

    def __init__(self, model: Any, arguments: Mapping[str, Any]) -> None:
        self._sources = (arguments.get("generation_config"), model.generation_config)
        self._arguments = arguments

    def __getitem__(self, name: str) -> Any:
        """A setting by its name; ``None``: nobody has set it."""
        if self._arguments.get(name) is not None:
            return self._arguments[name]
        found = (getattr(source, name, None) for source in self._sources)
        return next((value for value in found if value is not None), None)

    @property
    def may_be_refused(self) -> bool:
        """Tells whether the call asks for anything that is not supported always."""
        for source in (self._arguments, *(vars(source) for source in self._sources if source is not None)):
            for name in _SPECIAL & source.keys():
                if source[name] is not None:
                    return True
        return False

    @property
    def copies(self) -> int:
        """Rows that are made of every prompt: beams or returned sequences."""
        return max(self["num_beams"] or 1, self["num_return_sequences"] or 1)


def with_generation_config(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call of ``generate`` with its settings in a ``generation_config``.

    Where none is given, transformers 5.17 builds a default configuration of the model on every call, for milliseconds,
    to look for settings of generation in the model's own. Where there are none, that can be spared.

    Parameters
    ----------
    model : PreTrainedModel
    arguments : dict
    """
    own: Any = model.config
    settings = _settings()
    if arguments.get("generation_config") is not None or not hasattr(own, "has_no_defaults_at_init"):
        return arguments
    if any(name in settings and value is None for name, value in arguments.items()):
        return arguments  # None takes a setting of the model's generation_config back, which a configuration cannot say
    if any(getattr(own, name, None) is not None for name in settings - _fields(type(own))):  # type: ignore[arg-type]
        return arguments  # that transformers refuses
    config = GenerationConfig()
    rest = config.update(**arguments)
    return {**rest, "generation_config": config}


@functools.cache
def _settings() -> frozenset[str]:
    return frozenset(GenerationConfig._get_default_generation_params()) - {"use_cache"}


@functools.cache
def _fields(kind: Hashable) -> frozenset[str]:
    of: Any = kind
    return frozenset() if of.has_no_defaults_at_init else frozenset(of().to_dict())
