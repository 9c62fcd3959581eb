"""The chat model ``sparsevlm`` of lmms-eval."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger as eval_logger
from tqdm import tqdm

from ..api import apply_sparsevlm, remove_sparsevlm
from ..inputs import load_model, load_processor
from ..inputs.pixel_bounds import bound_pixels
from ..inputs.turns import move_inputs
from ..models import adapter_for
from ..request.counting import visual_counts
from ..selection.context import SelectorTraits
from ..selection.selectors import make_selector
from .lmms_arguments import parse_arguments
from .lmms_generation import cut_at, generation_options, unused_options
from .lmms_inputs import Conversation, batch_inputs, read_conversation, token_side
from .lmms_sizes import ImageSizes
from .lmms_totals import RunTotals, dense_total, merged, pruned_total

_GENERATION_ONLY = (
    "--model sparsevlm answers tasks of output_type generate_until only; this one wants {}. Most vision-language tasks "
    "have such a variant (seedbench beside seedbench_ppl, egoschema beside egoschema_mcppl): "
    "python -m lmms_eval --tasks list."
)


class SparseVLM(lmms):
    """A vision-language model with pruned visual tokens; see :class:`.lmms_arguments.ModelArguments`.

    With several processes (``accelerate launch``) each holds a copy of the model and answers its share of the requests.

    Parameters
    ----------
    **arguments
        Of ``--model_args``, ``--batch_size`` and ``--device``.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError, NotImplementedError
        For arguments that are unknown or cannot be, and as :func:`sparsevlm.inputs.load_model` and
        :func:`sparsevlm.apply_sparsevlm`.
    """

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        chosen = self._arguments = parse_arguments(arguments)
        self._draws = False
        if chosen.pruning is not None:  # before the weights are read
            self._draws = SelectorTraits.of(make_selector(chosen.pruning)).draws
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model = load_model(
            chosen.pretrained,
            dtype=chosen.dtype,
            device=str(self.accelerator.device) if self._world_size > 1 else chosen.device,
            attn_implementation=chosen.attn_implementation,
        )
        self._device: torch.device = self.model.device
        self.processor = load_processor(chosen.pretrained)
        self._adapter = adapter_for(self.model)
        if chosen.n_visual is not None:
            side = token_side(self.processor)
            # So wide that the processor does not resize a second time.
            bound_pixels(self.processor, side**2, 2 * (chosen.n_visual + 1) * side**2)
        else:
            bound_pixels(self.processor, chosen.min_pixels, chosen.max_pixels)
        self._sizes = ImageSizes(self._adapter, self.processor, chosen.n_visual, chosen.downsample)
        self._system_prompt = self._resolve_system_prompt(chosen.system_prompt)
        self._state: Any = None
        if chosen.pruning is not None:
            self._state = apply_sparsevlm(self.model, config=chosen.pruning, processor=self.processor)
        self._totals = RunTotals()
        self._told: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SparseVLM:
        """Make a model from ``--model_args``; what these say goes before ``--batch_size`` and ``--device``.

        Raises
        ------
        ValueError
            If a piece between the commas is not ``name=value``.
        """
        try:
            given = utils.simple_parse_args_string(arg_string)
        except ValueError as error:
            raise ValueError(
                f"model_args must be name=value with commas between them (a list as 2;6;10), got {arg_string!r}."
            ) from error
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**more, **given})

    @property
    def batch_size(self) -> int:
        """Requests per call of ``generate``."""
        return self._arguments.batch_size

    @property
    def device(self) -> torch.device:
        """Device of the model, or its last one."""
        return self._device

    @property
    def totals(self) -> RunTotals:
        """Totals of kept tokens so far, in this process; after the run in all of them."""
        return self._totals

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in batches of one task and one set of generation options."""
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in self._batches(requests):
                answers.update(zip(batch, self._answer([requests[i] for i in batch]), strict=True))
                bar.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(_GENERATION_ONLY.format("several rounds"))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported; lmms-eval itself asks chat models for generation only.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(_GENERATION_ONLY.format("log-likelihoods"))

    def take_totals(self) -> RunTotals:
        """Totals of all processes since the last call, each of which has to call; counting begins anew."""
        totals, self._totals = merged(self._gathered()), RunTotals()
        return totals

    def clean(self) -> None:
        """Tell lmms-eval what was kept, then free the model; called once by every process, after its last request.

        The figures arrive in the results file under ``throughput``, with ``avg_`` before their names.
        """
        self._totals = totals = self.take_totals()
        if self.rank == 0 and totals.seconds:
            log_metrics(
                total_elapsed_time=totals.seconds,
                total_gen_tokens=totals.new_tokens,
                avg_speed=totals.new_tokens / totals.seconds,
                additional_metrics=totals.figures(),
            )
            n_clamped, n_batches = totals.clamped()
            if n_clamped:
                eval_logger.warning(
                    f"sparsevlm: the budget could not hold for some image in {n_clamped} of {n_batches} batches"
                )
        remove_sparsevlm(self.model)
        self._state = None
        super().clean()

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Indices of requests that share task, split and generation options, the longest questions first."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            _, _, options, _, task, split = request.args
            groups.setdefault(json.dumps([task, split, options], sort_keys=True, default=str), []).append(i)
        for group in groups.values():
            group.sort(key=lambda i: -len(requests[i].args[0]))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _answer(self, batch: Sequence[Instance]) -> list[GenerationResult]:
        _, _, given, _, task, _ = batch[0].args
        self._tell_idle(task, given)
        options, stops = generation_options(given)
        inputs = batch_inputs(self.processor, [self._conversation(request) for request in batch])
        inputs = move_inputs(inputs, self.model)
        begin = time.perf_counter()
        with self._drawn_for(batch[0]):
            output = self.model.generate(**inputs, **options)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
        self._totals.seconds += time.perf_counter() - begin
        counted = [not (request.metadata or {}).get("__padding_only__") for request in batch]
        self._count(task, counted, inputs)
        texts = self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        results = []
        for row, text, length, counts in zip(new, texts, lengths, counted, strict=True):
            n_new = _length(row, self.model.generation_config)
            self._totals.new_tokens += n_new * counts
            results.append(GenerationResult(cut_at(text, stops), TokenCounts(length, n_new)))
        return results

    def _conversation(self, request: Instance) -> Conversation:
        _, doc_to_messages, _, doc_id, task, split = request.args
        chosen = self._arguments
        try:
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            messages = self._apply_system_prompt(messages, self._system_prompt)
            found = read_conversation(messages, chosen.max_num_frames)
            if found.clips and (argument := self._sizes.for_images_only):
                raise ValueError(f"{argument} is for images; for tasks with videos use max_pixels.")
            found.images[:] = self._sizes(found.images)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"task {task}, document {doc_id} of {split}: {error}") from error
        return found

    def _drawn_for(self, request: Instance) -> contextlib.AbstractContextManager[Any]:
        """What is drawn at random differs from batch to batch: else all pictures would be cut by the same mask."""
        if not self._draws:
            return contextlib.nullcontext()
        assert self._arguments.pruning is not None
        _, _, _, doc_id, task, _ = request.args
        digest = hashlib.sha256(f"{self._arguments.pruning.seed} {task} {doc_id}".encode()).digest()
        drawn: contextlib.AbstractContextManager[Any] = self._state.options(seed=int.from_bytes(digest[:4], "big"))
        return drawn

    def _count(self, task: str, counted: Sequence[bool], inputs: Any) -> None:
        if self._state is not None:
            self._totals.add(task, pruned_total(self._state.report, counted))
            return
        self._totals.add(task, dense_total(visual_counts(self._adapter, inputs), counted))

    def _gathered(self) -> list[RunTotals]:
        if self.world_size == 1 or not torch.distributed.is_initialized():
            return [self._totals]
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, self._totals)
        return parts

    def _tell_idle(self, task: str, given: dict[str, Any]) -> None:
        """Say once per task which of its options change nothing here."""
        if task not in self._told and (idle := unused_options(given)):
            eval_logger.warning(
                f"sparsevlm: task {task}: these generation options have no effect here: {', '.join(idle)}"
            )
        self._told.add(task)


def _length(row: Sequence[int], generation_config: Any) -> int:
    """New tokens up to the first that ends the turn, this one included; the rest is padding."""
    ends = generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
