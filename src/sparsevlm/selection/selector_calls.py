"""Calls of a selector: an error in one says which selector failed, where, and what it read without asking for it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..error_notes import add_note
from .context import NEEDS, SelectorTraits, legal_needs

C = TypeVar("C")
T = TypeVar("T")

_FIELDS_READ = "_fields_read"
# Modules that read all fields of a context to copy it.
_COPYING = ("dataclasses", f"{__package__}.context", f"{__package__}.padded")


def call_selector(selector: Any, layer: int, call: Callable[[Sequence[C]], T], contexts: Sequence[C]) -> T:
    """Answer of a selector.

    One that may have failed because a field was ``None`` is called once more, to find out which it reads.

    Parameters
    ----------
    selector : Selector
    layer : int
        Target layer; -1: before the decoder.
    call : callable
        Calls a method of the selector with contexts.
    contexts : sequence of SelectionContext or PaddedContext
        Empty for a method that is given none.

    Returns
    -------
    What ``call`` returns.

    Raises
    ------
    TypeError
        If the selector used ``None`` in the place of a value, and reads fields that its ``needs`` do not list.
    Exception
        Any other that the selector raises, with a note of its name, the layer and, of a failed assertion, fields that
        are ``None``.
    """
    try:
        return call(contexts)
    except Exception as error:
        traits = SelectorTraits.of(selector)
        where = f"at target layer {layer}" if layer >= 0 else "before the decoder (layer -1)"
        used_none = "NoneType" in str(error)
        absent = _absent_fields(call, contexts) if used_none or isinstance(error, AssertionError) else []
        unlisted = [name for name in absent if name not in traits.needs]
        if used_none and unlisted:
            legal, fields = legal_needs(traits.placement), ", ".join(unlisted)
            remedy = "add the name to needs" if len(unlisted) == 1 else "add the names to needs"
            if not set(unlisted) <= set(legal):
                remedy = "that does not exist there, read something else"
            raise TypeError(
                f"selector {traits.name!r} reads {fields} {where}, not listed in its needs and so None: {remedy}. "
                f"needs may list {', '.join(legal)}."
            ) from error
        nothing = f", which reads {', '.join(absent)}: None there" if absent else ""
        nothing += f" (needs does not list {', '.join(unlisted)})" if unlisted else ""
        add_note(error, f"in selector {traits.name!r} {where}{nothing}")
        raise


def _absent_fields(call: Callable[[Sequence[C]], Any], contexts: Sequence[C]) -> list[str]:
    """Fields out of :data:`~.context.NEEDS` that a selector reads and that are ``None``, in the order of reading."""
    read: list[str] = []
    with contextlib.suppress(Exception):
        call([_recording(context, read) for context in contexts])
    return list(dict.fromkeys(read))


def _recording(context: C, read: list[str]) -> C:
    """A copy of a context that appends to ``read`` which fields a selector reads that are ``None``."""

    def get(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if value is None and name in NEEDS and sys._getframe(1).f_globals.get("__name__") not in _COPYING:
            read.append(name)
        return value

    given: Any = context
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    kind: Any = type(type(given).__name__, (type(given),), {"__getattribute__": get, _FIELDS_READ: read})
    copy: C = kind(**fields)
    return copy


def recorded_alike(context: Any, made: C) -> C:
    """What was made of a context: where reading from that is recorded, reading from this is, too."""
    read = getattr(type(context), _FIELDS_READ, None)
    return made if read is None else _recording(made, read)
