"""Text to replay and to measure perplexity on: documentation that is installed wherever the training runs.

The language reference in ``pydoc_data`` and documentation strings of Python's library (PSF licence) and of numpy
(BSD), some 600 000 tokens. Nothing of it is learnt (see :mod:`training.replay`), and none of it is stored.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

_MIN_CHARACTERS = 400
_HOLDOUT = 10  # one document in so many


def documents() -> list[str]:
    """All texts of some length, each once, in an order that depends on nothing but themselves."""
    library, of_numpy = Path(sysconfig.get_path("stdlib")), Path(np.__file__).parent
    found = {*topics.values(), *_strings_of(library.glob("*.py")), *_strings_of(of_numpy.glob("*/*.py"))}
    return sorted((text for text in found if len(text) >= _MIN_CHARACTERS), key=_order)


def text_windows(
    tokenizer: PreTrainedTokenizerFast, length: int, texts: Iterable[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of tokens to replay, and held-out ones.

    Every second document to replay is told as a chat whose question is its first paragraph.

    Returns
    -------
    tuple of torch.Tensor
        int64 of shape (windows, length); held-out documents are plain.
    """
    replayed: list[str] = []
    held_out: list[str] = []
    for index, text in enumerate(texts):
        if index % _HOLDOUT == 0:
            held_out.append(text)
        else:
            replayed.append(_as_chat(tokenizer, text) if index % 2 else text)
    return _windows(tokenizer, length, replayed), _windows(tokenizer, length, held_out)


def _windows(tokenizer: PreTrainedTokenizerFast, length: int, texts: list[str]) -> torch.Tensor:
    ids = [token for row in tokenizer(texts).input_ids for token in (*row, tokenizer.pad_token_id)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _as_chat(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    question, _, answer = text.partition("\n\n")
    roles = (("user", question), ("assistant", answer))
    chat: str = tokenizer.apply_chat_template(
        [{"role": role, "content": content.strip()} for role, content in roles], tokenize=False
    )
    return chat


def _strings_of(files: Iterable[Path]) -> Iterator[str]:
    """Documentation strings of modules, classes and functions."""
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
