"""Every example runs as it stands, and says what its page promises."""

from __future__ import annotations

import re
import runpy

import pytest
from documents import EXAMPLES, ROOT, read

from sparsevlm.compat import with_cache_named

# What each prints; answers are those of the bundled model, which reads drawn scenes without a mistake here.
PRINTS = {
    "quickstart.py": ["dense:  354", "pruned: 354", "selector span"],
    "chat.py": ["354\n780\n", "cached tokens per layer: [332, 332, 332, 332,"],
    "streaming.py": ["blue 354, orange 780, cyan TREE", "average 64.0"],
    "batch.py": ["354 (64 of 256 visual tokens)", "(128 of 256 visual tokens)"],
    "several_images.py": ["523 (right: 523)", "image 1:", "image 2:"],
    "video.py": ["6 frames are 3 steps", "step 2:"],
    "own_selector.py": ["largest-change: ", "Border: ", "random: ", "(128 of 256 tokens)"],
    "report_json.py": ["2 requests, 256 visual tokens", "64.0 of them computed", "64 64 64 64"],
    "overlay.py": ["wrote overlay.png"],
    "evaluate_own_data.py": ["dense 1.0: score", "span-features 0.25: score", "random 0.25: score"],
    "peft_adapter.py": ["after 5 steps ", "(64 of 256 visual tokens)", "merged: "],
    "ray_folder.py": ["scene-8.png: blue 354, orange 780, cyan TREE (64 of 256 visual tokens)", "scene-11.png: "],
}
NEEDS = {"peft_adapter.py": "peft", "ray_folder.py": "ray.data"}
WRITES = {
    "peft_adapter.py": [
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "merged/processor_config.json",
    ],
    "ray_folder.py": ["answers/*.parquet"],
    "report_json.py": ["report-8.json", "report-9.json"],
    "overlay.py": ["overlay.png"],
    "evaluate_own_data.py": ["questions.jsonl", "runs/*/metrics.csv", "runs/*/table.md"],
}


# What asks a server is run by tests/server/test_client_example.py.
OF_SERVER = {"client.py"}


@pytest.mark.parametrize(
    "script", [one for one in EXAMPLES if one.name not in OF_SERVER], ids=lambda script: script.name
)
@pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")
def test_example(script, tmp_path, monkeypatch, capsys):
    if script.name in NEEDS:
        pytest.importorskip(NEEDS[script.name])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for text in PRINTS[script.name]:
        assert text in printed
    for pattern in WRITES.get(script.name, ()):
        assert list(tmp_path.glob(pattern)), pattern


def test_the_adapter_of_the_example_has_learned_and_is_merged_whole(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "peft_adapter.py"))
    printed = capsys.readouterr().out
    first, last = re.search(r"loss of the lesson: ([\d.]+), after \d+ steps ([\d.]+)", printed).groups()
    assert float(last) < 0.8 * float(first)
    assert re.search(r"adapter: (.*) \(64", printed)[1] == re.search(r"merged: (.*), path", printed)[1]


def test_a_chat_without_pruning_is_that_of_the_plain_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path(str(ROOT / "examples" / "chat.py"))
    turns = [("Read the number on the blue card.", made["draw_scene"](8).image), ("Count the yellow shapes.", None)]

    def tokens():
        chat = made["Chat"](made["model"], made["processor"])
        for question, image in turns:
            chat.ask(question, image)
        return chat.tokens.tolist()

    with made["state"].options(keep=1.0):
        kept_all = tokens()
    made["state"].detach()
    plain = made["model"].generate  # under its own name for the cache
    monkeypatch.setattr(made["model"], "generate", lambda **inputs: plain(**with_cache_named(inputs)), raising=False)
    assert kept_all == tokens()


def test_every_example_is_on_the_page():
    page = read(ROOT / "examples" / "README.md")
    assert [script.name for script in EXAMPLES if f"[{script.name}]({script.name})" not in page] == []
    assert set(PRINTS) | OF_SERVER == {script.name for script in EXAMPLES}


def test_the_page_quotes_what_the_scripts_say_of_themselves():
    for script in EXAMPLES:
        first = read(script).splitlines()[0]
        assert first.startswith('"""')
        assert first.endswith('."""') or first.endswith(".")
