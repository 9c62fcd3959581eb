"""Griffe extension: roles of Sphinx in docstrings become links of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|meth|class|data|attr|mod):`(~?)([^`]+)`")


class Roles(griffe.Extension):
    """Turns ``:func:`~package.name``` into ``name`` with a link, where the site has a place for it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda match: _link(obj, *match.groups()), obj.docstring.value)


def _link(obj: griffe.Object, is_short: str, name: str) -> str:
    shown = name.rpartition(".")[2] if is_short else name.lstrip(".")
    try:
        path = name if name.startswith("sparsevlm.") else obj.resolve(name)
    except griffe.NameResolutionError:
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
