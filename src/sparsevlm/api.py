"""The public calls: apply, reset, remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn

from .collision import check_collision
from .compat import check_transformers
from .config import OF_APPLY, SparseVLMConfig, check_options
from .models import adapter_for, check_module, unwrap, wrapper_hint
from .state import STATE_ATTRIBUTE, SparseVLMState
from .template import template_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .selection.context import Selector
    from .typed_options import MoreOptions


def apply_sparsevlm(
    model: nn.Module,
    n_vis: int | None = None,
    target_layers: Sequence[int] | None = None,
    min_keep: int = 32,
    tau: float = 0.5,
    theta: float = 0.5,
    *,
    keep: int | float | Sequence[int | float] | None = None,
    selector: str | Selector | None = None,
    config: SparseVLMConfig | None = None,
    processor: Any = None,
    warmup: bool | Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    allow_untested: bool = False,
    family: str | None = None,
    **options: Unpack[MoreOptions],
) -> SparseVLMState:
    """Make an unchanged ``model.generate(**inputs)`` prune visual tokens inside the decoder.

    No weights change, nothing is retrained. Applying again replaces the options; :func:`remove_sparsevlm` gives the
    untouched model back.

    Parameters
    ----------
    model : PreTrainedModel
        Of a supported class, such as ``Qwen2_5_VLForConditionalGeneration``, or a model of PEFT around it. What
        ``torch.compile`` has compiled in this process is compiled anew after the call, with the hooks in it.
    n_vis : int, optional
        Visual tokens that a sample is expected to have; a mismatch is warned about once and the real count used.
    target_layers : sequence of int, optional
        Decoder layers after which tokens are dropped. ``None``: every 4th from layer 2, or before the decoder where the
        selector runs there, as the default one does.
    min_keep : int
        Never fewer visual tokens than this.
    tau, theta : float
        Fraction of the dropped tokens that is recycled, and clusters per recycled token.
    keep : int, float or sequence of them, optional
        Visual tokens averaged over all decoder layers, as tokens or as a fraction. ``None``: an
        adaptive selector decides, such as the default one; of others the rank of the attention.
    selector : str or object, optional
        A built-in method by name, or an object with ``select(context, n_keep)``. ``None``:
        ``"span-features"``; ``"span"`` where ``target_layers`` or a ``schedule`` is given, ``"sparsevlm"`` under a
        preset of the paper's settings.
    config : SparseVLMConfig, optional
        All options at once, instead of single ones.
    processor : optional
        The model's processor or tokenizer: its special tokens and what the chat template puts around a prompt are
        not taken for the user's text.
    warmup : mapping or sequence of mapping, or bool
        Inputs of typical requests, as the processor makes them, or ``True`` for images of all sizes, to run ahead
        (:meth:`SparseVLMState.warmup`): what a request of like size needs is compiled and recorded then, not when the
        first one comes. Where one fails, it is as if nothing had been applied: what was applied before is in force
        again.
    allow_untested : bool
        Warn, instead of raising, where transformers is a version that this library was not tested on.
    family : str, optional
        ``"generic"``: find image token, decoder and vision tower of a class that is not supported by their usual names.
        The first request with an image then runs twice more, to show that gathering rows changes nothing, or is
        refused. ``None``: only classes that are supported, or that :func:`register_adapter` was told of.
    **options
        The other fields of :class:`SparseVLMConfig`: ``raters``, ``heads``, ``recycle``, ``merge``, ``schedule``,
        ``rank_lambda``, ``rank_tolerance``, ``strict``, ``seed``, ``preset``, ``engine``, ``vision_keep``,
        ``image_cache``, ``timeout``, ``min_keep_per_image``, ``weights``, ``turns``.

    Returns
    -------
    SparseVLMState
        With ``report``, ``options(...)``; as a context manager it removes itself at the end.

    Raises
    ------
    NotImplementedError
        For models without an adapter; the message lists those supported.
    ImportError
        For versions of transformers outside of the tested range.
    ValueError, TypeError
        For options out of range, layers that do not exist, budgets that cannot hold, and a checkpoint that was
        loaded with the wrong class. Nothing is attached then.
    """
    check_collision()
    check_transformers(allow_untested)
    named = {
        "n_vis": n_vis,
        "target_layers": target_layers,
        "min_keep": min_keep,
        "tau": tau,
        "theta": theta,
        "keep": keep,
        "selector": selector,
        **options,
    }
    config = _config(config, named)
    check_module(model)
    model = unwrap(model)
    requests = _requests(warmup)
    adapter = adapter_for(model, family)
    template = template_of(processor)
    state = SparseVLMState(adapter.with_special_tokens(template.special), config, template)
    before = _state_of(model)
    if before is not None and before.adapter.model is not model:
        raise ValueError(
            "another model that shares these modules is under SparseVLM already: call remove_sparsevlm on it first."
        )
    _put_in_force(state, before, requests)
    return state


def _config(config: Any, named: Mapping[str, Any]) -> SparseVLMConfig:
    """All options: those of ``config``, or single ones by name."""
    if config is not None and not isinstance(config, SparseVLMConfig):
        raise TypeError(
            f"config must be a SparseVLMConfig, got {config!r} of type {type(config).__name__}: pass "
            "config=SparseVLMConfig(...), or the options themselves by name."
        )
    check_options(named, [*(f.name for f in fields(SparseVLMConfig)), *OF_APPLY])
    defaults = SparseVLMConfig()
    single = defaults.replace(**named)
    if config is None:
        return single
    if given := [f.name for f in fields(single) if getattr(single, f.name) != getattr(defaults, f.name)]:
        raise ValueError(f"pass either config= or single options, not both (got {', '.join(given)}).")
    return config


def _requests(warmup: Any) -> list[Mapping[str, Any]] | None:
    """Requests to run ahead, none at all for the ladder; ``None``: there is nothing to run."""
    if isinstance(warmup, bool):
        return [] if warmup else None
    requests = [warmup] if isinstance(warmup, Mapping) or not isinstance(warmup, Sequence) else list(warmup)
    for request in requests:
        if not isinstance(request, Mapping) or (warmup and not request):
            got = "an empty mapping" if isinstance(request, Mapping) else type(request).__name__
            raise TypeError(
                "warmup must be inputs of generate as the processor makes them (a mapping), a sequence of such, or "
                f"True for images of all sizes, got {got}."
            )
    return [request for request in requests if request] or None


def _put_in_force(
    state: SparseVLMState, before: SparseVLMState | None, requests: list[Mapping[str, Any]] | None
) -> None:
    """Replace one state by another, or change nothing where the new one's warm-up fails."""
    if before is not None:
        before.detach()
    try:
        state.attach()
        if requests is not None:
            state.warmup(*requests)
    except BaseException:
        state.detach()
        if before is not None:
            before.attach()
        raise


