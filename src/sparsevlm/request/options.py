"""Options of requests, checked against the model before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import AGNOSTIC, SparseVLMConfig
from ..kernels.skinny_linear import check_float8
from ..models import ModelAdapter
from ..selection.budget import least_keep
from ..selection.context import BEFORE_DECODER, EVERYWHERE, TARGET_LAYERS, VISION_NEEDS, Selector, SelectorTraits
from ..selection.overrides import effective_config
from ..selection.selectors import SELECTORS, make_selector


@dataclass(frozen=True)
class Options:
    """Options of requests, checked against the model.

    Attributes
    ----------
    given : SparseVLMConfig
        As the user chose them.
    config : SparseVLMConfig
        In force: with what the selector sets.
    selector, traits, target_layers
        That follow from them.
    """

    given: SparseVLMConfig
    config: SparseVLMConfig
    selector: Selector
    traits: SelectorTraits
    target_layers: tuple[int, ...]

    @property
    def reads_text(self) -> bool:
        """Whether text is read: by the selector, or by the rank, which decides where there is no budget."""
        return _by_rank(self.config, self.traits) or bool({"rater_attention", "text_features"} & self.traits.needs)

    @property
    def is_free(self) -> bool:
        """Whether an adaptive selector is asked without a budget."""
        return self.traits.adaptive and self.config.keep is None and self.config.schedule is None

    @property
    def keeps_all(self) -> bool:
        """Tells whether nothing is dropped of any request."""
        keep = self.config.keep if isinstance(self.config.keep, tuple) else (self.config.keep,)
        return all(isinstance(share, float) and share == 1.0 for share in keep)

    @classmethod
    def of(cls, adapter: ModelAdapter, config: SparseVLMConfig) -> Options:
        """Resolve a configuration; raises where it does not fit the model."""
        selector = make_selector(config)
        effective, traits = effective_config(config, selector), SelectorTraits.of(selector)
        check_needs(adapter, traits)
        check_question_free(adapter, effective, traits)
        check_weights(adapter, effective)
        layers = resolved_target_layers(adapter, effective, traits)
        check_readable(adapter, effective, traits, layers)
        check_budget(adapter, effective, layers)
        return cls(config, effective, selector, traits, layers)


def _by_rank(config: SparseVLMConfig, traits: SelectorTraits) -> bool:
    """Tells whether the rank of the text's attention decides how many tokens go on."""
    return not config.has_budget and not traits.adaptive


def resolved_target_layers(adapter: ModelAdapter, config: SparseVLMConfig, traits: SelectorTraits) -> tuple[int, ...]:
    """Target layers in force: the given ones or the decoder's defaults; for a selector before the decoder -1, alone or
    in front of them.

    Raises
    ------
    ValueError
        If a layer is out of range, or the budget cannot hold on these layers.
    """
    n_layers, last = adapter.n_layers, adapter.decoder.last_target
    if traits.placement != TARGET_LAYERS and _by_rank(config, traits):
        raise ValueError(f"selector {traits.name!r} runs before the decoder, where no rank is known: set keep.")
    if traits.placement == BEFORE_DECODER:
        if config.target_layers is not None:
            raise ValueError(f"selector {traits.name!r} runs before the decoder: leave target_layers unset.")
        return (-1,)
    layers = adapter.decoder.default_targets if config.target_layers is None else tuple(config.target_layers)
    if not layers:
        raise ValueError(
            f"{adapter.name} has {n_layers} decoder layers, too few for the default target layers (every 4th from 2); "
            f"name target_layers in 0..{last}."
        )
    if outside := [layer for layer in layers if layer > last]:
        raise ValueError(
            f"target_layers {outside} are out of range: {adapter.name} has {n_layers} decoder layers, and tokens can "
            f"be dropped after layers 0..{last}.{_shares(adapter)}"
        )
    return (-1, *layers) if traits.placement == EVERYWHERE else layers


def _shares(adapter: ModelAdapter) -> str:
    """Why the range ends before the last layers, if it does."""
    decoder = adapter.decoder
    if not decoder.n_shared:
        return ""
    sources = sorted(set(decoder.key_layers[decoder.first_shared :]))
    return (
        f" Layers from {decoder.first_shared} on attend to the keys and values of layers {sources}, which must not "
        "hold tokens that are dropped later."
    )


def check_needs(adapter: ModelAdapter, traits: SelectorTraits) -> None:
    """Refuse a selector that asks for what the model does not have.

    Raises
    ------
    NotImplementedError
    """
    if not traits.needs & VISION_NEEDS or adapter.vision.readable:
        return
    needs = ", ".join(sorted(traits.needs & VISION_NEEDS))
    if adapter.vision.unreadable:
        raise NotImplementedError(
            f"selector {traits.name!r} needs {needs}, which is not read in the vision tower of a {adapter.name}: "
            f"{adapter.vision.unreadable}. Choose a selector that does not look into the tower, such as "
            "'span-features', 'sparsevlm' or 'cdpruner'."
        )
    raise NotImplementedError(
        f"selector {traits.name!r} needs {needs}, which is read in blocks with full attention, and the vision tower of "
        f"this {adapter.name} has none. Choose another selector."
    )


