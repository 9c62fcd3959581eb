"""``python -m lmms_eval --model sparsevlm``: offline, on the bundled model, over rows of our own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed: nox -s lmms_eval, or pip install '.[eval]' after torch",
    ),
    pytest.mark.timeout(600),
]

TESTS = Path(__file__).parents[1]
SEEDS = range(500_000, 500_003)
SIDES = (448, 392, 336)  # one per scene: 256, 196 and 144 visual tokens
N_QUESTIONS = 3  # per scene
PRUNED = {"keep": 0.5, "target_layers": (0, 2)}  # holds for any depth of the bundled model
TASK_FILE = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
  - metric: rank
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
STOCK_TASK = """\
include: {include}
task: {name}
dataset_path: parquet
dataset_name: null
dataset_kwargs:
  data_files:
    {split}: {parquet}
"""
STOCK = {"textvqa_val": "validation", "mme": "test"}  # tasks as lmms-eval has them, over rows of ours
TASK_CODE = """\
import os


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"]), "rank": float(os.environ.get("RANK", 0))}
"""


def scene_rows():
    """Pictures of several sizes, questions and the right answers."""
    rows = []
    for side, scene in zip(SIDES, map(draw_scene, SEEDS), strict=True):
        image = scene.image.resize((side, side))
        rows += [(image, question.text, question.answer) for question in scene.questions[:N_QUESTIONS]]
    return rows


def write_rows(desk):
    """The rows in the columns of our own tasks, of TextVQA and of MME."""
    from datasets import Dataset

    images, questions, answers = map(list, zip(*scene_rows(), strict=True))
    pairs = [str(i // 2) for i in range(len(images))]  # MME asks twice about a picture
    common = {"image": images, "question": questions, "question_id": pairs}
    categories = ["existence", "existence", "code_reasoning", "code_reasoning"] * 2
    for name, columns, n_rows in (
        ("rows", {"answer": answers}, len(images)),
        ("textvqa_val", {"answers": [[answer] * 10 for answer in answers], "answer": answers}, len(images)),
        ("mme", {"answer": ["Yes", "No"] * 4, "category": categories}, len(categories)),
    ):
        first = {key: values[:n_rows] for key, values in {**common, **columns}.items()}
        Dataset.from_dict(first).to_parquet(desk / f"{name}.parquet")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Local tasks over the same rows, and the environment in which lmms-eval finds nothing but files."""
    import lmms_eval

    desk = tmp_path_factory.mktemp("lmms")
    write_rows(desk)
    (desk / "tasks").mkdir()
    (desk / "tasks" / "utils.py").write_text(TASK_CODE)
    for name, max_new_tokens in (("scenes_a", 12), ("scenes_b", 3)):
        text = TASK_FILE.format(parquet=desk / "rows.parquet", name=name, max_new_tokens=max_new_tokens)
        (desk / "tasks" / f"{name}.yaml").write_text(text)
    for name, split in STOCK.items():
        (include,) = (Path(lmms_eval.__file__).parent / "tasks").rglob(f"{name}.yaml")
        text = STOCK_TASK.format(include=include, name=f"local_{name}", split=split, parquet=desk / f"{name}.parquet")
        (desk / "tasks" / f"local_{name}.yaml").write_text(text)
    (desk / "site").mkdir()
    shutil.copy(TESTS / "torchvision_shim.py", desk / "site" / "sitecustomize.py")
    return desk


@pytest.fixture(scope="module")
def runs(desk):
    """A dense and a pruned run: their results, answers and output."""
    found = {}
    for name, arguments in (("dense", "keep=dense"), ("pruned", "keep=0.5,target_layers=0;2")):
        model_args = f"pretrained=bundled,dtype=float32,{arguments}"
        tasks = "scenes_a,local_mme,local_textvqa_val"
        done, folder = lmms_eval(desk, name, model_args, "--batch_size", "4", tasks=tasks)
        found[name] = (*results_of(done, folder), done.stdout + done.stderr)
    return found


