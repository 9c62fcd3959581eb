"""What has to be here before anything long starts: lmms-eval, the checkpoint, the tasks and their data sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.reproduce.plan import N_LAYERS, Setting, Table
from benchmark.reproduce.store import Fingerprint
from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.bundled import BUNDLED
from sparsevlm.evaluation.execution.provenance import versions
from sparsevlm.evaluation.execution.resolved_model import ResolvedModel
from sparsevlm.evaluation.suites.fingerprint import fingerprint
from sparsevlm.evaluation.suites.lmms import LmmsSuite, task_manager
from sparsevlm.inputs import checkpoint_folder, load_processor, load_skeleton, pick_device
from sparsevlm.inputs.checkpoint import read_json
from sparsevlm.inputs.downsample import Downsampler, VisualCounter
from sparsevlm.models import adapter_for
from sparsevlm.plugins.lmms_arguments import parse_arguments
from sparsevlm.plugins.lmms_inputs import token_side

# Builders of the package datasets that read files, in the place of a data set's name.
_BUILDERS = ("arrow", "csv", "imagefolder", "json", "pandas", "parquet", "text", "webdataset")
_PAIRED = "mme"  # two questions about each image, scored together


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is here.

    Attributes
    ----------
    name : str
        As the user gave it.
    folder : Path
    n_layers : int
    sizes_images : bool
        Whether images are resized to the number of visual tokens of the table; otherwise the processor makes that
        number of every image.
    """

    name: str
    folder: Path
    n_layers: int
    sizes_images: bool


@dataclass(frozen=True)
class TaskFiles:
    """Where a task is defined and what it reads.

    Attributes
    ----------
    digest : str
        Of its file, and of local data files that it names.
    data_set : str or None
        Id of a data set on the hub, ``None`` where all is local.
    """

    digest: str
    data_set: str | None


def find_checkpoint(model: str, download: bool) -> Path:
    """Finds the folder of a checkpoint, from the hub only if that was allowed.

    Raises
    ------
    FileNotFoundError
        If it is not here; the message says what would be downloaded.
    """
    if model == BUNDLED or Path(model).exists() or download:
        return checkpoint_folder(model)
    try:
        return checkpoint_folder(model, local_files_only=True)
    except FileNotFoundError as error:
        if "neither a folder" in str(error):
            raise
        raise FileNotFoundError(
            f"model {model} is not here: --download fetches its configuration, processor and safetensors files from "
            "the hub into its cache; or give the folder of a copy."
        ) from error


def describe_checkpoint(name: str, folder: Path, table: Table) -> Checkpoint:
    """Reads what the plan needs from the model's files, without its weights.

    Raises
    ------
    ValueError, NotImplementedError
        If the model is none of ours, or does not have the table's number of visual tokens.
    """
    adapter, processor = adapter_for(load_skeleton(folder)), load_processor(folder)
    try:
        token_side(processor)
    except NotImplementedError:
        count = VisualCounter(adapter, processor)
        found = {count((size,)) for size in ((1280, 960), (336, 336))}
        if found != {table.n_visual}:
            raise ValueError(
                f"the tables are for images of {table.n_visual} visual tokens, and {type(processor).__name__} makes "
                f"{' to '.join(map(str, sorted(found)))} that cannot be chosen. Supported are processors that bound "
                f"pixels, as Qwen's, and those that make {table.n_visual} of any image."
            ) from None
        return Checkpoint(name, folder, adapter.n_layers, sizes_images=False)
    return Checkpoint(name, folder, adapter.n_layers, sizes_images=True)


def n_layers_of(model: str) -> int:
    """Decoder layers of a checkpoint that is not here.

    Raises
    ------
    ValueError
        If nobody knows them.
    """
    if model not in N_LAYERS:
        raise ValueError(
            f"model {model} is not here, and a plan needs the number of its layers: known are {', '.join(N_LAYERS)}."
        )
    return N_LAYERS[model]