def check_question_free(adapter: ModelAdapter, config: SparseVLMConfig, traits: SelectorTraits) -> None:
    """Refuse ``turns="agnostic"`` where what is kept depends on the question.

    Raises
    ------
    ValueError
        With the built-in selectors that fit.
    """
    if config.turns != AGNOSTIC:
        return
    if _by_rank(config, traits):
        raise ValueError(
            "turns='agnostic' keeps what does not depend on the question, and without keep the rank of the question's "
            "attention decides how much that is: set keep."
        )
    if not (read := _read_of_question(adapter, traits)):
        return
    others = {name: SelectorTraits.of(make()) for name, make in SELECTORS.items()}
    fitting = [
        name
        for name, other in others.items()
        if not _read_of_question(adapter, other) and (adapter.vision.readable or not other.needs & VISION_NEEDS)
    ]
    raise ValueError(
        f"turns='agnostic' takes selectors that read nothing of the question, and {traits.name!r} reads "
        f"{', '.join(read)}. Choose one of {', '.join(fitting)}, or turns='refresh', which chooses anew for every "
        "question."
    )


def _read_of_question(adapter: ModelAdapter, traits: SelectorTraits) -> list[str]:
    """What a selector reads that depends on the text behind the images."""
    read = sorted({"rater_attention", "last_attention", "text_features"} & traits.needs)
    if adapter.family.sees_whole_prompt and traits.placement != BEFORE_DECODER:
        read.append(f"states of decoder layers, where every token of a {adapter.name} sees the whole prompt")
    return read


def check_readable(
    adapter: ModelAdapter, config: SparseVLMConfig, traits: SelectorTraits, target_layers: tuple[int, ...]
) -> None:
    """Refuse target layers without attention where it has to be read.

    Raises
    ------
    ValueError
        With the layers that have attention.
    """
    asked = {"rater_attention", "last_attention", "prior_attention"} & traits.needs
    by_rank = _by_rank(config, traits)
    attentions = adapter.decoder.attentions
    without = [layer for layer in target_layers if layer >= 0 and attentions[layer] is None]
    if without and (asked or by_rank):
        reads = f"selector {traits.name!r} reads" if asked else "without keep the rank decides, by"
        found = [layer for layer, attention in enumerate(attentions[:-1]) if attention is not None]
        raise ValueError(
            f"target_layers {without} of a {adapter.name} are recurrent, and {reads} attention, which they have not. "
            f"Choose out of {found}, or a selector that reads none, such as 'span-features'."
        )


def check_weights(adapter: ModelAdapter, config: SparseVLMConfig) -> None:
    """Refuse float8 weights where the engine would not read them.

    Raises
    ------
    ValueError
        Where the engine is off by default.
    NotImplementedError
        For a GPU that does not read float8.
    """
    if config.weights != "fp8":
        return
    device = next(adapter.decoder.module.parameters()).device
    if config.engine is None and device.type != "cuda":
        raise ValueError(
            f"weights='fp8' is read by the engine, which runs by default on a CUDA device, and this {adapter.name} is "
            f"on {device}: move it to one first, or leave weights out. (engine=True runs it on a CPU, for tests.)"
        )
    check_float8(device)


def check_budget(adapter: ModelAdapter, config: SparseVLMConfig, target_layers: tuple[int, ...]) -> None:
    """Refuse, before anything runs, a budget that no image can meet on these layers.

    Raises
    ------
    ValueError
        With the feasible range.
    """
    if not isinstance(config.schedule, (str, type(None))) and len(config.schedule) != len(target_layers):
        raise ValueError(
            f"schedule has {len(config.schedule)} counts for {len(target_layers)} target layers {target_layers} "
            "(-1 is before the decoder)."
        )
    budgets = config.keep if isinstance(config.keep, tuple) else (config.keep,)
    dense = least_keep(target_layers, adapter.n_layers)
    for keep in budgets:
        fraction = keep
        if isinstance(keep, int) and config.n_vis:
            fraction = keep / config.n_vis
        if isinstance(fraction, float) and fraction < dense:
            raise ValueError(
                f"keep={keep} cannot hold on target layers {target_layers} of {adapter.n_layers}: layers "
                f"0..{target_layers[0]} see every visual token, so the average is at least {dense:.3f} (plus what "
                f"min_keep={config.min_keep} takes). Feasible: keep in ({dense:.3f}, 1.0]; or choose earlier layers."
            )
