"""Reads rotated queries and keys at a target layer, beside the attention that runs anyway."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_PROBE_NAME = "sparsevlm_probe"
Reader = Callable[[Tensor, Tensor, Any, float], None]


class AttentionProbe:
    """Lets one attention module tell its queries and keys, once.

    While armed, the module (not the shared configuration) names our function as its attention; the function hands
    the module its own configuration back, tells the reader, and calls the attention that is in force.
    """

    _armed: ClassVar[dict[nn.Module, AttentionProbe]] = {}

    def __init__(self, attention: Any, reader: Reader):
        self.attention = attention
        self.reader = reader
        self._config = attention.config
        AttentionInterface.register(_PROBE_NAME, _probed_attention)
        config = copy.copy(self._config)
        config._attn_implementation_internal = _PROBE_NAME
        attention.config = config
        self._armed[attention] = self

    def disarm(self) -> None:
        """Give the module its configuration back; harmless when done already."""
        if self._armed.get(self.attention) is self:
            del self._armed[self.attention]
            self.attention.config = self._config


def _probed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    probe = AttentionProbe._armed[module]
    probe.disarm()
    probe.reader(query, key, attention_mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    return attention(module, query, key, value, attention_mask, **kwargs)
