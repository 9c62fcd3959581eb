"""Model runner: fused weights and programs of a model, and the check that they still fit it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelAdapter
from .call import Positions
from .cuda_graphs import GraphPool, LRUCache
from .fused_weights import FusedWeights
from .support import unsupported_classes, unsupported_decoder, unsupported_tower
from .text.decode_graph import DecodeGraphs
from .text.prefill import Prefill
from .vision.captured import CapturedTower
from .vision.image_cache import ImageCache
from .vision.program import VisionOutput, VisionPrograms
from .vision.tables import Grids

logger = logging.getLogger(__name__)

_MOST_POSITIONS = 16
# Numbers of modules that programs have read.
_READ_ONCE = ("scaling", "attention_scaling", "variance_epsilon", "eps", "window_size", "scale", "scale_factor")
_LEFT_BEHIND = "transformers.utils.output_capturing"
_HOOKS, _PRE_HOOKS = operator.itemgetter("_forward_hooks"), operator.itemgetter("_forward_pre_hooks")


class ModelFingerprint:
    """Looks at modules again and again.

    Parameters
    ----------
    modules : iterable of nn.Module
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._own = [vars(module) for module in self._modules]
        self._dicts = [own[name] for own in self._own for name in ("_parameters", "_modules") if own[name]]
        self._dicts = [kept for kept in self._dicts if isinstance(kept, dict)]  # others fetch weights from elsewhere
        self._things = self._look()
        self._classes = list(map(type, self._modules))
        named = ((own, tuple(filter(own.__contains__, _READ_ONCE))) for own in self._own)
        self._readers = [(operator.itemgetter(*names), own) for own, names in named if names]
        self._numbers = self._read()
        self._weights = [thing for thing in self._things if isinstance(thing, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._weights))

    def _look(self) -> list[Any]:
        return list(itertools.chain.from_iterable(map(dict.values, self._dicts)))

    def _read(self) -> list[Any]:
        return [reader(own) for reader, own in self._readers]

    def changed(self) -> bool:
        """Tells whether weights lie elsewhere (another device or dtype, other tensors), modules were replaced, or
        numbers that programs have read are others.

        Weights that changed where they lie need no notice: programs read them there.
        """
        things = self._look()
        same = len(things) == len(self._things) and all(map(operator.is_, things, self._things))
        if not same or list(map(type, self._modules)) != self._classes or self._read() != self._numbers:
            return True
        return list(map(Tensor.data_ptr, self._weights)) != self._addresses

    def foreign_hook(self) -> str | None:
        """A module that wants to be called: something of others is hooked to it, or its ``forward`` was replaced."""
        has_own = map(operator.contains, self._own, itertools.repeat("forward"))
        flags = (map(_HOOKS, self._own), map(_PRE_HOOKS, self._own), has_own)
        # Of hundreds of modules nearly none is flagged.
        for module in itertools.chain.from_iterable(itertools.compress(self._modules, of_all) for of_all in flags):
            own = vars(module)
            if "forward" in own or not all(map(is_idle, (*_HOOKS(own).values(), *_PRE_HOOKS(own).values()))):
                return f"something is hooked to {type(module).__name__}, which the engine does not call"
        return None


def is_idle(hook: Any) -> bool:
    """Tells whether a hook is ours, or one that transformers leaves behind once layers' outputs were asked for."""
    owner = getattr(hook, "__self__", hook)
    return hasattr(owner, "is_sparsevlm_hook") or str(getattr(hook, "__module__", "")) == _LEFT_BEHIND


