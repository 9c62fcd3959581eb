"""Agreement of the engine with the model's own modules, checked on a case before it is timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .providers import Inputs, Provider

# Relative error of logits, whose sums run in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# Tokens that both paths keep, of which chance keeps one in six. States that differ by rounding order tokens of like
# gain in another way, and with random weights most are of like gain: in bfloat16, on the shape of 7B, 94 % of the kept
# were the same with 1024 visual tokens, 87 % with 4096 and 65 % with 16384. On equal states the choices are equal
# (tests/engine).
_MIN_SHARED = 0.5
_MAX_STEPS = 3


class DisagreementError(RuntimeError):
    """The engine's answers are not the model's."""


class ForcedTokens(LogitsProcessor):
    """Logits processor that forces given tokens and records the scores, so that all providers see the same prefix.

    Parameters
    ----------
    tokens : Tensor of shape (batch, n), int64

    Attributes
    ----------
    scores : list of Tensor of shape (batch, vocab_size), float32
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Records the scores of a step and forces its token."""
        token = self._tokens[:, len(self.scores), None]
        self.scores.append(scores.float())
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def check(providers: list[Provider], inputs: Inputs, new_tokens: int) -> None:
    """Compares the engine's dense logits with the model's, and its kept tokens with those of the plain path.

    Nothing is compared where the engine is not measured: hooks run the model's own modules. Of a batch
    only the first budget is checked: the plain path takes seconds there.

    Parameters
    ----------
    providers : list of Provider
    inputs : dict of Tensor
    new_tokens : int
        Of the case; the scores of three are compared at most.

    Raises
    ------
    DisagreementError
        If they differ by more than rounding.
    """
    if not any(provider.wants_engine for provider in providers):
        return
    reference = next(provider for provider in providers if provider.name == "hf-dense")
    ours = next(provider for provider in providers if provider.name == "ours-dense")
    n_steps = min(new_tokens, _MAX_STEPS)
    for step, (scores, expected) in enumerate(
        zip(_scores(ours, inputs, n_steps, engine=True), _scores(reference, inputs, n_steps), strict=True)
    ):
        finite = expected.isfinite()  # tokens that options of generate forbid are not
        error = float((scores - expected)[finite].norm() / expected[finite].norm())
        if not error <= _TOLERANCE[reference.model.dtype]:
            raise DisagreementError(
                f"the engine's logits of token {step + 1} differ from the model's by {error:.2g} (relative)."
            )
    pruned = [provider for provider in providers if provider.name == "ours"]
    is_batch = inputs["input_ids"].shape[0] > 1
    for provider in pruned[:1] if is_batch else pruned:
        _check_kept(provider, inputs)


def _scores(provider: Provider, inputs: Inputs, n_steps: int, **options: Any) -> list[Tensor]:
    forced = ForcedTokens(inputs["input_ids"][:, :n_steps])
    provider.generate(inputs, n_steps, logits_processor=[forced], **options)
    return forced.scores


def _check_kept(provider: Provider, inputs: Inputs) -> None:
    assert provider.state is not None
    provider.generate(inputs, 1, engine=True)
    samples = provider.state.report.samples
    provider.generate(inputs, 1, engine=False)
    for ours, plain in zip(samples, provider.state.report.samples, strict=True):
        if ours.layer_tokens != plain.layer_tokens:
            raise DisagreementError(
                f"the engine keeps {ours.layer_tokens} tokens, the plain path {plain.layer_tokens}."
            )
        kept, expected = set(ours.stages[0].kept), set(plain.stages[0].kept)
        if len(kept & expected) < _MIN_SHARED * len(expected):
            raise DisagreementError(
                f"of {len(expected)} tokens that the plain path keeps, the engine keeps {len(kept & expected)}."
            )
