"""What the engine has made for a model as it is: joined weights, programs, and what tells when they are over."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from ..models import ModelAdapter
from .arena import Arenas
from .graphs import Recorder
from .programs import Programs
from .refusals import refuses_decoder, refuses_tower
from .vision import VisionPrograms
from .watch import Watch
from .weights import Weights

logger = logging.getLogger(__name__)


class Workshop:
    """Makes what the engine needs, and makes it anew where the model is not what it was.

    Parameters
    ----------
    adapter : ModelAdapter

    Attributes
    ----------
    decoder_unfit, tower_unfit : str or None
        Why the model's parts cannot run by programs.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._made = False
        self._glance = self._tower_watch = self._decoder_watch = Watch(())
        self.decoder_unfit: str | None = None
        self.tower_unfit: str | None = None

    def _make(self) -> None:
        adapter = self.adapter = self.adapter.refreshed()
        device = self.device = adapter.device
        self.decoder_unfit, self.tower_unfit = refuses_decoder(adapter), refuses_tower(adapter)
        self.weights, recorder = Weights(adapter), Recorder(device)
        if self.decoder_unfit is None:
            self.weights.join_decoder()
        if self.tower_unfit is None:
            self.weights.join_tower()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        shared = (adapter, self.weights, recorder)
        self.arenas, self.programs, self.vision = Arenas(*shared), Programs(*shared), VisionPrograms(*shared)
        self._decoder_watch = Watch(
            [adapter.model, adapter.base_model, adapter.decoder.head, *adapter.decoder.module.modules()]
        )
        self._tower_watch = Watch(adapter.vision.module.modules())
        # What changes with every conversion, in far less time.
        program, ends = adapter.vision.program, [adapter.vision.module]
        if program is not None:
            ends = [program.projection, *program.blocks[0].module.modules(), *program.blocks[-1].module.modules()]
        self._glance = Watch(ends)
        self._made = True

    def clear(self) -> None:
        """Free everything, and give every weight a place of its own again."""
        if self._made:
            for kept in (self.arenas, self.programs, self.vision):
                kept.clear()
            self.weights.separate()
        self._made = False

    def forget(self) -> None:
        """Give back the memory of all programs where it is wanting; the model's own modules take less."""
        logger.warning("out of memory: the engine forgets its programs, the model's own modules run.")
        self.clear()
        torch.cuda.empty_cache()

    def glance(self) -> None:
        """Be ready for the tower, as far as can be told in no time; :meth:`look` follows."""
        self._keep_up(self._glance)

    def look(self) -> bool:
        """Be ready for the model as it is.

        Returns
        -------
        bool
            Whether the tower was ready before, and nothing of others is hooked to it.
        """
        same = not (self._made and self._tower_watch.changed())
        if not same:
            self.clear()
        self._keep_up(self._decoder_watch)
        return same and self.tower_hooked() is None

    def tower_hooked(self) -> str | None:
        """What of others is hooked to the vision tower."""
        return self._tower_watch.hooked()

    def decoder_hooked(self) -> str | None:
        """What of others is hooked to the decoder."""
        return self._decoder_watch.hooked()

    def _keep_up(self, watch: Watch) -> None:
        if self._made and watch.changed():
            logger.info("the model's weights or modules were replaced: the engine makes its programs anew.")
            self.clear()
        if not self._made:
            self._make()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Where programs are made and run: on their device, and with tensors that live on outside of inference mode."""
        device = self.adapter.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(False), torch.no_grad(), on_device:
            yield
