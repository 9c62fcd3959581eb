"""The proof of a model that nobody has described: gathering all of its rows must change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelAdapter
from ..request.request import Request
from ..request.session import Session
from .pruning import ForwardPass

_KNOWN = {"attention_mask", "position_embeddings", "position_ids", "cache_position", "hidden_states"}
_OF_CACHE = ("cache", "past_key_values", "use_cache")


class Proof:
    """A run of the base model as it is, then one in which every layer is given gathered rows, tables and masks.

    Parameters
    ----------
    session : Session
    is_flash : bool
        Whether the decoder's attention takes 2D masks.
    """

    def __init__(self, session: Session, is_flash: bool) -> None:
        self._session, self._is_flash = session, is_flash
        self.forward: ForwardPass | None = None

    def run(self, module: nn.Module, inputs: Mapping[str, Any], shape: tuple[int, int], cache: Any) -> None:
        """Compare the two, for tokens of some shape (batch, q_len), without the cache, which has to be empty.

        Raises
        ------
        NotImplementedError
            With what was found, and what to do.
        """
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise NotImplementedError(
                "the first request under family='generic' has to prove the model, and brings a cache that is filled "
                "already. Begin with a prompt of its own."
            )
        arguments = {name: value for name, value in inputs.items() if name not in _OF_CACHE}
        with torch.no_grad():
            dense = self._states(module, arguments)
            per_token: set[str] = set()
            handles = [
                layer.register_forward_pre_hook(_Looks(per_token, shape[1]), with_kwargs=True)
                for layer in self._session.adapter.decoder.layers
            ]
            try:
                self.forward = _gathering_all(self._session, shape, self._is_flash)
                again = self._states(module, arguments)
            except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
                raise NotImplementedError(self._refusal(f"it raises {type(error).__name__}: {error}")) from error
            finally:
                self.forward = None
                for handle in handles:
                    handle.remove()
        if per_token:
            raise NotImplementedError(
                self._refusal(f"its layers are given more for each token ({', '.join(sorted(per_token))})")
            )
        change = float((again - dense).norm() / dense.norm())
        if not change <= max(1e-5, 4 * torch.finfo(dense.dtype).eps):
            raise NotImplementedError(self._refusal(f"its states change by {change:.1e}"))

    def _states(self, module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        encoded = arguments.get("mm_encoder_outputs")
        own = {**arguments, "use_cache": False}
        if encoded is not None:
            own["mm_encoder_outputs"] = dict(encoded)
        states: Tensor = module(**own)[0]
        return states

    def _refusal(self, why: str) -> str:
        found = describe(self._session.adapter)
        return (
            f"family='generic' found {found}, but where all rows are gathered as pruning does, {why}. Describe the "
            "model by a family of its own, and call sparsevlm.register_adapter (docs/adding_a_model.md)."
        )


def describe(adapter: ModelAdapter) -> str:
    """What an adapter was found to be, in words."""
    tokens = ", ".join(f"{kind} token {modality.token_id}" for kind, modality in adapter.modalities.items())
    return (
        f"in this {adapter.name} {tokens}, a {type(adapter.decoder.module).__name__} of {adapter.n_layers} layers and "
        f"a {type(adapter.vision.module).__name__}"
    )


def _gathering_all(session: Session, shape: tuple[int, int], is_flash: bool) -> ForwardPass:
    options = session.options
    request = Request(options.config, options.selector, options.traits, (), shape[1], 0, shape[0])
    device = next(session.adapter.decoder.module.parameters()).device
    request.place(torch.arange(shape[1], device=device).expand(shape[0], -1))
    return ForwardPass(None, request, is_flash=is_flash)


class _Looks:
    """Forward pre-hook of a layer that notes arguments which hold something for each token."""

    def __init__(self, per_token: set[str], q_len: int) -> None:
        self._per_token, self._q_len = per_token, q_len

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {f"argument {i + 1}": value for i, value in enumerate(args) if i}
        given |= {name: value for name, value in kwargs.items() if name not in _KNOWN}
        for name, value in given.items():
            if isinstance(value, Tensor) and self._q_len in value.shape:
                self._per_token.add(name)