class ModelRunner:
    """Makes what the engine needs, and makes it anew where the model is not what it was.

    Parameters
    ----------
    adapter : ModelAdapter

    Attributes
    ----------
    decoder_unsupported, tower_unsupported : str or None
        Why the model's parts cannot run by programs.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._made = False
        self.images: ImageCache | None = None
        self.positions: LRUCache[Hashable, Positions] = LRUCache(_MOST_POSITIONS)
        self.weights: FusedWeights | None = None
        self._quick_fingerprint = self._tower_fingerprint = self._decoder_fingerprint = ModelFingerprint(())
        self.decoder_unsupported: str | None = None
        self.tower_unsupported: str | None = None

    def _make(self) -> None:
        adapter = self.adapter = self.adapter.refreshed()
        device = self.device = adapter.decoder.embed.weight.device
        self.decoder_unsupported, self.tower_unsupported = unsupported_decoder(adapter), unsupported_tower(adapter)
        weights, pool = FusedWeights(adapter), GraphPool(device)
        self._pool = pool
        self.weights = weights  # from now on to be unfused, even if memory ends or the user does
        if self.decoder_unsupported is None:
            weights.fuse_decoder()
        if self.tower_unsupported is None:
            weights.fuse_tower()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        shared = (adapter, weights, pool)
        self.decode_graphs, self.vision = DecodeGraphs(*shared), VisionPrograms(*shared)
        self.prefill, self.captured = Prefill(*shared, self.decode_graphs), CapturedTower(adapter, pool)
        self._decoder_fingerprint = ModelFingerprint(
            [adapter.model, adapter.base_model, adapter.decoder.head, *adapter.decoder.module.modules()]
        )
        parts = [adapter.vision.module, *(part.module for part in adapter.vision.captured)]
        of_tower = dict.fromkeys(module for part in parts for module in part.modules())
        self._tower_fingerprint = ModelFingerprint(of_tower)
        self._classes = {type(adapter.base_model), type(adapter.vision.module), type(adapter.decoder.layers[0])}
        for block in weights.blocks[:1]:
            self._classes |= {type(block.attention), type(block.mlp), type(block.attention_norm)}
        if adapter.vision.program is not None:
            self._classes.add(type(adapter.vision.program.blocks[0].module))
        # What changes with every conversion, in far less time.
        program, ends = adapter.vision.program, [adapter.vision.module]
        if program is not None:
            ends = [program.projection, *program.blocks[0].module.modules(), *program.blocks[-1].module.modules()]
        self._quick_fingerprint = ModelFingerprint(ends)
        self._made = True

    def _forget_programs(self) -> None:
        if self._made:
            for kept in (self.prefill, self.vision, self.captured):
                kept.clear()
            self._pool.clear()
        self.images = None
        self._made = False

    def encode(
        self,
        patches: Tensor,
        grids: Grids,
        numbers: tuple[int, ...] | None = None,
        cache_bytes: int = 0,
        needs: frozenset[str] = frozenset(),
    ) -> VisionOutput:
        """Encode images, or some of their visual tokens, see :class:`VisionPrograms`; whole ones that were encoded
        before, and of which nothing is read, are taken from a cache of ``cache_bytes``."""
        if not cache_bytes or numbers is not None or needs:
            return self.vision(patches, grids, numbers, needs)
        if self.images is None:
            self.images = ImageCache(self.adapter.vision.module)
        patches = patches.to(next(self.adapter.vision.module.parameters()).device)
        return self.images.encode(self.vision, patches, grids, self.adapter.vision.patches_per_token, cache_bytes)

    def clear(self) -> None:
        """Free everything, and give every weight a place of its own again."""
        self._forget_programs()
        if self.weights is not None:
            self.weights.unfuse()
        self.weights = None

    def release_memory(self) -> None:
        """Give back the memory of all programs where it is wanting; the model's own modules take less."""
        logger.warning("sparsevlm: out of memory: the engine forgets its programs, the model's own modules run.")
        self._forget_programs()
        torch.cuda.empty_cache()  # weights that get a place of their own need room
        self.clear()
        torch.cuda.empty_cache()

    def quick_check(self) -> None:
        """Be ready for the tower, as far as can be told in no time; :meth:`look` follows."""
        self._keep_up(self._quick_fingerprint)

    def look(self) -> bool:
        """Be ready for the model as it is.

        Returns
        -------
        bool
            Whether the tower was ready before, and nothing of others is hooked to it.
        """
        same = not (self._made and self._tower_fingerprint.changed())
        if not same:
            self.clear()
        self._keep_up(self._decoder_fingerprint)
        return same and self.foreign_tower_hook() is None

    def unsupported(self) -> str | None:
        """Why the decoder cannot run by programs."""
        return (
            self.decoder_unsupported or unsupported_classes(self._classes) or self._decoder_fingerprint.foreign_hook()
        )

    def foreign_tower_hook(self) -> str | None:
        """Hooks of others on the vision tower, and on what of the model around it is recorded with it."""
        return self._tower_fingerprint.foreign_hook()

    def _keep_up(self, watch: ModelFingerprint) -> None:
        if self._made and watch.changed():
            logger.info("the model's weights or modules were replaced: the engine makes its programs anew.")
            self.clear()
        if not self._made:
            self._make()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Context of programs: on their device, with tensors that live on outside of inference mode.

        Ctrl-C inside forgets them all, as it may have come while one was made.
        """
        device = self.adapter.decoder.embed.weight.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(False), torch.no_grad(), on_device:
            try:
                yield
            except KeyboardInterrupt:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                self.clear()
                raise
