"""One optimisation step: draw scenes, ask, run forward and backward, update; optionally as one CUDA graph."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from sparsevlm.scenes import DEFAULT_LAYOUT, TASKS, TRAINING_SEEDS, ask, render, sample_specs, training_seeds
from sparsevlm.scenes.seeds import Draws
from training.forward import SceneForward
from training.objective import TokenHead, score_answers
from training.pixels import PATCH, Patchifier
from training.sequences import SequenceBuilder
from training.settings import TrainSettings

# Each task's share of the questions, in twentieths.
_SHARES = {"number": 5, "colour": 4, "exist": 4, "count": 4, "half": 3}
_SEEDS_PER_RUN = 2**32
_EAGER_STEPS = 3


class Metrics:
    """Sums over steps, kept on the device so that logging alone waits for it."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(5, device=device)  # steps, loss, auxiliary loss, digits read, gradient norm
        self.hits = torch.zeros(len(TASKS), device=device)
        self.asked = torch.zeros(len(TASKS), device=device)

    def read(self) -> dict[str, float]:
        """Means since the last call."""
        totals, hits, asked = self.totals.tolist(), self.hits.tolist(), self.asked.tolist()
        for tensor in (self.totals, self.hits, self.asked):
            tensor.zero_()
        steps = max(totals[0], 1.0)
        names = ("loss", "auxiliary", "cell_digits", "grad_norm")
        means = {name: total / steps for name, total in zip(names, totals[1:], strict=True)}
        return means | {task: h / max(a, 1.0) for task, h, a in zip(TASKS, hits, asked, strict=True)}


class TrainStep:
    """The whole step on fixed buffers.

    The model computes in its own dtype (bf16 on a GPU); the optimiser works on float32 copies of the weights.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        Model to train in place.
    tokenizer : PreTrainedTokenizerFast
        The bundled tokenizer.
    settings : TrainSettings
        The run.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        settings: TrainSettings,
    ):
        device, dtype = model.device, model.dtype
        self.settings, self.dtype, self.steps_done = settings, dtype, 0
        self.metrics = Metrics(device)
        self.builder, self.patchify = SequenceBuilder(tokenizer, device), Patchifier(device)
        grid = (DEFAULT_LAYOUT.height // PATCH, DEFAULT_LAYOUT.width // PATCH)
        self.forward = SceneForward(model, self.builder.head_ids, grid, settings.compiled)
        hidden = model.config.text_config.hidden_size
        self.token_head = TokenHead(hidden).to(device, dtype) if settings.auxiliary_until > 0 else None
        first = TRAINING_SEEDS.start + settings.seed * _SEEDS_PER_RUN
        self.seeds = training_seeds(first, settings.batch).to(device)
        shares = [i for i, task in enumerate(TASKS) for _ in range(_SHARES[task])]
        self.task_table = torch.tensor(shares, device=device)
        self.auxiliary_weight = torch.zeros((), device=device)
        self.rate = torch.zeros((), device=device)

        modules: list[nn.Module] = [model] + ([self.token_head] if self.token_head is not None else [])
        self.weights = [weight for module in modules for weight in module.parameters()]
        self.masters = [weight.detach().clone().float().requires_grad_() for weight in self.weights]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        on_gpu = device.type == "cuda"
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": settings.decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), fused=on_gpu, capturable=on_gpu)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, rate: float, auxiliary_weight: float) -> None:
        """Do one step; the GPU may lag behind."""
        self.rate.fill_(rate)
        self.auxiliary_weight.fill_(auxiliary_weight)
        if self.graph is not None:
            self.graph.replay()
        elif self.settings.graphed and self.steps_done == _EAGER_STEPS:
            self._capture()
        elif self.settings.graphed:
            self._eager_on_side_stream()
        else:
            self._step()
        self.steps_done += 1

    def _eager_on_side_stream(self) -> None:
        """Warm up lazily made buffers and compiled blocks on a side stream, as graph capture asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
        self.graph.replay()

    def _step(self) -> None:
        settings = self.settings
        spec = sample_specs(self.seeds)
        tasks = self.task_table[Draws(self.seeds).integers("task", 0, len(self.task_table), settings.questions)]
        sequences = self.builder(ask(spec, tasks))
        features = self.forward.visual_features(self.patchify(render(spec), self.dtype))
        logits = self.forward.answer_logits(features, sequences.input_ids, sequences.answer_rows.flatten(1))
        score = score_answers(logits, sequences.targets, tasks)
        loss, auxiliary, digits = score.loss, torch.zeros_like(score.loss), torch.zeros_like(score.loss)
        if self.token_head is not None:
            auxiliary, digits = self.token_head(features, spec)
            loss = loss + self.auxiliary_weight * auxiliary
        norm = self._update(loss)
        self.seeds += settings.batch
        ones = torch.ones_like(norm)
        self.metrics.totals += torch.stack([ones, score.loss.detach(), auxiliary.detach(), digits, norm])
        self.metrics.hits += score.hits
        self.metrics.asked += score.asked

    def _update(self, loss: torch.Tensor) -> torch.Tensor:
        """Clipped AdamW step on the float32 weights, copied back to the model; returns the gradient norm."""
        gradients = torch.autograd.grad(loss, self.weights)
        master_gradients = [master.grad for master in self.masters]
        torch._foreach_copy_(master_gradients, list(gradients))
        norm = torch.stack(torch._foreach_norm(master_gradients)).norm()
        torch._foreach_mul_(master_gradients, (self.settings.clip / (norm + 1e-6)).clamp(max=1.0))
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return norm
