"""Decoder stacks as data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

# Kinds of decoder layers, by transformers' names.
FULL, SLIDING, RECURRENT = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class LateFeatures:
    """Visual features that the decoder adds to the output of its first layers, as by DeepStack.

    Attributes
    ----------
    mask : str
        Argument of the decoder that tells visual tokens, (batch, q_len) bool.
    features : str
        Argument of the decoder with a tensor (n_visual, hidden_size) for each of these layers, beginning with the
        first; rows are those of the mask, one sample behind the other.
    output : str
        Attribute of what ``get_image_features`` gives that holds the same, by layer and image.
    n_layers : int
        How many of the first layers get such.
    """

    mask: str
    features: str
    output: str
    n_layers: int

    def come_behind(self, layer: int, arguments: Mapping[str, Any]) -> bool:
        """Tells whether the output of any layer behind a given one gets such, by the decoder's arguments."""
        return len(arguments.get(self.features) or ()) > layer + 1


@dataclass(frozen=True)
class BlockModules:
    """Modules of one decoder layer by role.

    Attributes
    ----------
    attention, mlp : nn.Module
        Whole parts.
    attention_norm, mlp_norm : nn.Module
        RMS norms before them, with ``weight`` and ``variance_epsilon``.
    query, key, value, output, gate, up, down : nn.Linear
    activation : nn.Module
    head_dim : int
    scaling : float
    query_norm, key_norm : nn.Module or None
        RMS norms of every head before it is rotated.
    """

    attention: Any
    mlp: Any
    attention_norm: Any
    mlp_norm: Any
    query: Any
    key: Any
    value: Any
    output: Any
    gate: Any
    up: Any
    down: Any
    activation: Any
    head_dim: int
    scaling: float
    query_norm: Any = None
    key_norm: Any = None


@dataclass(frozen=True)
class DecoderBlock:
    """A decoder layer that the engine can run: paths of its modules by role.

    Stands for ``h += output(attention(norm(h)))``, then ``h += down(activation(gate(norm(h))) · up(norm(h)))``, with
    RMS norms, rotary positions over whole heads in halves and, where they are named, RMS norms of queries and keys by
    head before these are rotated. A family describes a layer where that is all it does, see :mod:`~.blocks`.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    query_norm: str | None = None
    key_norm: str | None = None

    def modules_of(self, layer: nn.Module) -> BlockModules:
        """The modules of a layer."""
        found = {name: attrgetter(path)(layer) for name, path in vars(self).items() if path is not None}
        attention = found["attention"]
        return BlockModules(**found, head_dim=attention.head_dim, scaling=attention.scaling)


@dataclass(frozen=True)
class Decoder:
    """The decoder stack of a model.

    Attributes
    ----------
    module : nn.Module
        Called with ``inputs_embeds``.
    layers : nn.ModuleList
        Each called as ``layer(hidden_states, attention_mask=, position_embeddings=, …)``.
    attentions : tuple of nn.Module or None
        Attention module of each layer, which looks its function up under ``self.config._attn_implementation``;
        ``None``: the layer is recurrent.
    embed, norm, rotary, head : nn.Module
        Token embeddings, last norm, rotary embeddings and language-model head.
    n_position_axes : int
        Axes of its rotary positions: 3 for M-RoPE.
    block : DecoderBlock or None
        What the engine has to know of a layer; ``None``: the family runs on hooks only.
    undescribed : str
        Why ``block`` is ``None``, where more is known than that nobody has described the layers.
    late_features : LateFeatures or None
        ``None``: visual features are all in the embeddings.
    experts_per_token : int
        Of a layer whose MLP is made of experts, how many of them compute a token; 0: no layer is.
    state_size : int
        Numbers in the state that a recurrent layer carries from token to token.
    per_token : tuple of int
        Positional arguments of a layer, besides the hidden states at 0, that hold something for each token,
        (batch, q_len, …) or ``None``.
    most_positions : int or None
        Up to so many positions the rotary tables are those of the position alone; ``None``: always.
    n_shared : int
        Layers at the end that have no keys and values of their own: they attend to those of the last layer before them
        of the same kind.
    """

    module: Any
    layers: Any
    attentions: tuple[Any, ...]
    embed: Any
    norm: Any
    rotary: Any
    head: Any
    n_position_axes: int = 1
    block: DecoderBlock | None = None
    undescribed: str = ""
    late_features: LateFeatures | None = None
    experts_per_token: int = 0
    state_size: int = 0
    per_token: tuple[int, ...] = ()
    most_positions: int | None = None
    n_shared: int = 0

    @functools.cached_property
    def layer_types(self) -> tuple[str, ...]:
        """Kind of each layer, by transformers' names."""
        config = self.module.config
        found = getattr(config, "layer_types", None)
        if found is None:
            found = [SLIDING if getattr(config, "sliding_window", None) else FULL] * len(self.layers)
        return tuple(found)

    @functools.cached_property
    def sliding_layers(self) -> frozenset[int]:
        """Layers with a sliding window."""
        return frozenset(i for i, kind in enumerate(self.layer_types) if kind == SLIDING)

    @property
    def first_shared(self) -> int:
        """The first layer without keys and values of its own; the number of layers where all have."""
        return len(self.layers) - self.n_shared

    @functools.cached_property
    def key_layers(self) -> tuple[int, ...]:
        """Layer whose keys and values each layer attends to."""
        types, first = self.layer_types, self.first_shared
        last_of_kind = {types[i]: i for i in range(first)}
        return (*range(first), *(last_of_kind[kind] for kind in types[first:]))

    @functools.cached_property
    def last_target(self) -> int:
        """The last layer whose output can be pruned: layers behind it compute tokens, and share no keys of dropped
        ones."""
        return min((len(self.layers) - 1, *self.key_layers[self.first_shared :])) - 1

    @property
    def default_targets(self) -> tuple[int, ...]:
        """Target layers where none are named: those with full attention if others have not, or every 4th from 2."""
        end, types = self.last_target + 1, self.layer_types
        full = tuple(i for i in range(end) if types[i] == FULL)
        return tuple(range(2, end, 4)) if len(full) in (0, end) else full

    @property
    def n_late(self) -> int:
        """How many of the first layers get visual features added."""
        return 0 if self.late_features is None else self.late_features.n_layers

    @classmethod
    def of_llama(cls, module: Any, head: Any, n_position_axes: int = 1) -> Decoder:
        """A decoder whose parts have the names that they have in transformers' Llama, as in most of its models."""
        attentions = tuple(getattr(layer, "self_attn", None) for layer in module.layers)
        parts = (module.embed_tokens, module.norm, module.rotary_emb, head)
        return cls(module, module.layers, attentions, *parts, n_position_axes)
