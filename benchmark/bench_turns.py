"""Accuracy of second questions about an image, after a first question about something else, on the bundled model.

``python -m benchmark.bench_turns`` asks each hold-out scene two questions of different tasks in one conversation on a
kept cache, dense and for two selectors under every value of the option ``turns``, and appends rows to
``results/turns.csv``. What the same second question gets as the first and only one stands beside them (``alone``).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark.timed import RESULTS
from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.bench.rows import Row, append_rows, check_columns, device_and_versions
from sparsevlm.bundled import bundled_path
from sparsevlm.compat import cache_of
from sparsevlm.config import TURNS
from sparsevlm.evaluation.execution.provenance import commit
from sparsevlm.evaluation.metrics.scores import score
from sparsevlm.evaluation.suites.demo import FIRST_SEED
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import SINGLE_TASKS, Question, draw_scene

COLUMNS = (
    *("model", "selector", "keep", "turns", "task", "n", "accuracy", "ci_low", "ci_high", "first_accuracy"),
    *("tokens_again", "features_bytes", "visual_tokens", "gpu", "dtype", "torch", "triton", "transformers", "commit"),
    *("command", "timestamp", "note"),
)
DENSE, ALONE, AVERAGE = "dense", "alone", "average"
SELECTORS = ("span", "sparsevlm")
KEEP = 0.25
_MOST_NEW = 24
_N_RESAMPLES = 2000


@dataclass(frozen=True)
class Asked:
    """Scores of a conversation and what its second call cost."""

    task: str
    first: float
    second: float
    tokens_again: int
    features_bytes: int
    visual_tokens: float


def conversations(n: int) -> Iterator[tuple[Any, Question, Question]]:
    """Image, first and second question of ``n`` scenes: the second ones by task in turn, the first ones about other
    objects where there are such, and always of another task."""
    for i in range(n):
        scene = draw_scene(FIRST_SEED + i)
        second = scene.question(SINGLE_TASKS[i % len(SINGLE_TASKS)])
        start = i // len(SINGLE_TASKS)
        tasks = [SINGLE_TASKS[(i + 1 + (start + k) % (len(SINGLE_TASKS) - 1)) % len(SINGLE_TASKS)] for k in range(8)]
        others = [scene.question(task) for task in tasks]
        apart = [one for one in others if one.box and not set(one.box) & set(second.box)]
        yield scene.image, (apart or others)[0], second


class Chat:
    """Conversation on a kept cache."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._messages: list[dict[str, Any]] = []
        self._output: Any = None

    def ask(self, question: str, image: Any = None) -> str:
        """Answers one more question; the image comes with the first one."""
        before = self._rendered().removesuffix("<|im_end|>\n") if self._messages else ""
        images = [] if image is None else [{"type": "image"}]
        self._messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        text = self._rendered(add_generation_prompt=True).removeprefix(before)
        inputs = dict(
            self._processor(text=[text], return_tensors="pt", **({} if image is None else {"images": [image]}))
        )
        if self._output is not None:
            said = self._output.sequences
            ended = said[0, -1] == self._processor.tokenizer.eos_token_id
            inputs["input_ids"] = torch.cat(
                [said[:, :-1] if ended else said, inputs["input_ids"].to(said.device)], dim=1
            )
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs.pop("mm_token_type_ids", None)
            inputs["past_key_values"] = cache_of(self._output)
        inputs = {
            name: value.to(self._model.device) if hasattr(value, "to") else value for name, value in inputs.items()
        }
        self._output = self._model.generate(
            **inputs, max_new_tokens=_MOST_NEW, do_sample=False, return_dict_in_generate=True
        )
        new = self._output.sequences[:, inputs["input_ids"].shape[1] :]
        answer: str = self._processor.batch_decode(new, skip_special_tokens=True)[0].strip()
        self._messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer

    def _rendered(self, **options: Any) -> str:
        text: str = self._processor.apply_chat_template(self._messages, tokenize=False, **options)
        return text


def scored(answer: str, question: Question) -> float:
    """Score of an answer, 0 or 1."""
    return score("iou" if question.task == "box" else "exact", answer, (question.answer,))["score"]


def run(model: Any, processor: Any, n: int, state: Any, turns: str) -> list[Asked]:
    """Asks all conversations; of ``alone`` the second question only."""
    found = []
    for image, first, second in conversations(n):
        chat, before = Chat(model, processor), float("nan")
        if turns == ALONE:
            after = scored(chat.ask(second.text, image), second)
        else:
            before = scored(chat.ask(first.text, image), first)
            after = scored(chat.ask(second.text), second)
        report = None if state is None else state.report
        costs = (0, 0, float("nan")) if report is None else (
            report.n_refreshed, report.features_bytes, report.average_in,
        )  # fmt: skip
        found.append(Asked(second.task, before, after, *costs))
    return found


def rows_of(found: Sequence[Asked], **columns: str) -> list[Row]:
    """Rows of a setting: one a task, and one of all."""
    rows = []
    for task in (*SINGLE_TASKS, AVERAGE):
        own = [one for one in found if task in (one.task, AVERAGE)]
        if not own:
            continue
        scores = np.array([one.second for one in own])
        draws = np.random.default_rng(0).choice(scores, (_N_RESAMPLES, len(scores))).mean(axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        values = {
            "accuracy": scores.mean(),
            "ci_low": low,
            "ci_high": high,
            "first_accuracy": np.mean([one.first for one in own]),
            "tokens_again": np.mean([one.tokens_again for one in own]),
            "features_bytes": np.mean([one.features_bytes for one in own]),
            "visual_tokens": np.mean([one.visual_tokens for one in own]),
        }
        cells = {name: "" if np.isnan(value) else f"{value:.6g}" for name, value in values.items()}
        rows.append({**columns, "model": "bundled", "task": task, "n": str(len(own)), **cells})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks under all settings and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench_turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, default=225, help="conversations, a multiple of the nine tasks at best")
    parser.add_argument("--append-to", type=Path, default=RESULTS / "turns.csv")
    given = parser.parse_args(arguments)
    check_columns(given.append_to, COLUMNS)
    model = load_model(
        bundled_path(), dtype="bfloat16" if given.device.startswith("cuda") else "float32", device=given.device
    )
    processor = load_processor(bundled_path())
    rows: list[Row] = []
    for turns in (ALONE, DENSE):
        found = run(model, processor, given.n, None, turns)
        rows += rows_of(found, selector=DENSE, keep="1.0", turns=turns)
    for selector in SELECTORS:
        for turns in (ALONE, *TURNS):
            setting = {"selector": selector, "keep": str(KEEP), "turns": turns}
            options = {"selector": selector, "keep": KEEP, "turns": TURNS[0] if turns == ALONE else turns}
            try:
                state = apply_sparsevlm(model, processor=processor, **options)
            except ValueError:
                note = "refused: it reads the question"
                rows.append({**setting, "model": "bundled", "task": AVERAGE, "n": "0", "note": note})
                continue
            rows += rows_of(run(model, processor, given.n, state, turns), **setting)
            remove_sparsevlm(model)
    command = shlex.join(["python", "-m", "benchmark.bench_turns", *(sys.argv[1:] if arguments is None else arguments)])
    shared = {**device_and_versions(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    shared |= {"commit": commit(), "command": command}
    append_rows(given.append_to, [{**dict.fromkeys(COLUMNS, ""), **row, **shared} for row in rows])
    for row in rows:
        if row["task"] == AVERAGE:
            print(row["selector"], row["turns"], row.get("accuracy", row.get("note")))


if __name__ == "__main__":
    main()
