"""``sparsevlm bench`` on a tiny checkpoint."""

from __future__ import annotations

import csv
import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sparsevlm.bench.cases import CORE, FULL, Case, MixedCase
from sparsevlm.bench.providers import make_providers
from sparsevlm.bench.rounds import Settings
from sparsevlm.bench.rows import COLUMNS
from sparsevlm.bench.steps import Step
from sparsevlm.bench.vllm_dense import VLLM_DENSE
from sparsevlm.bundled import bundled_path
from sparsevlm.cli import app
from sparsevlm.cli import bench as bench_command
from sparsevlm.cli.bench_output import Output, about_rows
from sparsevlm.cli.bench_tables import print_case
from sparsevlm.cli.busy import BusyWatch
from sparsevlm.cores import OtherProcesses
from sparsevlm.inputs import load_model
from tiny_checkpoint import save_tiny_checkpoint
from toys import tiny_model

FAST = ["--device", "cpu", "--dtype", "float32", "--iterations", "1", "--warmup", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", n_layers=12))


@pytest.fixture(autouse=True)
def transformers_alone_is_probed(monkeypatch):
    """For the estimate, which is quicker."""
    monkeypatch.setattr("sparsevlm.bench.run.LONGEST_OF_ALL", 0.0)


def call(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_table_and_rows(checkpoint, tmp_path):
    rows = tmp_path / "rows.csv"
    arguments = ["--model", checkpoint, "--cases", "v256-b1-n1", "--append-to", str(rows), *FAST]
    assert call(*arguments, "--selectors", "none").exit_code == 0
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "v256-b1-n1" in words
    names = ["hf-dense", "ours-default", "ours-dense", "ours", "ours-engine", "ours-sparsevlm", "ours-random"]
    (heads,), lines = (
        re.findall(r"provider .*", result.stdout),
        re.findall(r"^ ?((?:hf|ours)\b.*)", result.stdout, re.M),
    )
    assert [line.split()[0] for line in lines] == names, "transformers, then the user's own first call"
    n_cells = {len(line.split()) for line in lines}
    assert n_cells == {len(heads.replace("first token", "first-token").split())}, "no cell is empty"
    assert not re.search(r"^(hf|ours)\S*: ", result.stdout, re.MULTILINE), "nor is there a note"
    assert result.stdout.index("The weights are those of") < result.stdout.index("x: how") < result.stdout.index(heads)
    progress = " ".join(result.stderr.split())
    assert "1 case, 7 providers: about" in progress
    assert "v256-b1-n1 (1 of 1), about" in progress
    begun = re.findall(r"^v256-b1-n1: (\S+) \((\d) of 7\)", result.stderr, re.MULTILINE)
    assert [int(number) for _, number in begun] == list(range(1, 8)), "a line each where stderr is no terminal"
    assert {"hf-dense", "ours-default", "ours-random"} < {name for name, _ in begun}
    with rows.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS
    assert len({row["timestamp"] for row in found}) <= 2
    assert {row["model"] for row in found} == {"tiny"}
    assert {row["floor"] for row in found} == {""}  # of a CPU there is none
    paths = {row["provider"]: row["path"] for row in found}
    assert {name for name in names if paths[name] == "plain"} == set(names) - {"hf-dense", "ours-engine"}
    assert paths["ours-engine"] == "engine"
    assert all(row["command"].startswith("sparsevlm") for row in found)
    rows.write_text("a,b\n1,2\n")
    result = call("--model", checkpoint, "--cases", "v256-b1-n1", "--append-to", str(rows), *FAST)
    assert "has other columns (a, b)" in result.stderr


def test_pictures_and_selectors(checkpoint, tmp_path):
    """A selector that reads the tower is timed phase by phase like all others."""
    rows = tmp_path / "rows.csv"
    arguments = ["--cases", "v256-b1-n1,picture448-b1-n1", "--selectors", "visionzip", "--append-to", str(rows)]
    result = call("--model", checkpoint, *arguments, *FAST)
    assert result.exit_code == 0, result.stderr
    with rows.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    zipped = [row for row in found if row["provider"] == "ours-visionzip"]
    assert {row["phase"] for row in zipped} == {"first_token", "vision", "prefill", "overhead", "total"}
    assert {row["path"] for row in zipped} == {"plain"}
    assert all(row["p50"] and not row["note"] for row in zipped)
    pictures = [row for row in found if row["case"] == "picture448-b1-n1"]
    # The checkpoint takes no more than 96 visual tokens of an image.
    assert {int(row["n_visual"]) for row in pictures} == {81}
    assert "preprocess" in result.stdout


def test_tables(capsys):
    shared = {"keep": "1.0", "phase": "total", "metric": "ms", "note": "", "p50": "30", "floor": "10"}
    mixed = [{**shared, "provider": "hf-dense", "metric": "mean_ms", "p50": "60", "note": "8 of 24 requests"}]
    mixed += [{**shared, "provider": "ours", "keep": "0.25", "metric": "mean_ms", "p50": "20"}]
    mixed += [{**shared, "provider": "ours", "keep": "0.25", "metric": "x", "p50": "3.5"}]
    mixed += [{**shared, "provider": "ours", "keep": "0.25", "metric": "worst_by_median", "p50": "1.25"}]
    mixed += [{**shared, "provider": "vllm-dense", "p50": "", "note": "failed: it did"}]
    print_case(MixedCase(24), mixed)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["mixed24"]
    assert lines[1] == ["provider", "keep", "total", "x", "worst"]
    assert lines[3] == ["hf-dense", "1.0", "60.0"]
    assert lines[4] == ["ours", "0.25", "20.0", "3.50", "1.25"]
    assert lines[5] == ["vllm-dense", "1.0"]
    assert lines[6:] == [["hf-dense:", "8", "of", "24", "requests"], ["vllm-dense:", "failed:", "it", "did"]]
    print_case(Case(256, 1, 1), [{**shared, "provider": "hf-dense", "p50": "", "note": "out of memory"}])
    assert "out of memory" in capsys.readouterr().out


def test_defaults_of_a_cpu_are_small(monkeypatch):
    """And those of a GPU are the shape and the cases of the stored rows."""
    place = bench_command._Place.of(None, None, "cpu", "sdpa")
    assert (place.model, place.dtype, place.checkpoint) == ("bundled", "auto", bundled_path())
    assert place.load().dtype == load_model(bundled_path()).dtype, "as of a user's own call"
    assert bench_command._Place.of("bundled", "float32", "cpu", "sdpa").dtype == "float32"
    assert bench_command._Place.of("tiny", None, "cpu", "sdpa").dtype == "bfloat16"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    place = bench_command._Place.of(None, None, "auto", "sdpa")
    assert (place.model, place.dtype, place.device) == ("7b", "bfloat16", "cuda")
    asked = []
    monkeypatch.setattr(bench_command._Place, "check_memory", lambda place: None)
    monkeypatch.setattr(bench_command._Place, "load", lambda place: SimpleNamespace(dtype="torch.float32"))

    def run(model, cases, settings, *rest, **options):
        asked.append(([case.name for case in cases], settings.seconds, settings.vision_keep))
        return []

    monkeypatch.setattr("sparsevlm.bench.run.run", run)
    assert call("--device", "cpu").exit_code == 0
    assert call("--device", "cpu", "--full", "--seconds", "3").exit_code == 0
    monkeypatch.setattr("sparsevlm.inputs.pick_device", lambda device: "cuda")
    assert call("--no-vllm").exit_code == 0
    found = [(len(names), *options) for names, *options in asked]
    assert found == [(2, 2.0, 1.0), (len(FULL), 3.0, 1.0), (len(CORE), 8.0, 0.5)]


def test_a_model_without_room_is_refused_before_it_is_made(monkeypatch, checkpoint):
    monkeypatch.setattr("sparsevlm.bench.memory.free_bytes", lambda device: 10**10)
    result = call("--model", "7b", "--device", "cpu", "--dtype", "bfloat16")
    assert result.exit_code == 2
    assert (
        "the model 7b takes 16.6 GB in bfloat16 for its weights alone, and cpu has 10.0 GB free. Name a smaller model, "
        "such as bundled or tiny, or another --device."
    ) in result.stderr
    monkeypatch.setattr("sparsevlm.bench.memory.free_bytes", lambda device: 1000)
    assert "GB in float32 for its weights alone" in call("--model", checkpoint, *FAST).stderr
    monkeypatch.setattr("sparsevlm.bench.memory.free_bytes", lambda device: None)
    monkeypatch.setattr("sparsevlm.bench.shapes.random_model", _no_memory)
    assert "out of memory with the model tiny on cpu: name a smaller" in call("--model", "tiny", *FAST).stderr


def _no_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


def test_what_takes_long_is_asked_about(monkeypatch):
    monkeypatch.setattr("sparsevlm.bench.run.estimated_seconds", lambda *_: 601.0)
    measured = []
    monkeypatch.setattr("sparsevlm.bench.run.Run.rows_of", lambda _, case, *__: measured.append(case.name) or [])
    arguments = ["--model", "tiny", "--cases", "v256-b1-n1", "--selectors", "none", *FAST]
    result = call(*arguments)
    assert result.exit_code == 2
    assert "this takes about 10 min: add --yes to start it, or choose fewer --cases" in result.stderr
    monkeypatch.setattr("sparsevlm.cli.terminal._is_answered", lambda: True)
    result = CliRunner().invoke(app, ["bench", *arguments], input="n\n")
    assert (result.exit_code, "Aborted" in result.stderr) == (1, True)
    result = CliRunner().invoke(app, ["bench", *arguments], input="y\n")
    assert result.exit_code == 0, result.stderr
    assert "This takes about 10 min. Start?" in result.stderr
    assert measured == ["v256-b1-n1"]
    assert call(*arguments, "--yes").exit_code == 0
    assert measured == ["v256-b1-n1"] * 2


def test_a_terminal_sees_every_step_and_keeps_none(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("sparsevlm.cli.terminal.Console", lambda stderr: terminal)
    output = Output("cuda", BusyWatch(), None)
    case = Case(256, 1, 1)
    with output:
        output.show_step(case, Step("comparing answers"), "")
        output.show_step(case, Step("first call", "ours", 2, 7, begins=True), "")
        output.show_step(case, Step("timed call 3", "ours", 2, 7), "about 2 min")
        shown = screen.getvalue()
        for text in ("comparing answers", "ours (2 of 7)", "ours (2 of 7), timed call 3, about 2 min left"):
            assert f"v256-b1-n1: {text}" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert "0:00:00" in shown
        time.sleep(0.3)
        assert screen.getvalue() == shown, "nothing is drawn while a call is timed"
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K"), "the line is taken away"


def test_a_busy_machine_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("sparsevlm.cores.allowed_cores", lambda: 4.0)
    monkeypatch.setattr("sparsevlm.cores.os.cpu_count", lambda: 4)
    busy = [0.0]
    monkeypatch.setattr(OtherProcesses, "cores", lambda others: busy[0])
    output = Output("cpu", BusyWatch(), None)
    shared = {"provider": "ours", "keep": "0.25", "phase": "total", "metric": "ms", "note": "", "floor": ""}
    steady, unsteady = ({**shared, "p50": "10", "p20": "10", "p80": p80} for p80 in ("11", "19"))
    busy[0] = 3.0
    output.show_case(Case(256, 1, 1), [steady])
    output.show_case(MixedCase(24), [{**unsteady, "metric": "mean_ms"}, unsteady])
    said = capsys.readouterr()
    assert "Calls disagree" not in said.out, "requests of mixed shapes do"
    assert said.err == ""
    for _ in range(2):
        output.show_case(Case(256, 1, 1), [unsteady])
    said = capsys.readouterr()
    assert said.out.count("Do not trust these figures, nor their x: ours 0.25 (total; up to 90%).") == 2
    assert said.err.count("OMP_NUM_THREADS=1") == 1
    Output("cpu", BusyWatch(), None)
    assert "torch computes with 4 threads, and about 1.0 of 4 cores are free" in capsys.readouterr().err
    Output("cuda", BusyWatch(), None)
    assert capsys.readouterr().err == ""


def test_only_columns_that_are_shown_are_explained():
    """And a CPU has no floor: its caches hold small weights."""
    result = call("--model", "tiny", "--cases", "v256-b1-n1", "--selectors", "none", *FAST)
    assert result.exit_code == 0, result.stderr
    for word in ("floor", "GB", "worst", "/token", "mixed shapes", "hf-static"):
        assert word not in result.stdout
    assert "x: how many times faster" in result.stdout
    words = " ".join(result.stdout.split())
    assert "run on hooks around the model's own modules" in words
    assert "The weights are random, in float32" in words
    about = about_rows([MixedCase(24)], "random", on_gpu=True)
    assert "hooks" not in about
    assert all(word in about for word in ("mixed shapes", "hf-static"))


def test_a_column_is_explained_above_the_first_table_that_has_it(capsys):
    output = Output("cuda", BusyWatch(), None, "of all tables")
    row = {"provider": "hf-dense", "keep": "1.0", "metric": "ms", "note": "", "p50": "10", "p20": "10", "p80": "10"}
    rows = [{**row, "phase": phase, "floor": "5"} for phase in ("total", "first_token")]
    output.show_case(Case(256, 1, 1), rows)
    output.show_case(Case(256, 1, 16), [*rows, {**row, "phase": "decode_per_token", "floor": ""}])
    first, second = capsys.readouterr().out.split(Case(256, 1, 16).name)
    assert first.index("of all tables") < first.index("first token: until") < first.index("floor: ")
    assert first.index("floor: ") < first.index(Case(256, 1, 1).name)
    above_second = first[first.index(Case(256, 1, 1).name) :]
    assert "/token: of every further one." in above_second
    for said_before in ("of all tables", "first token:", "floor:"):
        assert said_before not in above_second + second
    output.show_case(Case(256, 1, 1), rows)
    assert ": " not in capsys.readouterr().out


def test_help_explains_every_case_and_provider(monkeypatch):
    """docs/engine.md sends its readers there."""
    monkeypatch.setattr("sparsevlm.bench.providers.check_float8", lambda device: None)
    measured = make_providers(tiny_model(), (0.25,), static=True, vision_keep=0.5, selectors=["random"], fp8=True)
    names = {provider.name for provider in measured} - {"ours-random"} | {"ours-NAME", "hf-flash", VLLM_DENSE.name}
    cases = {re.match("[a-z]+", case.name)[0] for case in FULL}
    said = " ".join(call("--help").stdout.split()).partition("─ Options ─")[0]
    assert {name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", said)} == set()
    assert {kind for kind in cases if not re.search(rf"(?<!\w){kind}\d", said)} == set()
    assert {"ours-vision", "ours-fp8", "hf-static"} <= names


@pytest.mark.parametrize(("model", "is_measured"), [("tiny", True), ("llava-tiny", False)])
def test_vllm_is_measured_of_models_whose_processors_are_at_hand(model, is_measured, monkeypatch, capsys):
    from sparsevlm.bench import vllm_dense

    measured = []
    monkeypatch.setattr(vllm_dense, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(vllm_dense, "measure_vllm", lambda *arguments, **options: measured.append(options) or {})
    place = bench_command._Place(model, None, "float32", "cuda", "sdpa")
    assert bench_command._measure_vllm(place, [Case(100, 1, 1)], Settings()) == {}
    assert bool(measured) == is_measured
    assert ("vllm-dense: left out; it is measured of qwen2_vl" in capsys.readouterr().err) != is_measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "llava-tiny", "--cases", "picture896-b1-n1,mixed24", *FAST],
            "none of these cases can be measured",
        ),
        (
            ["--model", "8b"],
            "8b (did you mean '7b'?) is neither a shape, a folder nor a hub id (owner/name); shapes",
        ),
        (["--model", "smol"], "the weights of smol are not in"),
        (["--model", "zebra"], "shapes are 7b, 3b, qwen3-vl-8b, llava-1.5-7b, internvl3-8b, tiny"),
        (["--cases", ","], "--cases is empty."),
        (["--seconds", "nan"], "--seconds must be a number of at least 0, got nan."),
        (["--seconds", "inf"], "--seconds must be a number of at least 0, got inf."),
        (["--seconds", "-1"], "--seconds must be a number of at least 0, got -1.0."),
        (["--vision-keep", "2"], "--vision-keep must be a fraction in (0, 1], got 2.0."),
        (["--cases", "v9"], "there is no case v9; there are v256-b1-n1"),
        (["--keep", "1.5"], "must be fractions between 0 and 1"),
        (["--keep", "half"], "must be fractions with commas"),
        (["--dtype", "int8"], "--dtype must be one of auto, float32"),
        (["--selectors", "sparsevlm,spam"], "there is no selector 'spam'; there are all, cdpruner"),
        (["--append-to", "rows.txt"], "must end in .csv"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
