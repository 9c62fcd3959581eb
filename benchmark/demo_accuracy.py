"""Accuracy of the bundled model on fresh scenes, dense and at budgets: ``python -m benchmark.demo_accuracy``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

from .provenance import RESULTS, append_rows, provenance

MAX_NEW_TOKENS = 8


def answers(model: Any, inputs: Any, processor: Any) -> list[str]:
    """Greedy answers of a batch."""
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def batches(args: argparse.Namespace, task: str, processor: Any, model: Any) -> Any:
    """Inputs and right answers, batch by batch; a scene without a question of the task is passed over."""
    images, prompts, right = [], [], []
    for seed in range(args.first_seed, args.first_seed + args.scenes):
        scene = draw_scene(seed)
        found = [question for question in scene.questions if question.task == task]
        if found:
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": found[0].text}]}]
            images.append(scene.image)
            prompts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            right.append(found[0].answer)
        if images and (len(images) == args.batch or seed == args.first_seed + args.scenes - 1):
            inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt").to(model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            yield inputs, right
            images, prompts, right = [], [], []


def settings_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(selector, keep) pairs; the first is dense."""
    pairs = [("dense", "1.0")]
    for keep in args.keep.split(","):
        pairs += [(selector, keep) for selector in args.selectors.split(",")]
    return pairs


def evaluate(args: argparse.Namespace, task: str, model: Any, processor: Any) -> list[dict[str, Any]]:
    """One row per setting."""
    settings = settings_of(args)
    hits, tokens, n = dict.fromkeys(settings, 0), dict.fromkeys(settings, 0.0), 0
    counts: set[int] = set()
    for inputs, right in batches(args, task, processor, model):
        n += len(right)
        for setting in settings:
            selector, keep = setting
            if selector == "dense":
                remove_sparsevlm(model)
                got = answers(model, inputs, processor)
                tokens[setting] += float((inputs["input_ids"] == model.config.image_token_id).sum())
            else:
                budget = None if keep == "adaptive" else float(keep)
                state = apply_sparsevlm(model, keep=budget, selector=selector, target_layers=args.target_layers)
                got = answers(model, inputs, processor)
                tokens[setting] += sum(sample.average_in for sample in state.report.samples)
                if budget is None:
                    counts |= {sample.final_tokens for sample in state.report.samples}
            hits[setting] += sum(a == b for a, b in zip(got, right, strict=True))
    remove_sparsevlm(model)
    if counts:
        print(f"{task}: adaptive final counts range over {len(counts)} values, {min(counts)} to {max(counts)}")
    return [
        {
            "model": "bundled",
            "suite": "scenes",
            "task": task,
            "selector": selector,
            "keep": keep,
            "target_layers": " ".join(map(str, args.target_layers or ())) or "default",
            "avg_tokens": round(tokens[selector, keep] / n, 2),
            "score": round(hits[selector, keep] / n, 4),
            "n": n,
            "first_seed": args.first_seed,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        for selector, keep in settings
    ]


def main() -> None:
    """Parse, run, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="number,count")
    parser.add_argument("--selectors", default="sparsevlm,random,grid")
    parser.add_argument("--keep", default="0.5", help="comma-separated fractions, or adaptive")
    parser.add_argument("--target-layers", type=lambda text: [int(layer) for layer in text.split(",")])
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=500_000, help="below 1000000 no scene was trained on")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_accuracy.csv")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = load_model(bundled_path(), dtype=dtype, device=device)
    processor = load_processor(bundled_path(), local_files_only=True)
    origin = provenance()
    for task in args.tasks.split(","):
        rows = evaluate(args, task, model, processor)
        for row in rows:
            print({key: row[key] for key in ("task", "selector", "keep", "avg_tokens", "score", "n")}, flush=True)
        append_rows(args.out, [{**row, **origin} for row in rows])


if __name__ == "__main__":
    main()