def lmms_eval(desk, name, model_args, *arguments, launcher=("-m",), tasks="scenes_a"):
    """Run ``python -m lmms_eval`` and return the finished process and the folder of its results."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(desk / "site"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(desk / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *launcher, "lmms_eval", "--model", "sparsevlm", "--model_args", model_args]
    command += ["--tasks", tasks, "--include_path", str(desk / "tasks"), "--output_path", str(desk / name)]
    command += ["--device", "cpu", "--log_samples", *arguments]
    options = {"env": environment, "cwd": desk, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, **options, check=False), desk / name


def results_of(done, folder):
    """Results, and the answers of every task in the order of its rows."""
    files = list(folder.rglob("*_results.json"))
    assert len(files) == 1, done.stdout + done.stderr
    answers = {}
    for file in folder.rglob("*_samples_*.jsonl"):
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers[file.stem.partition("_samples_")[2]] = [as_text(row["filtered_resps"]) for row in rows]
    return json.loads(files[0].read_text()), answers


def as_text(response):
    return response[0] if isinstance(response, list) else response


def answer_alone(processor, model, image, question, max_new_tokens=12):
    """The library's own answer, one row at a time."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def own_answers(options, prompt=str, max_new_tokens=12):
    """Answers of the rows, and the averages of the visual tokens over layer inputs and outputs."""
    processor = load_processor(bundled_path())
    model = load_model(bundled_path(), dtype="float32", device="cpu")
    state = None if options is None else apply_sparsevlm(model, processor=processor, **options)
    answers, reports = [], []
    for image, question, _ in scene_rows():
        answers.append(answer_alone(processor, model, image, prompt(question), max_new_tokens))
        reports += [] if state is None else [state.report]
    total = sum(reports)
    return answers, (total.average_in, total.average_out) if total else None


def score(answers):
    rows = scene_rows()
    return sum(said.strip() == right for said, (_, _, right) in zip(answers, rows, strict=True)) / len(rows)


def stripped(answers):
    return [answer.strip() for answer in answers]


@pytest.mark.parametrize(("name", "options"), [("dense", None), ("pruned", PRUNED)])
def test_the_metric_is_what_our_own_generate_gives(runs, name, options):
    results, answers, output = runs[name]
    expected, averages = own_answers(options)
    assert stripped(answers["scenes_a"]) == stripped(expected)
    assert results["results"]["scenes_a"]["exact,none"] == pytest.approx(score(expected))
    figures = results["throughput"]
    found = [figures[f"avg_kept_tokens_layer_{side}/scenes_a"] for side in ("input", "output")]
    if averages is None:
        assert found == [figures["avg_visual_tokens/scenes_a"]] * 2
        assert figures["avg_prefill_flops_ratio"] == 1
    else:
        assert found == pytest.approx(averages)
        assert found[0] <= 0.5 * figures["avg_visual_tokens/scenes_a"]
        assert figures["avg_prefill_flops_ratio"] < 1
    assert "kept_tokens_layer_input" in output


@pytest.mark.parametrize(("name", "options"), [("dense", None), ("pruned", PRUNED)])
def test_stock_tasks_ask_what_they_would_ask(runs, name, options):
    """TextVQA's and MME's own task files, with their prompts, options and scores, over rows of ours."""
    results, answers, _ = runs[name]
    instruction = "\nAnswer the question using a single word or phrase."
    expected, _ = own_answers(options, lambda question: question.capitalize() + instruction, max_new_tokens=128)
    assert stripped(answers["local_textvqa_val"]) == stripped(expected)
    assert set(results["results"]["local_mme"]) >= {"mme_perception_score,none", "mme_cognition_score,none"}


def test_two_processes_and_two_tasks(desk):
    """Nine rows do not divide by two: one process answers one row twice, and it counts once."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    done, folder = lmms_eval(
        desk,
        "two",
        "pretrained=bundled,dtype=float32,keep=0.5,target_layers=0;2",
        "--batch_size",
        "2",
        launcher=launcher,
        tasks="scenes_a,scenes_b",
    )
    results, answers = results_of(done, folder)
    expected, averages = own_answers(PRUNED)
    assert stripped(answers["scenes_a"]) == stripped(expected)
    assert len(answers["scenes_b"]) == len(expected)
    assert results["results"]["scenes_a"]["rank,none"] == pytest.approx(4 / 9)  # both took part
    figures = results["throughput"]
    for task in ("", "/scenes_a", "/scenes_b"):
        assert figures[f"avg_kept_tokens_layer_input{task}"] == pytest.approx(averages[0])


def test_unknown_arguments_are_named(desk):
    done, folder = lmms_eval(desk, "wrong", "pretrained=bundled,kepe=0.5")
    assert "unknown model argument kepe. Did you mean keep?" in done.stdout + done.stderr
    assert not list(folder.rglob("*_results.json"))
