"""What the tables are made of: tasks, budgets, and the arguments of the plugin that each setting is run with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsevlm.config import PRESETS, SparseVLMConfig
from sparsevlm.evaluation.settings import DENSE, DOWNSAMPLE
from sparsevlm.selection.budget import layer_tokens, plan_budget, plan_schedule
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.selectors import DEFAULT, SELECTORS, make_selector

INPUTS, OUTPUTS = "inputs", "outputs"
PAPER = "sparsevlm-paper"
_STEP = 4  # between target layers
_FIRST_TARGETS = (2, 1, 0)  # the default, and earlier ones for budgets that it cannot hold

Keep = int | float | str


@dataclass(frozen=True)
class Table:
    """A table of the documents.

    Attributes
    ----------
    n_visual : int
        Visual tokens of an image.
    keeps : tuple of int, float or str
        Budgets: tokens, fractions, presets.
    counted : {"inputs", "outputs"}
        Where the tokens of a budget are averaged: over the inputs of the decoder's layers, or over their outputs.
    selectors, tasks : tuple of str
    """

    n_visual: int
    keeps: tuple[Keep, ...]
    counted: str
    selectors: tuple[str, ...]
    tasks: tuple[str, ...]


TABLES = {
    "spec": Table(
        256,
        (128, 96, 64),
        INPUTS,
        ("sparsevlm", DEFAULT, "random", DOWNSAMPLE),
        ("mme", "textvqa_val", "pope", "gqa", "docvqa_val", "chartqa"),
    ),
    "paper": Table(
        576,
        ("paper-192", "paper-128", "paper-64", 192, 128, 64),
        OUTPUTS,
        (PAPER, DEFAULT, "random", DOWNSAMPLE),
        ("mme", "pope", "gqa", "textvqa_val", "scienceqa_img", "mmbench_en_dev_static", "vizwiz_vqa_val"),
    ),
}
# Questions of the stock tasks, for estimates.
N_QUESTIONS = {
    **{"mme": 2374, "textvqa_val": 5000, "pope": 9000, "gqa": 12578, "docvqa_val": 5349, "chartqa": 2500},
    **{"scienceqa_img": 2017, "mmbench_en_dev_static": 4329, "vizwiz_vqa_val": 4319},
}
# Decoder layers of checkpoints that a plan can be made of before they are here.
N_LAYERS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 36,
    "Qwen/Qwen2.5-VL-7B-Instruct": 28,
    "llava-hf/llava-1.5-7b-hf": 32,
}


@dataclass(frozen=True)
class Planned:
    """What a budget comes to for an image of the table's size: tokens that leave each target layer, and averages.

    Attributes
    ----------
    counts : tuple of int
    at_inputs, at_outputs : float
    """

    counts: tuple[int, ...]
    at_inputs: float
    at_outputs: float


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    Attributes
    ----------
    selector : str
        A selector, ``"dense"`` or ``"downsample"``.
    keep : str
        The budget as the table names it; empty for dense.
    arguments : dict of str to str
        Of ``--model_args``, without those that all settings share.
    planned : Planned or None
        ``None`` where nothing is pruned.
    """

    selector: str
    keep: str
    arguments: dict[str, str]
    planned: Planned | None = None

    @property
    def name(self) -> str:
        """Fit for a file name."""
        return f"{self.selector}_{self.keep}" if self.keep else self.selector

    @property
    def arguments_text(self) -> str:
        """The arguments as lmms-eval takes them."""
        return ",".join(f"{name}={value}" for name, value in self.arguments.items())


def make_settings(
    selectors: Sequence[str], keeps: Sequence[Keep], counted: str, n_visual: int, n_layers: int
) -> list[Setting]:
    """Makes the lines of a table: dense, then every selector at every budget.

    A preset is of the paper's selectors alone; others leave it out.

    Parameters
    ----------
    selectors : sequence of str
    keeps : sequence of int, float or str
        Tokens, fractions or presets.
    counted : {"inputs", "outputs"}
        Where tokens are counted.
    n_visual, n_layers : int

    Raises
    ------
    ValueError
        If a budget cannot hold.
    """
    settings = [Setting(DENSE, "", {"keep": DENSE})]
    for selector in dict.fromkeys(selectors):
        if selector != DENSE:
            settings += _of_selector(selector, keeps, counted, n_visual, n_layers)
    if len(settings) == 1 and set(selectors) != {DENSE}:
        raise ValueError(f"--keep {','.join(map(str, keeps))} holds presets only, which are of sparsevlm alone.")
    return settings