def check_settings(checkpoint: Checkpoint, settings: Sequence[Setting]) -> None:
    """Refuses settings that the model cannot run.

    Raises
    ------
    ValueError
        With the name of the setting and the reason.
    """
    model = load_skeleton(checkpoint.folder)
    for setting in settings:
        arguments = parse_arguments({"pretrained": checkpoint.name, **setting.arguments})
        if arguments.downsample is not None:
            reason = Downsampler(adapter_for(model), load_processor(checkpoint.folder)).unsupported_reason()
            if reason:
                raise ValueError(f"{setting.name} cannot run: {reason}. Leave it out of --selectors.")
        if arguments.pruning is None:
            continue
        try:
            apply_sparsevlm(model, config=arguments.pruning)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"{setting.name} cannot run: {error} Leave it out of --selectors.") from error
        remove_sparsevlm(model)


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> dict[str, TaskFiles]:
    """Finds the tasks among those of lmms-eval and of the folder.

    Raises
    ------
    ModuleNotFoundError
        Without lmms-eval; the message has the pip line.
    ValueError
        If it knows no task of a name, or the name is that of a group.
    """
    place = None if include_path is None else str(include_path)
    manager = task_manager(place)
    LmmsSuite(tuple(tasks), place).check()
    if groups := [task for task in tasks if manager.task_index[task]["type"] != "task"]:
        raise ValueError(f"{', '.join(groups)} is a group of tasks: name its tasks in --tasks.")
    return {task: _files_of(Path(manager.task_index[task]["yaml_path"])) for task in tasks}


def _files_of(file: Path) -> TaskFiles:
    from lmms_eval.utils import load_yaml_config

    config: dict[str, Any] = load_yaml_config(str(file), mode="simple")
    named = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    files = [Path(one) for one in _paths(named)]
    data_set = str(config.get("dataset_path"))
    is_local = data_set in _BUILDERS or Path(data_set).exists()
    return TaskFiles(fingerprint([file, *(one for one in files if one.is_file())]), None if is_local else data_set)


def _paths(named: Any) -> list[str]:
    if isinstance(named, Mapping):
        named = list(named.values())
    return [named] if isinstance(named, str) else [path for one in named for path in _paths(one)]


def missing_data_sets(tasks: Mapping[str, TaskFiles]) -> list[str]:
    """Data sets of the tasks that are not in the caches of this machine."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    wanted = dict.fromkeys(files.data_set for files in tasks.values() if files.data_set)
    prepared = os.environ.get("LMMS_EVAL_DATASETS_CACHE") or HF_DATASETS_CACHE

    def is_here(name: str) -> bool:
        in_hub = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
        return in_hub.is_dir() or (Path(prepared) / name.replace("/", "___")).is_dir()

    return [name for name in wanted if not is_here(name)]


def check_limit(tasks: Sequence[str], limit: int | None) -> None:
    """Refuses a limit that parts the two questions which MME asks about an image.

    Raises
    ------
    ValueError
    """
    if limit is not None and limit % 2 and _PAIRED in tasks:
        raise ValueError(f"--limit {limit}: mme scores two questions about an image together, so take an even one.")


def provenance(checkpoint: Checkpoint, device: str) -> Fingerprint:
    """Weights, dtype and versions.

    Batch size, number of processes and device are no part of it; the tables say if they differ.
    """
    from importlib.metadata import version

    place = ResolvedModel(checkpoint.name, checkpoint.folder, pick_device(device), dtype_of(checkpoint.folder, device))
    found = versions(place, "")
    kept = {name: found[name] for name in ("sparsevlm", "commit", "torch", "transformers", "dtype", "weights")}
    return {**kept, "model": short_name(checkpoint.name), "lmms-eval": version("lmms-eval")}


def fingerprints(
    origin: Fingerprint, arguments: Mapping[str, Any], tasks: Mapping[str, TaskFiles], limit: int | None
) -> dict[str, Fingerprint]:
    """Everything that the figures of a setting depend on, by task."""
    shared = {**origin, "arguments": ",".join(f"{name}={value}" for name, value in arguments.items()), "limit": limit}
    return {task: {**shared, "task": files.digest} for task, files in tasks.items()}


def short_name(model: str) -> str:
    """The last part of a folder or a hub id."""
    return model.rstrip("/").rpartition("/")[2]


def dtype_of(folder: Path, device: str) -> str:
    """The dtype that is stored; float32 on a CPU, most of which are slow in any other."""
    if pick_device(device) == "cpu":
        return "float32"
    stored = read_json(folder / "config.json")
    return str(stored.get("dtype") or stored.get("torch_dtype") or "auto")
