"""Reads rotated queries and keys of an attention module, beside the attention that runs anyway."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..request.step import no_autocast
from ..request.tensor_parallel import all_heads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Modules of a vision tower call their attention otherwise where its name tells of flash attention: so does ours then.
_PROBE_NAME, _FLASH_PROBE_NAME = "sparsevlm_probe", "sparsevlm_probe_flash"


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of an attention function.

    Attributes
    ----------
    query : Tensor of shape (batch, heads, q_len, head_dim)
        Rotated.
    key : Tensor of shape (batch, num_kv_heads, kv_len, head_dim)
        Rotated.
    mask : None or Tensor
        Of the layout that the attention in force takes.
    scaling : float
    softcap : float, optional
        Scores are capped to ``softcap · tanh(score / softcap)`` before the mask.
    cu_seqlens : Tensor of shape (n_sequences + 1,), int32, optional
        Where the sequences begin that are packed into one row.
    """

    query: Tensor
    key: Tensor
    mask: Any
    scaling: float
    softcap: float | None = None
    cu_seqlens: Tensor | None = None


Reader = Callable[[AttentionInputs], None]


class RenamedAttention:
    """A configuration under which a module calls another attention; everything else of it is the configuration's.

    Copies and pickles are those of the configuration: a model that is copied in the middle of a call, or after Ctrl-C
    has ended one, gives a whole model.

    Parameters
    ----------
    config : PreTrainedConfig
    name : str
        As the attention is registered.
    """

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._attn_implementation = self._attn_implementation_internal = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._config, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._config,)


def _itself(config: Any) -> Any:
    return config


class AttentionProbe:
    """Lets one attention module tell its queries and keys while it runs, until disarmed.

    While armed, the module (not the shared configuration) names our function as its attention. A module looks its
    function up once per run and may call it several times (a vision block: once per image), so the first call gives
    the configuration back; every call tells the reader, and calls the attention that is in force.

    Parameters
    ----------
    attention : nn.Module
    reader : callable
        Is told the queries and keys of all heads.
    tp_group : ProcessGroup, optional
        Ranks over which the model is tensor-parallel, each with a share of the heads.
    """

    _armed: ClassVar[dict[nn.Module, AttentionProbe]] = {}

    def __init__(self, attention: Any, reader: Reader, tp_group: ProcessGroup | None = None):
        if (left_over := self._armed.get(attention)) is not None:  # of a pass that was interrupted
            left_over.disarm()
        self.attention = attention
        self.reader = reader
        self.tp_group = tp_group
        self._config = attention.config
        name = _FLASH_PROBE_NAME if "flash" in (self._config._attn_implementation or "") else _PROBE_NAME
        AttentionInterface.register(name, _probed_attention)
        attention.config = RenamedAttention(self._config, name)
        self._armed[attention] = self

    def give_config_back(self) -> None:
        """Give the module its own configuration back."""
        self.attention.config = self._config

    def of_all_ranks(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of all heads, where other ranks have computed some.

        Raises
        ------
        NotImplementedError
            If ranks have unequal shares.
        """
        if self.tp_group is None:
            return query, key
        config, n_own, n_ranks = self._config, query.shape[1], self.tp_group.size()
        n_heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
        if n_own == n_heads:
            return query, key
        if n_own * n_ranks != n_heads:
            raise NotImplementedError(
                f"a {type(self.attention).__name__} of a tensor-parallel model has {n_own} heads on this rank, of "
                f"{n_heads} on {n_ranks} ranks: equal shares are supported. Load the model over as many ranks as "
                "divide its heads, or choose a selector that reads no attention, such as 'span-features'."
            )
        return all_heads(query, self.tp_group), all_heads(key, self.tp_group)

    def disarm(self) -> None:
        """End the reading; harmless when done already."""
        if self._armed.get(self.attention) is self:
            del self._armed[self.attention]
            self.give_config_back()


def _probed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    probe = AttentionProbe._armed[module]
    probe.give_config_back()
    scaling, softcap = kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap")
    if softcap is None and (cap := getattr(module.config, "attn_logit_softcapping", None)):
        raise NotImplementedError(
            f"a {type(module).__name__} caps its scores (attn_logit_softcapping={cap}) by itself, without a word to "
            "its attention function: what is read would not be its attention. Choose a selector that reads no "
            "attention of the text, such as 'span-features'."
        )
    if module.config._attn_implementation == "sdpa":  # which leaves the cap out
        softcap = None
    with no_autocast(query.device):
        read = probe.of_all_ranks(query, key)
        probe.reader(AttentionInputs(*read, attention_mask, scaling, softcap, kwargs.get("cu_seq_lens_q")))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    return attention(module, query, key, value, attention_mask, **kwargs)
