"""``sparsevlm demo``: the bundled model on a drawn scene, dense and pruned side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .busy import BusyWatch
from .options import KEEP_HELP, Debug, Device, Selector, dtype_of, parse_keep, parse_layers, prepare_folder
from .terminal import progress, quiet_transformers, reports_errors

if TYPE_CHECKING:
    from ..config import SparseVLMConfig
    from ..report import Report
    from ..scenes import Scene
    from .asking import Answer

MAX_NEW_TOKENS = 24  # a list of all cards is the longest answer
# In the order in which they show best what pruning does.
TASK_ORDER = ("number", "list", "count", "exist", "box", "compare", "colour", "word", "half")
ABOUT_COLUMNS = (
    "dense > pruned: visual tokens (averaged over the decoder layers), size of the KV cache after the prompt, "
    "time of the whole answer."
)
ABOUT_TIME = (
    "This is the plain path: pruning saves visual tokens, arithmetic and KV cache. It does not have to save time here, "
    "where a small model spends most of it on overhead that does not depend on the number of tokens."
)


@dataclass(frozen=True)
class Exchange:
    """One question with its answers and the report of the pruned request."""

    task: str
    question: str
    right: str
    dense: Answer
    pruned: Answer
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Report without its indices, as ``--json`` prints it."""
        return {
            "task": self.task,
            "question": self.question,
            "right": self.right,
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "visual_tokens": self.report.n_visual,
            "average_in": self.report.average_in,
            "final_tokens": self.report.final_tokens,
            "kv_bytes": asdict(self.report.kv_bytes),
            "flops": asdict(self.report.flops),
        }


@reports_errors
def demo(
    *,
    seed: Annotated[int, typer.Option("--seed", help="Which scene; below 1000000 none was trained on.")] = 8,
    keep: Annotated[str, typer.Option("--keep", help=KEEP_HELP)] = "0.25",
    selector: Selector = None,
    target_layers: Annotated[
        str | None,
        typer.Option("--target-layers", help="Layers after which tokens are dropped.", show_default="every 4th from 2"),
    ] = None,
    questions: Annotated[int, typer.Option("--questions", help="How many to ask.", min=1, max=len(TASK_ORDER))] = 3,
    out: Annotated[Path, typer.Option("--out", help="Folder for scene, overlay and reports.")] = Path("sparsevlm-demo"),
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Ask the bundled model about a drawn scene, without and with pruning."""
    busy = BusyWatch()
    from ..config import SparseVLMConfig

    config = SparseVLMConfig(keep=parse_keep(keep), selector=selector, target_layers=parse_layers(target_layers))
    prepare_folder(out)
    with progress("loading the bundled model"):
        from ..bundled import BUNDLED, bundled_path
        from ..inputs import load_model, load_processor, pick_device
        from ..scenes import draw_scene

        quiet_transformers()
        target = pick_device(device)
        model = load_model(bundled_path(), dtype=dtype_of(BUNDLED, target), device=target)
        processor = load_processor(bundled_path())
        scene = draw_scene(seed)
    exchanges = _ask_all(model, processor, scene, config, questions)
    busy.warn(target)
    files = _write_files(out, scene, exchanges)
    settings = {
        "seed": seed,
        "keep": config.keep,
        "selector": exchanges[0].report.selector,
        "target_layers": ",".join(str(stage.layer) for stage in exchanges[0].report.samples[0].stages),
        "device": target,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if as_json:
        asked = [exchange.to_dict() for exchange in exchanges]
        typer.echo(json.dumps({**settings, "questions": asked, "files": [str(file) for file in files]}, indent=1))
        return
    _print_table(settings, exchanges)
    path = exchanges[0].report
    typer.echo(ABOUT_TIME if path.path == "plain" else f"Path: {path.path} ({path.path_reason}).")
    typer.echo("".join(f"\nwrote {file}" for file in files))


def _ask_all(model: Any, processor: Any, scene: Scene, config: SparseVLMConfig, n_questions: int) -> list[Exchange]:
    from .. import apply_sparsevlm
    from .asking import ask, build_inputs

    asked = [scene.question(task) for task in TASK_ORDER[:n_questions]]
    prompts = [build_inputs(processor, question.text, images=[scene.image]) for question in asked]
    # Once each beforehand, so that no time below holds the costs of a first call.
    with progress("warming up"):
        ask(model, processor, prompts[0], 2)
        with apply_sparsevlm(model, config=config, processor=processor):
            ask(model, processor, prompts[0], 2)
    with progress("asking, dense", len(prompts)) as advance:
        dense = []
        for inputs in prompts:
            dense.append(ask(model, processor, inputs, MAX_NEW_TOKENS))
            advance()
    exchanges = []
    with (
        apply_sparsevlm(model, config=config, processor=processor) as state,
        progress("asking, pruned", len(prompts)) as advance,
    ):
        for question, inputs, answer in zip(asked, prompts, dense, strict=True):
            pruned = ask(model, processor, inputs, MAX_NEW_TOKENS)
            exchanges.append(Exchange(question.task, question.text, question.answer, answer, pruned, state.report))
            advance()
    return exchanges


def _write_files(out: Path, scene: Scene, exchanges: list[Exchange]) -> list[Path]:
    """Write scene, overlay and one report per question."""
    from ..inputs import identified
    from ..visualization import Row, draw_rows, heading, save_picture

    picture = out / "scene.png"
    scene.image.save(picture)
    rows, reports = [], []
    for exchange in exchanges:
        reports.append(out / f"{exchange.task}.report.json")
        exchange.report.of_pictures(identified([scene.image])).to_json(reports[-1])
        sample = exchange.report.samples[0]
        _, height, width = sample.grids[0]
        label = (
            f"{exchange.question}   right: {exchange.right}, dense: {exchange.dense.text}, "
            f"pruned: {exchange.pruned.text}"
        )
        rows.append(Row(scene.image, sample, 0, height, width, label))
    title = heading([exchange.report for exchange in exchanges])
    return [picture, save_picture(draw_rows(rows, title=title), out / "overlay.png"), *reports]


def _print_table(settings: dict[str, Any], exchanges: list[Exchange]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("question", ratio=3)
    for name in ("right", "dense", "pruned"):
        table.add_column(name, ratio=2)
    for name in ("tokens", "KV MB", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for exchange in exchanges:
        report, kv = exchange.report, exchange.report.kv_bytes
        answers = [_marked(Text, answer.text, exchange.right) for answer in (exchange.dense, exchange.pruned)]
        table.add_row(
            exchange.question,
            exchange.right,
            *answers,
            f"{report.n_visual:.0f} > {report.average_in:.0f}",
            f"{kv.dense / 1e6:.2f} > {kv.sparse / 1e6:.2f}",
            f"{exchange.dense.total_ms:.0f} > {exchange.pruned.total_ms:.0f}",
        )
    typer.echo(", ".join(f"{name} {value}" for name, value in settings.items()))
    Console().print(table)
    typer.echo(ABOUT_COLUMNS)


def _marked(text_class: Any, answer: str, right: str) -> Any:
    """Coloured, and marked in words for terminals without colours."""
    if answer == right:
        return text_class(answer, style="green")
    return text_class(f"{answer or '(nothing)'} (wrong)", style="red")
