"""Parquet files in the schemas of MME, TextVQA, POPE, GQA, DocVQA and ChartQA, with drawn scenes in them.

Their task files take lmms-eval's own ones and redirect nothing but the data set; those of MME and POPE also leave out
the prompt's "Answer the question using a single word or phrase.", behind which the bundled model names a colour.
"""

from pathlib import Path

from sparsevlm.scenes import draw_scene

SEEDS = range(500_000, 500_004)
# Of each task of lmms-eval: the split.
SPLITS = {
    **{"mme": "test", "textvqa_val": "validation", "pope": "test"},
    **{"gqa": "testdev", "docvqa_val": "validation", "chartqa": "test"},
}
TASKS = tuple(f"local_{name}" for name in SPLITS)
TASK_FILE = """\
include: {include}
task: local_{name}
dataset_path: parquet
dataset_name: null
dataset_kwargs:
  data_files:
    {split}: {parquet}
"""
_WITHOUT_PROMPT = """\
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
"""
# The images of GQA are a data set of their own, which its task file loads by name: from the working directory.
GQA_IMAGES = """\
---
configs:
- config_name: testdev_balanced_images
  data_files:
  - split: testdev
    path: images.parquet
---
"""


def write_tasks(folder: Path, working_directory: Path) -> None:
    """Writes data and task files of all six tasks, and one whose rows lack the image."""
    import lmms_eval
    from datasets import Dataset

    stock = Path(lmms_eval.__file__).parent / "tasks"
    folder.mkdir()
    for name, rows in _rows().items():
        parquet = folder / f"{name}.parquet"
        Dataset.from_list(rows).to_parquet(parquet)
        (include,) = stock.rglob(f"{name}.yaml")
        text = TASK_FILE.format(include=include, name=name, split=SPLITS[name], parquet=parquet)
        text += _WITHOUT_PROMPT if name in ("mme", "pope") else ""
        (folder / f"local_{name}.yaml").write_text(text)
    bad = Dataset.from_list([{**row, "image": None} for row in _rows()["pope"]])
    bad.to_parquet(folder / "bad.parquet")
    text = (folder / "local_pope.yaml").read_text()
    (folder / "local_bad.yaml").write_text(
        text.replace("local_pope", "local_bad").replace("pope.parquet", "bad.parquet")
    )
    images = working_directory / "lmms-lab-encoder" / "GQA"
    images.mkdir(parents=True)
    (images / "README.md").write_text(GQA_IMAGES)
    scenes = [{"id": str(seed), "image": draw_scene(seed).image} for seed in SEEDS]
    Dataset.from_list(scenes).to_parquet(images / "images.parquet")


def _rows():
    rows = {name: [] for name in SPLITS}
    for seed in SEEDS:
        scene = draw_scene(seed)
        image, asked = scene.image, {question.task: question for question in scene.questions}
        exist, larger = asked["exist"], asked["compare"]
        paired = {"image": image, "question_id": f"existence/{seed}.png", "category": "existence"}
        other = {"yes": "No", "no": "Yes"}[exist.answer]
        rows["mme"].append({**paired, "question": f"{exist.text} ", "answer": exist.answer.capitalize()})
        rows["mme"].append({**paired, "question": f"Is this wrong: {exist.text}", "answer": other})
        rows["textvqa_val"].append(
            {
                **{"image_id": f"{seed:x}", "question_id": seed, "question": larger.text, "image": image},
                **{"question_tokens": larger.text.lower().split(), "image_width": 448, "image_height": 448},
                **{"answers": [larger.answer.lower()] * 10, "image_classes": ["Card"], "set_name": "val"},
                "ocr_tokens": [larger.answer],
            }
        )
        rows["pope"].append(
            {
                **{"id": str(seed), "question_id": str(seed), "question": exist.text, "answer": exist.answer},
                **{"image_source": f"scene_{seed}", "image": image, "category": "random"},
            }
        )
        rows["gqa"].append(
            {
                **{"id": f"q{seed}", "imageId": str(seed), "question": larger.text, "answer": larger.answer},
                **{"fullAnswer": f"It is {larger.answer}.", "isBalanced": True},
            }
        )
        rows["docvqa_val"].append(
            {
                **{"questionId": str(seed), "question": larger.text, "question_types": ["figure/diagram"]},
                **{"image": image, "docId": seed, "ucsf_document_id": "scene", "ucsf_document_page_no": "1"},
                **{"answers": [larger.answer, larger.answer.upper()], "data_split": "val"},
            }
        )
        kind = "human_test" if seed % 2 else "augmented_test"
        rows["chartqa"].append({"type": kind, "question": exist.text, "answer": exist.answer, "image": image})
    return rows
