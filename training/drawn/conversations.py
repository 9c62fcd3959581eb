"""A drawn example as numbers: patches of its pictures, tokens of its chat, and which of them are answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerFast

from sparsevlm.material import Example
from training.drawn.written import CELLS, UNKNOWN
from training.forward import mrope_positions
from training.groups import TOKEN
from training.pixels import MERGE, PATCH

Numbers = NDArray[Any]
_IMAGE = "<|image_pad|>"
_END = "<|im_end|>"


@dataclass(frozen=True)
class Conversation:
    """Chat about pictures.

    Attributes
    ----------
    family : str
        What it counts as.
    patches : numpy.ndarray
        uint8 of shape (patches, 3 * 14 * 14), one temporal slice, in the order of the tower's windows.
    grids : tuple of tuple of int
        Rows and columns of visual tokens, by picture.
    ids : numpy.ndarray
        int64 of shape (length,), with the image token once for each visual token.
    is_visual : numpy.ndarray
        bool of shape (length,).
    positions : numpy.ndarray
        int64 of shape (3, length), M-RoPE.
    answers : tuple of tuple of int
        First token of each answer and the one behind its last, which is <|im_end|>.
    shown : numpy.ndarray
        int64 of shape (pieces, 2): raster index of a visual token of the first picture, and id of a piece of text that
        it shows.
    letters : numpy.ndarray
        uint8 of shape (visual tokens, cells) in raster order, picture by picture: letters that each shows, see
        :func:`~training.drawn.written.letters_shown`.
    """

    family: str
    patches: Numbers
    grids: tuple[tuple[int, int], ...]
    ids: Numbers
    is_visual: Numbers
    positions: Numbers
    answers: tuple[tuple[int, int], ...]
    shown: Numbers
    letters: Numbers


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerFast,
    side: int,
    shown: Numbers | None = None,
    letters: Numbers | None = None,
) -> Conversation:
    """Turn an example into numbers.

    Parameters
    ----------
    example : Example
        With pictures whose sides are multiples of 28 pixels.
    tokenizer : PreTrainedTokenizerFast
        With the tokens of Qwen's images and a chat template.
    side : int
        Visual tokens along a window of the tower.
    shown, letters : numpy.ndarray, optional
        As in :class:`Conversation`; none, and unknown, if left out.

    Raises
    ------
    ValueError
        If a picture has another size.
    """
    grids = tuple(_grid(image) for image in example.images)
    pieces, answers, n_ids = [], [], 0
    for piece, is_answer in _pieces(example, tokenizer):
        ids = list(tokenizer(piece, add_special_tokens=False).input_ids)
        if is_answer:
            answers.append((n_ids, n_ids + len(ids)))
        pieces.append(ids)
        n_ids += len(ids)
    image_id = tokenizer.convert_tokens_to_ids(_IMAGE)
    # Pictures stand in the first piece, so that answers move by all of their tokens.
    moved = sum(rows * cols - 1 for rows, cols in grids)
    ids, parts = _with_pictures([token for piece in pieces for token in piece], image_id, grids)
    return Conversation(
        example.family,
        np.concatenate([patches_of(image, side) for image in example.images]),
        grids,
        np.array(ids, np.int64),
        np.array(ids) == image_id,
        mrope_positions(parts).numpy(),
        tuple((first + moved, stop + moved) for first, stop in answers),
        np.zeros((0, 2), np.int64) if shown is None else shown,
        np.full((moved + len(grids), CELLS), UNKNOWN, np.uint8) if letters is None else letters,
    )


def _pieces(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool]]:
    """The chat's text in pieces, and whether each is an answer with its end."""
    messages: list[dict[str, Any]] = []
    pieces, before = [], ""
    for index, turn in enumerate(example.turns):
        pictures = [{"type": "image"} for _ in example.images] if index == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
        asked = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if not asked.startswith(before):
            raise ValueError(f"the chat template tells a turn differently once it is answered: {before!r}, {asked!r}")
        answer = turn.answers[0]
        pieces += [(asked[len(before) :], False), (answer + _END, True)]
        before = asked + answer + _END
        messages.append({"role": "assistant", "content": answer})
    return pieces


def _with_pictures(
    ids: Sequence[int], image_id: int, grids: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int | tuple[int, int]]]:
    """Tokens with as many for each picture as it has, and the parts that positions follow from."""
    found: list[int] = []
    parts: list[int | tuple[int, int]] = []
    pictures, n_text = iter(grids), 0
    for token in ids:
        if token == image_id:
            rows, cols = next(pictures)
            parts += [n_text, (rows, cols)]
            found += [image_id] * (rows * cols)
            n_text = 0
        else:
            found.append(token)
            n_text += 1
    return found, [*parts, n_text]


def _grid(image: Image.Image) -> tuple[int, int]:
    if image.width % TOKEN or image.height % TOKEN:
        raise ValueError(f"sides of a picture must be multiples of {TOKEN} pixels, got {image.width}x{image.height}")
    return image.height // TOKEN, image.width // TOKEN


def patches_of(image: Image.Image, side: int) -> Numbers:
    """uint8 patches of a picture in the order of windows, (patches, 3 * 14 * 14)."""
    rows, cols = _grid(image)
    pixels = np.asarray(image.convert("RGB")).reshape(rows, MERGE, PATCH, cols, MERGE, PATCH, 3)
    blocks = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * cols, -1)
    return blocks[windows_of(rows, cols, side).order].reshape(rows * cols * MERGE**2, -1)


@dataclass(frozen=True)
class Windows:
    """A picture's tokens by the tower's windows.

    Attributes
    ----------
    order : numpy.ndarray
        int64 of shape (tokens,): raster index of each token in the order of windows.
    sizes : numpy.ndarray
        Tokens of each window; at the right and the lower edge some are smaller.
    places : numpy.ndarray
        int64 of shape (patches, 2): row and column of each patch, in the order of windows.
    """

    order: Numbers
    sizes: Numbers
    places: Numbers


@lru_cache(maxsize=256)
def windows_of(rows: int, cols: int, side: int) -> Windows:
    """The windows of a picture of so many rows and columns of tokens."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    window = row // side * -(-cols // side) + col // side
    order = np.argsort(window, kind="stable")
    inner = np.stack(np.divmod(np.arange(MERGE**2), MERGE), axis=-1)
    places = np.stack([row, col], axis=-1)[order, None] * MERGE + inner
    return Windows(order, np.bincount(window), places.reshape(-1, 2))
