"""Loss and exact matches on drawn tasks, a packed batch in each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from training.drawn.forward import PackedForward
from training.drawn.packing import Limits, Packed, empty
from training.sequences import IGNORE


class DrawnTasks:
    """Batches on fixed buffers, so that a CUDA graph may hold the steps.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
    batches : iterator of Packed
        Of numpy arrays, without an end.
    limits : Limits
    families : sequence of str
        In the order of their indices.
    ahead : int
        Steps that :meth:`load` loads for.
    weight : float
        Of the loss beside that of the scenes.
    compiled : bool
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        batches: Iterator[Packed],
        limits: Limits,
        families: Sequence[str],
        ahead: int,
        weight: float,
        compiled: bool = False,
    ):
        device = model.device
        self.weight, self._families, self._batches, self._ahead = weight, list(families), batches, ahead
        self._forward = PackedForward(model, limits, compiled)
        shapes = empty(limits, len(families))
        # Two sets on the host: one is filled while the other is still being copied.
        self._host = [
            Packed(*(torch.from_numpy(array).expand(ahead, *array.shape).clone() for array in shapes)) for _ in "ab"
        ]
        if device.type == "cuda":
            self._host = [Packed(*(tensor.pin_memory() for tensor in one)) for one in self._host]
            self._copied = [torch.cuda.Event() for _ in self._host]
        self._batch = Packed(*(tensor.to(device) for tensor in self._host[0]))
        self._turn = 0
        self._hits, self._asked = (torch.zeros(len(families) + 1, device=device) for _ in "ab")

    def load(self) -> None:
        """Bring the next batches to the device."""
        host = self._host[self._turn]
        on_gpu = self._batch.ids.is_cuda
        if on_gpu:
            self._copied[self._turn].synchronize()
        for index in range(self._ahead):
            for tensor, array in zip(host, next(self._batches), strict=True):
                tensor[index].copy_(torch.from_numpy(array))
        for there, here in zip(self._batch, host, strict=True):
            there.copy_(here, non_blocking=True)
        if on_gpu:
            self._copied[self._turn].record()
        self._turn = 1 - self._turn

    def loss(self, index: int) -> torch.Tensor:
        """Mean loss over the tokens of answers in loaded batch ``index``, a scalar.

        A token of an answer of n tokens weighs n**-0.5, as in :func:`~training.objective.score_answers`.
        """
        batch = Packed(*(tensor[index] for tensor in self._batch))
        logits, targets, owners = self._forward(batch), batch.targets, batch.owners
        used = (targets != IGNORE).float()
        lengths = torch.zeros(batch.families.shape, device=used.device).index_add_(0, owners, used)
        weights = used * lengths[owners].clamp(min=1).rsqrt()
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        wrong = used * (logits.detach().argmax(dim=-1) != targets)
        n_wrong = torch.zeros_like(lengths).index_add_(0, owners, wrong)
        asked = (lengths > 0).float()
        self._asked.index_add_(0, batch.families, asked)
        self._hits.index_add_(0, batch.families, asked * (n_wrong == 0))
        return (losses * weights).sum() / weights.sum().clamp(min=1e-6)

    def read(self) -> dict[str, float]:
        """Share of answers right since the last call, teacher-forced, by family."""
        hits, asked = self._hits.tolist(), self._asked.tolist()
        self._hits.zero_()
        self._asked.zero_()
        return {name: h / max(a, 1.0) for name, h, a in zip(self._families, hits, asked, strict=False)}
