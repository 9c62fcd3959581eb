"""Programs that begin a prompt: embeddings in the workspace, visual tokens in their places."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...models import ModelAdapter
from ...selection.raters import padded_embedding_raters
from ..cuda_graphs import GraphPool, LRUCache
from .layer import rotary_tables
from .workspace import PromptInputs, PromptShape, Workspace

_MOST_GRAPHS = 512


def embed_prompt(adapter: ModelAdapter, space: Workspace, shape: PromptShape, chooses_raters: bool) -> None:
    """Embed what a prompt brings, and take over what the prune steps have to know; waits for nothing.

    Parameters
    ----------
    adapter : ModelAdapter
    space : Workspace
        Its integers and features are those of the prompt.
    shape : PromptShape
    chooses_raters : bool
        Whether the raters are chosen once, from the embeddings.
    """
    rows, batch, given = shape.rows, shape.batch, PromptInputs.of(shape, space.n_axes, space.integers)
    embeds = adapter.decoder.embed(given.ids)
    features = space.features[given.feature_rows.clamp_min(0)]
    hidden = torch.where(given.feature_rows[:, None] >= 0, features, embeds)
    space.hidden[:rows] = hidden
    space.cos[:rows], space.sin[:rows] = rotary_tables(adapter.decoder, hidden, given.positions)
    space.cu_seqlens[: batch + 1] = given.cu_seqlens
    space.visual_rows[:batch, : shape.n_visual] = given.visual_rows
    space.alive[:batch, : shape.n_visual] = torch.arange(shape.n_visual, device=hidden.device)
    space.image_idx[:batch, : shape.n_visual] = given.image_idx
    space.feature_rows[:rows] = given.feature_rows
    if shape.has_coordinates:
        space.coordinates[:batch, :, : shape.n_visual] = given.coordinates
    space.min_keep_per_image[:batch] = given.min_keep_per_image
    space.counts[:, :batch], space.seeds[:, :batch] = given.counts, given.seeds
    space.n_visual[:batch], space.n_text[:batch] = given.n_visual, given.n_text
    space.text_rows[:batch, : shape.n_text] = given.text_rows
    space.stage.zero_()
    space.is_faulty.zero_()
    if chooses_raters:
        valid = torch.arange(shape.n_visual, device=hidden.device) < given.n_visual[:, None]
        is_text = torch.arange(shape.n_text, device=hidden.device) < given.n_text[:, None]
        visual, text = hidden[given.visual_rows], hidden[given.text_rows]
        space.is_rater[:batch, : shape.n_text] = padded_embedding_raters(visual, valid, text, is_text)


class PromptPrograms(LRUCache[tuple[PromptShape, bool], Callable[[], None]]):
    """Programs that embed prompts in one workspace.

    Parameters
    ----------
    adapter : ModelAdapter
    pool : GraphPool
    space : Workspace
    """

    def __init__(self, adapter: ModelAdapter, pool: GraphPool, space: Workspace) -> None:
        super().__init__(_MOST_GRAPHS)
        self._adapter, self._pool, self._space = adapter, pool, space

    def run(self, shape: PromptShape, chooses_raters: bool) -> None:
        """See :func:`embed_prompt`."""

        def run() -> None:
            embed_prompt(self._adapter, self._space, shape, chooses_raters)

        self.get((shape, chooses_raters), lambda: self._pool.record(run))()
