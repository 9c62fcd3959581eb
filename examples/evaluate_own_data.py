"""Evaluation of selectors and budgets on a JSONL file of your own."""

import json
from pathlib import Path

from sparsevlm.evaluation import EvalConfig, EvaluationRun
from sparsevlm.scenes import draw_scene

# One line per question: an image by its path from the file, the question, the answers that count as right.
rows = []
for seed in range(500_000, 500_008):
    scene = draw_scene(seed)
    scene.image.save(f"scene-{seed}.png")
    question = scene.question("number")
    row = {"id": str(seed), "image": f"scene-{seed}.png", "question": question.text, "answers": [question.answer]}
    rows.append(json.dumps(row))
Path("questions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

config = EvalConfig(
    suite="questions.jsonl",
    model="bundled",  # or a folder or hub id
    selectors=("span-features", "random"),
    keeps=(0.25,),
    metric="exact",  # or vqa, anls, iou
    max_new_tokens=8,
)
evaluation = EvaluationRun(config, Path("runs")).execute()
for result in evaluation.results:
    if result.task != "average":
        print(
            f"{result.selector} {result.keep}: score {result.score:.2f}, {result.avg_tokens:.0f} tokens, n {result.n}"
        )
print(f"answers, table and plot: {evaluation.folder}")
