"""The callable class that Ray Data runs in its actors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..error_notes import with_notes
from .columns import Asked, RowReader, with_columns
from .generation import checked_generation

if TYPE_CHECKING:
    import pyarrow

RAISE, COLUMN = ON_ERROR = ("raise", "column")


class SparseVLMPredictor:
    """Answers to the rows of a dataset, by a model with pruned visual tokens; for ``Dataset.map_batches``.

    Every actor that Ray makes of it loads the model once. Give ``map_batches`` this class, its arguments as
    ``fn_constructor_kwargs``, ``batch_format="pyarrow"``, a ``batch_size``, the number of actors as
    ``compute=ActorPoolStrategy(size=...)``, and ``num_gpus=1`` where they are to run on GPUs.

    A call keeps rows, their order and all columns, and adds ``answer``, ``visual_tokens`` (of the prompt),
    ``kept_tokens`` (averaged over the decoder layers' inputs), ``pruning_path`` (``"engine"`` or ``"plain"``),
    ``kv_bytes_dense`` and ``kv_bytes_sparse`` (after the prompt), ``seconds`` and ``error``. Bytes and seconds are
    those of the row's call of ``generate``, divided by the rows in it. Of a row that failed all but ``error`` are null.

    Parameters
    ----------
    model : str or Path
        A folder, a hub id, or ``"bundled"``.
    pruning : mapping, optional
        Options of :func:`sparsevlm.apply_sparsevlm`, but for ``processor``. ``{"keep": 1.0}`` prunes nothing.
    generation : mapping, optional
        Options of transformers' ``GenerationConfig``. Greedy, with 128 new tokens, where it does not say otherwise.
    image_column : str, optional
        Column with a row's picture or with a list of them: paths, bytes of picture files, the ``{"bytes", "path"}`` of
        ``datasets``, or arrays of 8-bit (height, width, channels). An empty list: the row asks without one. ``None``:
        so do all.
    question_column : str
        Column with the row's question.
    question : str, optional
        Asked of every row, in the place of a column.
    system_prompt : str, optional
        Goes before every question.
    image_folder : str or Path, optional
        What relative paths start from, on every machine. ``None``: the working directory of the actor.
    output_prefix : str
        Put before the names of the new columns.
    on_error : {"column", "raise"}
        What becomes of a row that cannot be answered (no picture, a broken one, too many tokens for the memory, …):
        its reason goes into the column ``error`` and the rest of the batch is answered; or it ends the job.
    min_pixels, max_pixels : int, optional
        Bounds on the pixels of an image, as processors of Qwen and GLM have them. ``None``: the checkpoint's own.
    dtype, device, attn_implementation, local_files_only
        As in :func:`sparsevlm.inputs.load_model`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, FileNotFoundError
        For options that are unknown or cannot be, and as :func:`sparsevlm.inputs.load_model`,
        :func:`sparsevlm.inputs.load_processor` and :func:`sparsevlm.apply_sparsevlm`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        pruning: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        image_column: str | None = "image",
        question_column: str = "question",
        question: str | None = None,
        system_prompt: str | None = None,
        image_folder: str | Path | None = None,
        output_prefix: str = "",
        on_error: str = COLUMN,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str = "sdpa",
        local_files_only: bool = False,
    ) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(map(repr, ON_ERROR))}, got {on_error!r}.")
        if "processor" in (pruning or {}):
            raise TypeError("pruning holds processor, which is loaded with the model; leave it out.")
        self._on_error, self._prefix, self._system_prompt = on_error, output_prefix, system_prompt
        self._generation = checked_generation(generation or {})

        from ..api import apply_sparsevlm
        from ..inputs import load_model, load_processor
        from ..inputs.pixel_bounds import bound_pixels

        self.processor = load_processor(model, local_files_only=local_files_only)
        if min_pixels is not None or max_pixels is not None:
            bound_pixels(self.processor, min_pixels, max_pixels)
        tokens = [getattr(self.processor, name, None) for name in ("image_token", "video_token")]
        self._reader = RowReader(
            image_column,
            question_column if question is None else None,
            question,
            None if image_folder is None else Path(image_folder),
            tuple(token for token in tokens if isinstance(token, str)),
        )
        self.model = load_model(
            model,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            local_files_only=local_files_only,
        )
        if "stop_strings" in self._generation:
            self._generation["tokenizer"] = self.processor.tokenizer
        self.state = apply_sparsevlm(self.model, processor=self.processor, **(pruning or {}))

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Answer the rows of one batch.

        Raises
        ------
        TypeError, ValueError
            If the batch is no Arrow table, lacks a column, or has one of the new ones already.
        RuntimeError
            If a row cannot be answered, under ``on_error="raise"``.
        """
        self._reader.check(batch)
        rows: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
        with_columns(batch, rows, self._prefix)  # a name that is taken is told before the work is done
        asked: dict[int, Asked] = {}
        for number in range(batch.num_rows):
            try:
                asked[number] = self._reader.read(batch, number)
            except ValueError as error:
                rows[number] = self._failed(error)
        # Some processors take no prompts with images beside some without.
        for has_images in (True, False):
            numbers = [number for number, one in asked.items() if bool(one.images) is has_images]
            for number, row in zip(numbers, self._answers([asked[number] for number in numbers]), strict=True):
                rows[number] = row
        return with_columns(batch, rows, self._prefix)

    def _answers(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Answers to all rows together, or, where that fails, to each half of them."""
        import torch

        if not asked:
            return []
        try:
            return self._answered(asked)
        except torch.AcceleratorError:  # the process can compute nothing more on its GPU
            raise
        except Exception as error:
            failure = error.with_traceback(None)  # whose frames hold the tensors of the call
        if isinstance(failure, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if len(asked) == 1:
            return [self._failed(failure)]
        half = len(asked) // 2
        return [*self._answers(asked[:half]), *self._answers(asked[half:])]

    def _answered(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        from ..inputs.turns import move_inputs, process, render_turn

        prompts = [render_turn(self.processor, self._messages(one)) for one in asked]
        inputs = move_inputs(process(self.processor, prompts, [one.images for one in asked]), self.model)
        begin = time.perf_counter()
        output = self.model.generate(**inputs, **self._generation)
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
        seconds = (time.perf_counter() - begin) / len(asked)
        report = self.state.report
        # With beams each row is there once per beam, and without images none is.
        samples = report.samples[:: max(1, len(report.samples) // len(asked))] or (None,) * len(asked)
        texts = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        return [
            {
                "answer": text.strip(),
                "visual_tokens": 0 if sample is None else sample.n_visual,
                "kept_tokens": 0.0 if sample is None else sample.average_in,
                "pruning_path": report.path,
                "kv_bytes_dense": report.kv_bytes.dense / len(asked),
                "kv_bytes_sparse": report.kv_bytes.sparse / len(asked),
                "seconds": seconds,
            }
            for text, sample in zip(texts, samples, strict=True)
        ]

    def _messages(self, asked: Asked) -> list[dict[str, Any]]:
        images = [{"type": "image"} for _ in asked.images]
        turn = {"role": "user", "content": [*images, {"type": "text", "text": asked.question}]}
        if self._system_prompt is None:
            return [turn]
        return [{"role": "system", "content": [{"type": "text", "text": self._system_prompt}]}, turn]

    def _failed(self, error: Exception) -> dict[str, Any]:
        reason = f"{type(error).__name__}: {with_notes(error)}"
        if self._on_error == RAISE:
            raise RuntimeError(f"a row cannot be answered: {reason}") from error
        return {"error": reason}
