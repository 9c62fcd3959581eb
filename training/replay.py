"""Text replay: a decoder that learns to see keeps writing text as the original does."""

import torch
import torch.nn.functional as F
from torch import nn

from training.data_parallel import DataParallel
from training.forward import TextForward


class TextReplay:
    """Divergence from the original decoder on windows of text, a few in each step.

    What is compared are distributions, not the text's own next tokens: the decoder learns nothing of the text.

    Parameters
    ----------
    text : nn.Module
        Decoder in training.
    original : nn.Module
        What it should write like.
    windows : torch.Tensor
        int64 of shape (windows, length), in the order in which they are taken, over and over.
    count : int
        Windows a step.
    weight : float
        Of the divergence beside the loss of the answers.
    compiled : bool
    parallel : DataParallel, optional
        Which of several processes this is; each takes windows of its own.
    """

    def __init__(
        self,
        text: nn.Module,
        original: nn.Module,
        windows: torch.Tensor,
        count: int,
        weight: float,
        compiled: bool = False,
        parallel: DataParallel | None = None,
    ):
        parallel = parallel or DataParallel()
        self._taken = count * parallel.world_size  # in a step, by all
        if windows.shape[0] < self._taken:
            raise ValueError(f"{windows.shape[0]} windows of text are too few for {self._taken} in a step")
        device = text.embed_tokens.weight.device
        self.weight, self._windows = weight, windows.to(device)
        self._next = torch.arange(count, device=device) + parallel.rank * count
        self._original, self._ours = (TextForward(one, count, windows.shape[1], compiled) for one in (original, text))

    def loss(self) -> torch.Tensor:
        """Mean Kullback-Leibler divergence over the tokens of the next windows, a scalar in nats."""
        ids = self._windows[self._next]
        self._next.add_(self._taken).remainder_(self._windows.shape[0])
        with torch.no_grad():
            expected = F.log_softmax(self._original(ids), dim=-1)
        ours = F.log_softmax(self._ours(ids), dim=-1)
        return F.kl_div(ours, expected, reduction="sum", log_target=True) / ids.numel()


@torch.no_grad()
def perplexity(text: nn.Module, windows: torch.Tensor, at_once: int = 8) -> float:
    """Perplexity of a decoder on windows of text, int64 of shape (windows, length)."""
    loss = torch.zeros((), device=text.embed_tokens.weight.device)
    for ids in windows.to(loss.device).split(at_once):
        logits = TextForward(text, *ids.shape)(ids).view(*ids.shape, -1)[:, :-1]
        loss += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return float((loss / (windows.shape[0] * (windows.shape[1] - 1))).exp())