def _of_selector(selector: str, keeps: Sequence[Keep], counted: str, n_visual: int, n_layers: int) -> Iterator[Setting]:
    for keep in dict.fromkeys(keeps):
        if selector == DOWNSAMPLE:
            if not isinstance(keep, str):
                yield Setting(selector, str(keep), {"selector": selector, "keep": str(keep)})
        elif isinstance(keep, str):
            if selector.startswith("sparsevlm"):
                arguments = {"selector": selector, "preset": keep}
                yield Setting(selector, keep, arguments, planned(arguments, n_visual, n_layers))
        else:
            arguments = _held(selector, keep, counted, n_visual, n_layers)
            yield Setting(selector, str(keep), arguments, planned(arguments, n_visual, n_layers))


def check_selectors(selectors: Sequence[str]) -> None:
    """Refuses selectors that do not exist.

    Raises
    ------
    ValueError
    """
    known = {*SELECTORS, DOWNSAMPLE, DENSE}
    if unknown := [name for name in selectors if name not in known]:
        raise ValueError(f"there is no selector {', '.join(unknown)}; there are {', '.join(sorted(known))}.")


def parse_keep(text: str) -> Keep:
    """Reads a budget: ``"64"`` tokens, ``"0.25"`` of them, or the name of a preset.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    if text in PRESETS:
        return text
    try:
        keep: int | float = float(text) if "." in text else int(text)
        SparseVLMConfig(keep=keep)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--keep must be tokens (64), fractions (0.25) or presets ({', '.join(PRESETS)}), got {text!r}."
        ) from error
    return keep


def _held(selector: str, keep: int | float, counted: str, n_visual: int, n_layers: int) -> dict[str, str]:
    """Arguments of a budget, with target layers that are as late as can hold it."""
    wanted = keep if isinstance(keep, int) else keep * n_visual
    for first in _FIRST_TARGETS:
        arguments = {"selector": selector, "keep": str(keep)}
        if first != _FIRST_TARGETS[0]:
            arguments["target_layers"] = ";".join(map(str, range(first, n_layers - 1, _STEP)))
        if counted == OUTPUTS:
            if (found := _at_outputs(arguments, wanted, n_visual, n_layers)) is not None:
                return found
        elif _holds(arguments, n_visual, n_layers):
            return arguments
    raise ValueError(
        f"--keep {keep} of {n_visual} visual tokens, averaged over the {counted} of {n_layers} layers, is less than "
        f"{selector} can hold with any target layers. Choose a larger one."
    )


def _at_outputs(arguments: dict[str, str], wanted: float, n_visual: int, n_layers: int) -> dict[str, str] | None:
    """The same with the number of tokens whose average over the outputs is next to what is wanted, or ``None``.

    The inputs hold more than the outputs, by the tokens that are gone behind the first target layer.
    """
    nearest, distance = None, 1.0
    for keep in range(round(wanted), n_visual + 1):
        candidate = {**arguments, "keep": str(keep)}
        if _holds(candidate, n_visual, n_layers):
            beyond = planned(candidate, n_visual, n_layers).at_outputs - wanted
            if abs(beyond) <= distance:
                nearest, distance = candidate, abs(beyond)
            if beyond >= 0:
                break
    return nearest


def _holds(arguments: dict[str, str], n_visual: int, n_layers: int) -> bool:
    try:
        planned(arguments, n_visual, n_layers)
    except ValueError:
        return False
    return True


def planned(arguments: dict[str, str], n_visual: int, n_layers: int) -> Planned:
    """Plans a budget for an image of ``n_visual`` tokens by the library's own planner.

    Raises
    ------
    ValueError
        If it cannot hold.
    """
    config = _config(arguments)
    traits = SelectorTraits.of(make_selector(config))
    if traits.placement == BEFORE_DECODER:
        layers: Sequence[int] = (-1,)
    else:
        layers = config.target_layers or tuple(range(_FIRST_TARGETS[0], n_layers - 1, _STEP))
    if config.keep is None:
        assert isinstance(config.schedule, tuple)
        plan = plan_schedule(config.schedule, n_visual, len(layers), config.min_keep)
    else:
        assert not isinstance(config.keep, tuple)
        plan = plan_budget(config.keep, traits.default_schedule, n_visual, layers, n_layers, config.min_keep)
    if plan.clamped is not None:
        raise ValueError(plan.clamped)
    tokens = layer_tokens(n_visual, plan.counts, layers, n_layers)
    outputs = [*tokens[1:], plan.counts[-1]]
    return Planned(plan.counts, sum(tokens) / n_layers, sum(outputs) / n_layers)


def _config(arguments: dict[str, str]) -> SparseVLMConfig:
    """The configuration that the plugin makes of the arguments."""
    from sparsevlm.plugins.lmms_arguments import parse_arguments

    pruning = parse_arguments({"pretrained": "bundled", **arguments}).pruning
    assert pruning is not None
    return pruning
