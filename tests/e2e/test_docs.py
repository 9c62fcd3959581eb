"""The code in the documents runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import sparsevlm
from toys import PROMPTS, make_inputs, tiny_model

ROOT = Path(__file__).parents[2]


def code_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_selector_of_the_docs_is_short_and_works():
    (block,) = [block for block in code_blocks("docs/selectors.md") if "class " in block]
    namespace = {"apply_sparsevlm": sparsevlm.apply_sparsevlm, "model": tiny_model(n_layers=12)}
    exec(block, namespace)
    state = namespace["state"]
    inputs = make_inputs([("text", 3), ("image", 10, 10), ("text", 7)])
    namespace["model"].generate(**inputs, max_new_tokens=2)
    assert state.report.selector == "largest-change"
    assert state.report.average_in <= 50
    assert len(block.split("state =")[0].strip().splitlines()) <= 11


def test_the_built_in_selectors_are_documented():
    from sparsevlm.selection.selectors import SELECTORS

    table = (ROOT / "docs/selectors.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in table for name in SELECTORS)


def test_the_snippet_of_the_readme():
    (block,) = code_blocks("README.md")
    model, inputs = tiny_model(n_layers=12), make_inputs(*PROMPTS["one image"])
    generation = model.generate
    model.generate = lambda **kwargs: generation(**kwargs, max_new_tokens=2)
    namespace = {"model": model, "inputs": inputs, "processor": None}
    exec("\n".join(line for line in block.splitlines() if "from_pretrained" not in line), namespace)
    assert namespace["state"].report.n_visual == 24
