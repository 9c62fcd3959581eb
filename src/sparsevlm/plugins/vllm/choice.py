"""The choice of the tokens of images that go on, by the library's selectors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...error_notes import with_notes
from ...request.step import no_autocast
from ...selection.context import SelectionContext
from ...selection.decide import decide
from ...selection.image_floor import evenly_spaced
from ...selection.recycle import merge_hidden_states
from .options import Options

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Tokens of an image, or of a frame that stands apart in the prompt.

    Attributes
    ----------
    rows : Tensor of shape (n_visual, width)
        Their features, of which the first ``hidden_size`` are the decoder's input.
    coordinates : Tensor of shape (3, n_visual), int64
        Time, row and column from where the image begins.
    n_keep : int
    text : Tensor of shape (n_text, hidden_size), optional
        Embeddings of the prompt's text, where the selector reads it.
    """

    rows: Tensor
    coordinates: Tensor
    n_keep: int
    text: Tensor | None = None


def choose(runs: Sequence[Run], options: Options, hidden_size: int) -> list[tuple[Tensor, Tensor]]:
    """Rows that go on of each run, and their coordinates.

    A run whose states a selector refuses, such as those with NaN, goes on in even steps, and that is logged: the engine
    serves other requests as well.

    Parameters
    ----------
    runs : sequence of Run
    options : Options
        Of all of them.
    hidden_size : int

    Returns
    -------
    list of (Tensor of shape (n_keep, width), Tensor of shape (3, n_keep))
    """
    chosen: dict[int, tuple[Tensor, Tensor]] = {}
    asked = [i for i, run in enumerate(runs) if run.n_keep < run.rows.shape[0]]
    for i in set(range(len(runs))) - set(asked):
        chosen[i] = runs[i].rows, runs[i].coordinates
    if asked:
        try:
            found = _decide([runs[i] for i in asked], options, hidden_size)
        except ValueError as error:
            if len(asked) > 1:  # find out whose fault it is
                found = [choose([runs[i]], options, hidden_size)[0] for i in asked]
            else:
                logger.error("sparsevlm: even steps in the place of %s: %s", options.selector, with_notes(error))
                found = [_in_even_steps(runs[asked[0]])]
        chosen |= dict(zip(asked, found, strict=True))
    return [chosen[i] for i in range(len(runs))]


def _decide(runs: Sequence[Run], options: Options, hidden_size: int) -> list[tuple[Tensor, Tensor]]:
    selector, traits = options.chooser
    # The floor is in n_keep already, which is that of a whole video where a run is one of its frames.
    config = options.config.replace(min_keep=1, min_keep_per_image=0, selector=selector)
    contexts = []
    for run in runs:
        states = run.rows[:, :hidden_size]
        indices = torch.arange(states.shape[0], device=states.device)
        contexts.append(
            SelectionContext(
                layer=-1,
                sample=0,  # an image is chosen from alike wherever it comes, as its features may be kept
                config=config,
                hidden_states=states,
                coordinates=run.coordinates.to(states.device),
                indices=indices,
                features=states if "features" in traits.needs else None,
                text_features=run.text,
                image_idx=torch.zeros_like(indices),
            )
        )
    with no_autocast(runs[0].rows.device):
        decisions = decide(contexts, selector, traits, [run.n_keep for run in runs])
    found = []
    for run, decision in zip(runs, decisions, strict=True):
        selection = decision.selection
        assert selection is not None  # fewer were asked for than there are
        rows = run.rows[selection.keep_idx]
        if selection.merge_target is not None and selection.weight is not None:
            rows = merge_hidden_states(run.rows, selection.keep_idx, selection.merge_target, selection.weight)
        found.append((rows, run.coordinates[:, selection.keep_idx.to(run.coordinates.device)]))
    return found


def _in_even_steps(run: Run) -> tuple[Tensor, Tensor]:
    place = torch.arange(run.rows.shape[0])
    kept = evenly_spaced(place, place.new_tensor(place.shape[0]), place.new_tensor(run.n_keep)).nonzero().squeeze(-1)
    return run.rows[kept.to(run.rows.device)], run.coordinates[:, kept.to(run.coordinates.device)]


def grouped(options: Sequence[Options]) -> list[list[int]]:
    """Places of images by what is asked for, the text left out: a selector can answer those of one group at once."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(options):
        groups.setdefault(one.with_text(()).key(), []).append(i)
    return list(groups.values())