def reset_n_vis(state: SparseVLMState, n_vis: int | None = None) -> None:
    """Announce the number of visual tokens of the next image. Optional: the inputs are counted anyway.

    Parameters
    ----------
    state : SparseVLMState
    n_vis : int, optional
        ``None``: expect nothing.
    """
    if not isinstance(state, SparseVLMState):
        raise TypeError(f"expected the state that apply_sparsevlm returned, got {type(state).__name__}.")
    state.expect_n_visual(n_vis)


def remove_sparsevlm(model: nn.Module) -> None:
    """Give the untouched model back: its outputs are bit-equal to those before. Harmless when nothing is applied.

    Raises
    ------
    TypeError
        If ``model`` is no module.
    ValueError
        If another model is under SparseVLM, and ``model`` wraps it or is a part of it.
    """
    check_module(model)
    model = unwrap(model)
    state = _state_of(model)
    if state is None:
        _refuse_others(model)
    else:
        state.detach()


def _refuse_others(model: nn.Module) -> None:
    others = (vars(part).get(STATE_ATTRIBUTE) for part in model.modules())
    if (state := next(filter(None, others), None)) is not None:
        raise ValueError(
            f"this {type(model).__name__} is not what prunes, but a {state.adapter.name} in or around it: pass that, "
            f"the model that apply_sparsevlm was called on.{wrapper_hint(model)}"
        )


def _state_of(model: nn.Module) -> SparseVLMState | None:
    own: SparseVLMState | None = vars(model).get(STATE_ATTRIBUTE)
    if own is not None and own.adapter.model is model:  # it merges the features itself
        return own
    return getattr(getattr(model, "model", None), STATE_ATTRIBUTE, None)
