"""Accuracy of second questions about an image, after a first question about something else, on the bundled model.

``python -m benchmark.bench_turns`` asks each hold-out scene two questions of different tasks in one conversation on a
kept cache, dense and for two selectors under every value of the option ``turns``, and appends rows to
``results/turns.csv``. What the same second question gets as the first and only one stands beside them (``alone``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark.commands import command_of
from benchmark.timed import RESULTS
from sparsevlm import apply_sparsevlm
from sparsevlm.bench.rows import Row, append_rows, check_columns, device_and_versions
from sparsevlm.bundled import bundled_path
from sparsevlm.compat import cache_of
from sparsevlm.config import TURNS
from sparsevlm.evaluation.execution.provenance import commit
from sparsevlm.evaluation.metrics.scores import score
from sparsevlm.evaluation.suites.seeded import FIRST_SEED
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
_BATCH = 25
_N_RESAMPLES = 2000


@dataclass(frozen=True)
class Asked:
    """Scores of a conversation and what its second call cost."""

    task: str
    first: float
    second: float
    tokens_again: float
    features_bytes: float
    visual_tokens: float  # what the image has, as the second call finds it, averaged over the layers' inputs


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


class Chats:
    """Conversations side by side on one kept cache, with padding wherever their texts differ in length."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._ids = self._mask = self._cache = None

    def ask(self, questions: Sequence[str], images: Sequence[Any] = ()) -> list[str]:
        """Answers one more question each; images come with the first ones."""
        prompts = [self._prompt(row, question) for row, question in enumerate(questions)]
        images = {"images": [[image] for image in images]} if images else {}
        inputs = dict(self._processor(text=prompts, padding=True, return_tensors="pt", **images))
        inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
        if self._ids is not None:
            inputs["input_ids"] = torch.cat([self._ids, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.cat([self._mask, inputs["attention_mask"]], dim=1)
            inputs.pop("mm_token_type_ids", None)
            inputs["past_key_values"] = self._cache
        output = self._model.generate(**inputs, max_new_tokens=_MOST_NEW, do_sample=False, return_dict_in_generate=True)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        is_end = new == self._end
        self._ids, self._cache = output.sequences, cache_of(output)
        self._mask = torch.cat([inputs["attention_mask"], (is_end.cumsum(dim=1) - is_end.long() == 0).long()], dim=1)
        return [text.strip() for text in self._processor.batch_decode(new, skip_special_tokens=True)]

    @property
    def _end(self) -> int:
        token: int = self._processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return token

    def _prompt(self, row: int, question: str) -> str:
        """What the chat template adds for one more question, behind the end of the last answer."""
        asked = {"type": "text", "text": question}
        if self._ids is None:
            return self._rendered([{"role": "user", "content": [{"type": "image"}, asked]}])
        is_ended = bool((self._ids[row][self._mask[row].bool()][-1] == self._end).item())
        return ("" if is_ended else "<|im_end|>") + "\n" + self._rendered([{"role": "user", "content": [asked]}])

    def _rendered(self, messages: Sequence[Any]) -> str:
        text: str = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text


def scored(answer: str, question: Question) -> float:
    """Score of an answer, 0 or 1."""
    return score("iou" if question.task == "box" else "exact", answer, (question.answer,))["score"]


def run(model: Any, processor: Any, n: int, state: Any, turns: str) -> list[Asked]:
    """Asks all conversations; of ``alone`` the second question only."""
    found, asked = [], list(conversations(n))
    for start in range(0, n, _BATCH):
        images, first, second = zip(*asked[start : start + _BATCH], strict=True)
        chats, before, of_first = Chats(model, processor), [float("nan")] * len(images), None
        if turns == ALONE:
            answers = chats.ask([one.text for one in second], images)
        else:
            answers = chats.ask([one.text for one in first], images)
            of_first = None if state is None else state.report
            before = [scored(answer, one) for answer, one in zip(answers, first, strict=True)]
            answers = chats.ask([one.text for one in second])
        after = [scored(answer, one) for answer, one in zip(answers, second, strict=True)]
        costs = (0.0, 0.0, float("nan"))
        if state is not None:
            report = state.report
            with_image = report if report.samples or of_first is None else of_first
            costs = (report.n_refreshed / len(images), report.features_bytes / len(images), with_image.average_in)
        found += [Asked(one.task, *scores, *costs) for one, *scores in zip(second, before, after, strict=True)]
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
    """Asks under all settings, and appends the rows of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench_turns", allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, default=225, help="conversations, a multiple of the nine tasks at best")
    parser.add_argument("--selectors", nargs="+", default=[DENSE, *SELECTORS], help="of these alone")
    parser.add_argument("--append-to", type=Path, default=RESULTS / "turns.csv")
    given = parser.parse_args(arguments)
    check_columns(given.append_to, COLUMNS)
    dtype = "bfloat16" if given.device.startswith("cuda") else "float32"
    model, processor = load_model(bundled_path(), dtype=dtype, device=given.device), load_processor(bundled_path())
    command = command_of("bench_turns", sys.argv[1:] if arguments is None else arguments)
    shared = {**device_and_versions(model.device), "dtype": dtype, "commit": commit(), "command": command}
    for selector in given.selectors:
        for turns in (ALONE, DENSE) if selector == DENSE else (ALONE, *TURNS):
            rows = measured(model, processor, given.n, selector, turns)
            append_rows(given.append_to, [{**dict.fromkeys(COLUMNS, ""), **row, **shared} for row in rows])
            print(selector, turns, rows[-1].get("accuracy", rows[-1].get("note")), flush=True)


def measured(model: Any, processor: Any, n: int, selector: str, turns: str) -> list[Row]:
    """Rows of one setting."""
    if selector == DENSE:
        return rows_of(run(model, processor, n, None, turns), selector=DENSE, keep="1.0", turns=turns)
    setting = {"selector": selector, "keep": str(KEEP), "turns": turns}
    options = {"selector": selector, "keep": KEEP, "turns": TURNS[0] if turns == ALONE else turns}
    try:
        state = apply_sparsevlm(model, processor=processor, **options)
    except ValueError:
        note = "refused: it reads the question"
        return [{**setting, "model": "bundled", "task": AVERAGE, "n": "0", "note": note}]
    with state:
        return rows_of(run(model, processor, n, state, turns), **setting)


if __name__ == "__main__":
    main()
