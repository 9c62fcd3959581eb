"""One optimisation step: draw scenes, ask, run forward and backward, update; optionally as one CUDA graph."""

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from sparsevlm.scenes import CARD, TASKS, training_seeds
from training.architecture import cast_weights
from training.data_parallel import DataParallel
from training.drawn.tasks import DrawnTasks
from training.forward import Decoded, SceneForward
from training.groups import first_seed, parse_mix, task_table
from training.material import Material, draw_material
from training.objective import PLACE_SIZES, TOKEN_SIZES, Readout, score_answers
from training.optimiser import Optimiser, Trained
from training.pixels import Patchifier
from training.replay import TextReplay
from training.sequences import SequenceBuilder
from training.settings import TASK_SHARES, StageSettings

_EAGER_STEPS = 3
_MEANS = ("loss", "token_loss", "place_loss", "replay_loss", "drawn_loss", "shown_loss", "letter_loss", "grad_norm")
_AUXILIARY = ("kind", "colour_seen", "glyph", "edge", "row", "column", "box_edge", "kind_known", "colour_known")


class Metrics:
    """Sums over steps, kept on the device so that logging alone waits for it."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(1 + len(_MEANS), device=device)  # of steps, and of what is averaged over them
        self.auxiliary = torch.zeros(len(_AUXILIARY), device=device)
        self.hits = torch.zeros(len(TASKS), device=device)
        self.asked = torch.zeros(len(TASKS), device=device)

    def read(self) -> dict[str, float]:
        """Means since the last call."""
        totals, hits, asked = self.totals.tolist(), self.hits.tolist(), self.asked.tolist()
        auxiliary = self.auxiliary.tolist()
        for tensor in (self.totals, self.auxiliary, self.hits, self.asked):
            tensor.zero_()
        steps = max(totals[0], 1.0)
        means = {name: total / steps for name, total in zip(_MEANS, totals[1:], strict=True)}
        means |= {name: total / steps for name, total in zip(_AUXILIARY, auxiliary, strict=True)}
        return means | {task: h / max(a, 1.0) for task, h, a in zip(TASKS, hits, asked, strict=True)}


class TrainStep:
    """The whole step on fixed buffers.

    The model computes in its own dtype (bf16 on a GPU); the optimiser works on float32 copies of the weights.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        Model to train in place.
    tokenizer : PreTrainedTokenizerFast
        The model's.
    settings : StageSettings
        The run.
    trained : Trained
        What of the model is trained; the rest should ask for no gradient.
    replay : TextReplay, optional
        Text whose loss is added to that of the answers.
    drawn : DrawnTasks, optional
        Tasks of other kinds than scenes, whose loss is added as well; loads for ``draw_ahead`` steps.
    parallel : DataParallel, optional
        Which of several processes this is; each draws scenes of its own.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        settings: StageSettings,
        trained: Trained,
        replay: TextReplay | None = None,
        drawn: DrawnTasks | None = None,
        parallel: DataParallel | None = None,
    ):
        device, dtype = model.device, model.dtype
        self.settings, self.dtype, self.steps_done, self.replay, self.drawn = settings, dtype, 0, replay, drawn
        self.parallel = parallel or DataParallel()
        self.metrics = Metrics(device)
        self.builder, self.patchify = SequenceBuilder(tokenizer, device), Patchifier(device)
        self.groups = parse_mix(settings.mix)
        self.forward = SceneForward(
            model, self.builder.head_ids, self.builder.between_ids, self.groups, settings.tail, settings.compiled
        )
        hidden = model.config.text_config.hidden_size
        self.token_head = cast_weights(Readout(hidden, TOKEN_SIZES, rare=CARD + 1).to(device), dtype)
        self.place_head = cast_weights(Readout(hidden, PLACE_SIZES).to(device), dtype)
        n_samples = settings.draw_ahead * sum(group.count for group in self.groups)
        first = first_seed(settings.seed) + self.parallel.rank * n_samples
        self.seeds = training_seeds(first, n_samples).to(device)
        self.task_table = task_table(TASK_SHARES, device)
        self.auxiliary_weight = torch.zeros((), device=device)
        if settings.auxiliary_until > 0:
            heads = [*self.token_head.parameters(), *self.place_head.parameters()]
            heads += drawn.readout.parameters() if drawn is not None else []
            trained = dataclasses.replace(trained, others=trained.others + heads)
        self.optimiser = Optimiser(trained, settings.decay, settings.clip, self.parallel)
        self.weights = self.optimiser.weights
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, factor: float, auxiliary_weight: float) -> None:
        """Do ``draw_ahead`` steps with learning rates scaled by ``factor``; the GPU may lag behind."""
        self.optimiser.rate.fill_(factor * self.settings.rate)
        self.optimiser.matrix_rate.fill_(factor * self.settings.matrix_rate)
        self.auxiliary_weight.fill_(auxiliary_weight)
        if self.drawn is not None:
            self.drawn.load()
        if self.graph is not None:
            self.graph.replay()
        elif self.settings.graphed and self.steps_done >= _EAGER_STEPS:
            self._capture()
        elif self.settings.graphed:
            self._eager_on_side_stream()
        else:
            self._step()
        self.steps_done += self.settings.draw_ahead
        if self.drawn is not None:
            self.drawn.fill()

    def read(self) -> dict[str, float]:
        """Means since the last call."""
        return self.metrics.read() | (self.drawn.read() if self.drawn is not None else {})

    def end(self) -> None:
        """Give back the graph, and leave the run of several processes."""
        if self.graph is not None:
            self.graph.reset()  # NCCL does not end while a graph holds what it does
        self.parallel.end()

    def _eager_on_side_stream(self) -> None:
        """Warm up lazily made buffers and compiled blocks on a side stream, as graph capture asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Threads of NCCL ask the device what it has done meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._step()
        self.graph.replay()

    def _step(self) -> None:
        """Draw for ``draw_ahead`` steps and do them."""
        settings = self.settings
        ahead = settings.draw_ahead
        materials = [
            draw_material(group, seeds, self.task_table, self.builder, settings.questions, settings.tail)
            for group, seeds in zip(
                self.groups, self.seeds.split([ahead * group.count for group in self.groups]), strict=True
            )
        ]
        for index in range(ahead):
            self._learn(
                [
                    material.part(slice(index * group.count, (index + 1) * group.count))
                    for material, group in zip(materials, self.groups, strict=True)
                ],
                index,
            )
        self.seeds += self.seeds.shape[0] * self.parallel.world_size

    def _learn(self, parts: Sequence[Material], index: int) -> None:
        """Forward, backward and update, with scenes and drawn batch ``index`` of those ahead."""
        settings = self.settings
        patches = [self.patchify(part.pixels.flatten(0, 1), self.dtype) for part in parts]
        features = self.forward.visual_features(patches)
        decoded = self.forward.decode(features, [part.sequences.input_ids for part in parts])
        score, *rest = (
            score_answers(one.logits, part.sequences, part.tasks) for one, part in zip(decoded, parts, strict=True)
        )
        for other in rest:
            score = score + other
        answers = score.loss / score.weight
        loss = token_loss = place_loss = answers
        if settings.auxiliary_until > 0:
            token_loss, place_loss, accuracy = self._auxiliary(parts, features, decoded)
            loss = answers + self.auxiliary_weight * (token_loss + settings.place_weight * place_loss)
            self.metrics.auxiliary += accuracy
        replayed = drawn = shown = letters = torch.zeros_like(answers)
        if self.drawn is not None:
            drawn, shown, letters = self.drawn.loss(index)
            loss = loss + self.drawn.weight * drawn
            if settings.auxiliary_until > 0:
                loss = loss + self.auxiliary_weight * (shown + letters)
        if self.replay is not None:
            replayed = self.replay.loss()
            loss = loss + self.replay.weight * replayed
        norm = self.optimiser.step(torch.autograd.grad(loss, self.weights))
        losses = (answers, token_loss, place_loss, replayed, drawn, shown, letters)
        totals = (torch.ones_like(norm), *(one.detach() for one in losses), norm)
        self.metrics.totals += torch.stack(totals)
        self.metrics.hits += score.hits
        self.metrics.asked += score.asked

    def _auxiliary(
        self, parts: Sequence[Material], features: Sequence[torch.Tensor], decoded: Sequence[Decoded]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses of the two readouts, and accuracies in the order of ``_AUXILIARY``.

        Within the decoder only single pictures are asked for places: two would start at different positions.
        """
        shown = torch.cat([part.shown.flatten(0, -2) for part in parts])
        token_loss, seen = self.token_head(torch.cat([one.flatten(0, 1) for one in features]), shown)
        single = [i for i, group in enumerate(self.groups) if not group.is_pair]
        places = torch.cat([parts[i].places.flatten(0, -2) for i in single])
        place_loss, placed = self.place_head(torch.cat([decoded[i].places.flatten(0, 1) for i in single]), places)
        accuracy = torch.stack(
            [*seen[:2], seen[2:-4].mean(), seen[-4:].mean(), *placed[:2], placed[2:-2].mean(), *placed[-2:]]
        )
        return token_loss, place_loss, accuracy
