"""Files, links and commands that the documents name exist."""

from __future__ import annotations

import re

import pytest
from documents import DOCUMENTS, ROOT, blocks, name_of, prose, read

PLACES = (ROOT, ROOT / "src" / "sparsevlm", ROOT / "docs", ROOT / "benchmark" / "results")
# A path of this repository: folders and a file with one of its suffixes, or a folder with a slash behind it.
PATH = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|csv|yml|toml|cff)|(?:[\w-]+/)+)(?![\w/*<])")
# Named as files of other places: what users write, and what runs and builds write.
OTHERS = {"metrics.csv", "table.md", "predictions/", "your_selector.py", "runs/", "sparsevlm-demo/", "path/"}
OTHERS |= {"build/site/"}


def spans(document):
    return re.findall(r"`([^`\n]+)`", prose(document))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_exist(document):
    if document.name == "CHANGELOG.md":
        return  # it names files as they were
    named = {path for span in spans(document) for path in PATH.findall(span) if "/" in path or path.endswith(".py")}
    named -= OTHERS
    places = (*PLACES, document.parent)
    assert {path for path in named if not any((place / path).exists() for place in places)} == set()


def test_a_path_that_is_gone_is_found():
    assert PATH.findall("engine/wiring.py and tests/engine, `docs/`") == ["engine/wiring.py", "docs/"]
    assert PATH.findall("owner/name, N K d, (t, h, w), transformers.py") == ["transformers.py"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_commands_have_the_options_that_the_documents_name():
    typer = pytest.importorskip("typer")
    from sparsevlm.cli import app

    commands = typer.main.get_command(app).commands
    options = {
        name: {opt for one in command.params for opt in (*one.opts, *one.secondary_opts)}
        for name, command in commands.items()
    }
    seen = set()
    for document in DOCUMENTS:
        code = "\n".join(block.code.replace("\\\n", " ") for block in blocks(document) if block.language == "bash")
        for line in [*code.splitlines(), *spans(document)]:
            command = line.split("  #")[0]
            for name, rest in re.findall(r"(?<![\w.])sparsevlm ([\w-]+)((?: [^&|;]*)?)", command):
                if name not in options:
                    continue
                seen.add(name)
                unknown = set(re.findall(r"(?<=\s)--[\w-]+", rest)) - options[name] - {"--help"}
                assert not unknown, f"{name_of(document)}: sparsevlm {name} has no {unknown}"
    assert seen == set(options)


def test_the_parts_of_the_package_are_those_of_the_structure_test():
    from test_structure import EVALUATION_LEVELS, LEVELS

    text = read(ROOT / "CONTRIBUTING.md")
    found = {}
    for level, cells in re.findall(r"^\| (\d) \| (.*) \|$", text, flags=re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", cells), int(level))
    assert found == {part: level for part, level in LEVELS.items() if not part.startswith("__")}
    (listed,) = re.findall(r"^\* Within `evaluation` likewise: (.*)\.$", text, flags=re.MULTILINE)
    levels = sorted(EVALUATION_LEVELS.items(), key=lambda item: item[1])
    assert re.findall(r"`(\w+)`", listed) == [part for part, _ in levels if not part.startswith("__")]


def test_what_the_readme_has_to_hold_for_the_tools():
    """The tests' command is read from there by continuous integration."""
    text = read(ROOT / "README.md")
    for marker in ("<!-- main command -->", "<!-- test command -->"):
        (command,) = re.findall(re.escape(marker) + r"\n```bash\n(.*?)\n```", text, flags=re.DOTALL)
        assert command.startswith("python3 -m venv .venv && ")
