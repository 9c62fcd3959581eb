"""Packed batches without an end, drawn by processes beside the run."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from sparsevlm.material import FAMILIES, TRAINING, Example, check_packages, draw
from training.data_parallel import DataParallel
from training.drawn.conversations import Conversation, encode
from training.drawn.packing import Limits, Packed, Packer, empty
from training.drawn.reading import READING, draw_reading
from training.drawn.vocabulary import any_words
from training.drawn.written import letters_shown, pieces_shown, recorded
from training.groups import first_seed, parse_counts

_PASSED_OVER = 4  # conversations that do not fit before a batch is closed
_BATCHES_AHEAD = 3  # by each process
_KNOWN = 0.2  # of the tasks show the words that their lists have
_PIECES = 150  # of text on a picture that its visual tokens are asked for


@dataclass(frozen=True)
class Mix:
    """How often each family is drawn.

    Attributes
    ----------
    shares : dict of str to int
        By family; of a family each task is as likely.
    photographs : bool
        Whether tasks are drawn that need them.
    """

    shares: dict[str, int]
    photographs: bool = True

    def __post_init__(self) -> None:
        for name in self.families:
            if name != READING:
                check_packages(name, self.tasks(name), TRAINING)

    @property
    def families(self) -> list[str]:
        """In the order of their indices."""
        return list(self.shares)

    def tasks(self, family: str) -> tuple[str, ...]:
        """Those that are drawn."""
        known = FAMILIES[family]
        return tuple(task for task in known.tasks if self.photographs or task not in known.photographic)


def parse_drawn(text: str, photographs: bool = True) -> Mix:
    """A mix of a text like ``"documents:3,charts:2"``.

    Raises
    ------
    ValueError
        If a share is missing or a family unknown.
    """
    counts = parse_counts(text, (*FAMILIES, READING), "drawn must look like 'documents:3,reading:4'")
    return Mix(dict(counts), photographs)


class DrawnBatches(IterableDataset):
    """Batches of drawn conversations; of several processes each draws seeds of its own.

    Parameters
    ----------
    mix : Mix
    tokenizer : PreTrainedTokenizerFast
    limits : Limits
    words : sequence of str
        What pages to read are made of, and most other tasks show.
    questions : int
        About a picture, at most.
    seed : int
        Of the run.
    parallel : DataParallel, optional
        Which of several runs side by side this is; each draws seeds of its own.
    """

    def __init__(
        self,
        mix: Mix,
        tokenizer: PreTrainedTokenizerFast,
        limits: Limits,
        words: Sequence[str],
        questions: int,
        seed: int,
        parallel: DataParallel | None = None,
    ):
        self._mix, self._tokenizer, self._limits = mix, tokenizer, limits
        self._words, self._questions = list(words), questions
        self._first, self._parallel = first_seed(seed), parallel or DataParallel()

    @property
    def empty(self) -> Packed:
        """A batch without any conversation."""
        return empty(self._limits, len(self._mix.families))

    def __iter__(self) -> Iterator[Packed]:
        worker = get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        index, step = index + self._parallel.rank * step, step * self._parallel.world_size
        packer, waiting = Packer(self._limits, self._mix.families), []
        while True:
            one = self._conversation(self._first + index)
            index += step
            if packer.add(one):
                continue
            waiting.append(one)
            if len(waiting) == _PASSED_OVER:
                yield packer.pack()
                waiting = [one for one in waiting if not packer.add(one)]

    def _conversation(self, seed: int) -> Conversation:
        with recorded() as lines:
            example = self._draw(seed)
        shown, letters = None, None
        if len(example.images) == 1:  # of several, which of them a line is on is not known
            size = example.images[0].size
            shown = pieces_shown(lines, size, self._tokenizer, _PIECES, random.Random(seed))
            letters = letters_shown(lines, size)
        return encode(example, self._tokenizer, self._limits.side, shown, letters)

    def _draw(self, seed: int) -> Example:
        rng = random.Random(seed)
        family = rng.choices(self._mix.families, list(self._mix.shares.values()))[0]
        if family == READING:
            return draw_reading(self._words, seed, self._questions)
        arguments = (family, rng.choice(self._mix.tasks(family)), seed, TRAINING, self._questions)
        if rng.random() < _KNOWN:
            return draw(*arguments)
        with any_words(rng, self._words):
            return draw(*arguments)


class _Shared(IterableDataset):
    """Batches in memory that a process shares with those it forks; what is iterated over are their places there.

    Pipes are several times slower; shared memory that tensors would travel through is small in many containers.
    """

    def __init__(self, batches: DrawnBatches, workers: int):
        self._batches = batches
        # One is being read while all others are drawn ahead.
        self._places = [[_shared(batches.empty) for _ in range(_BATCHES_AHEAD + 1)] for _ in range(workers)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        worker = get_worker_info().id
        for number, batch in enumerate(self._batches):
            index = number % len(self._places[worker])
            for there, here in zip(self._places[worker][index], batch, strict=True):
                there[...] = here
            yield worker, index

    def at(self, worker: int, index: int) -> Packed:
        """The batch at a place."""
        return self._places[worker][index]


def _shared(like: Packed) -> Packed:
    """Arrays of the same shapes in memory that is shared with forked processes."""
    return Packed(
        *(np.frombuffer(mmap.mmap(-1, array.nbytes), array.dtype).reshape(array.shape) for array in like),
    )


def stream(batches: DrawnBatches, workers: int) -> Iterator[Packed]:
    """What ``workers`` processes draw, or this one if there are none; a batch is valid until the next is taken."""
    if not workers:
        return iter(batches)
    shared = _Shared(batches, workers)
    loader = DataLoader(
        shared, batch_size=None, num_workers=workers, multiprocessing_context="fork", prefetch_factor=_BATCHES_AHEAD
    )
    return (shared.at(worker, index) for worker, index in iter(loader))
