"""Two processes over which tiny models are tensor-parallel: each answers cases, and writes what it has found."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.distributed import DistributedConfig

from sparsevlm import apply_sparsevlm
from sparsevlm.compat import cache_of
from toys import IS_OLD, PROMPTS, make_inputs, tiny_model

N_RANKS = 2
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}
SELECTED: dict[str, dict[str, Any]] = {
    "attention of the text": {**OPTIONS, "selector": "sparsevlm"},
    "attention of the text in visual heads": {**OPTIONS, "selector": "sparsevlm", "heads": "visual"},
    "attention of the last token": {**OPTIONS, "selector": "fastv"},
    "attention in the tower": {"keep": 0.5, "min_keep": 3, "selector": "visionzip"},
    "rank of the attention": {**OPTIONS, "keep": None, "rank_tolerance": 0.3},
    "states": {**OPTIONS, "selector": "span"},
    "states, merged": {"keep": 0.5, "min_keep": 3, "selector": "tome"},
}
_TOWER = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"}
# Older transformers do not run a tensor-parallel Gemma 3 at all.
FAMILIES = ("qwen2_5_vl", "llava", "qwen3_vl", *(() if IS_OLD else ("gemma3",)))
# transformers' own plans spread no tower; newer ones add such rules to their own, older ones take them instead.
SPREAD_TOWER = {f"model.vision_tower.encoder.layers.*.self_attn.{name}": style for name, style in _TOWER.items()}


class Draws:
    """Draws of its own on every rank."""

    def select(self, context, n_keep):
        own = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        return torch.randperm(context.n_visual, generator=own)[:n_keep].sort().values


class Fails:
    """Fails where it is called."""

    def select(self, context, n_keep):
        raise KeyError("no tokens today")


def cases() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Family, prompt and options by name, of cases that one process can answer as well."""
    found = {
        f"{family}, {name}": (family, "batch, unequal counts", options)
        for family in FAMILIES[:2]
        for name, options in SELECTED.items()
    }
    found |= {family: (family, "one image", SELECTED["attention of the text"]) for family in FAMILIES[2:]}
    found["llava with a spread tower"] = ("llava", "one image", SELECTED["attention in the tower"])
    return found


def inputs_of(family: str, prompt: str, device: str) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in make_inputs(*PROMPTS[prompt], family=family).items()}


def spread_model(folder: Path, family: str, plan: Any = "auto") -> Any:
    """A model of which this process has its part."""
    whole = tiny_model(family)
    own = type(whole).from_pretrained(
        folder / family, distributed_config=DistributedConfig(tp_size=N_RANKS, tp_plan=plan)
    )
    own.generation_config = whole.generation_config
    return own.eval()


def answer(model, options, inputs) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The report of a call, with the lengths of its cache, and the logits of its new tokens."""
    with apply_sparsevlm(model, **options) as state:
        output = model.generate(**inputs, **GREEDY)
        report = json.loads(json.dumps(dataclasses.asdict(state.report)))
    del report["wall_ms"]
    lengths = [layer.keys.shape[-2] for layer in cache_of(output).layers]
    return {"report": report, "lengths": lengths}, {
        "logits": torch.stack(output.logits).cpu(),
        "sequences": output.sequences.cpu(),
    }


def failure(model, options, inputs) -> str:
    """The error that a call ends in."""
    with apply_sparsevlm(model, **options):
        try:
            model.generate(**inputs, **GREEDY)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "none"


def refusal(device: str) -> str:
    """What is said of weights that torch has spread."""
    model = tiny_model().to(device)
    mlp = model.model.language_model.layers[1].mlp
    mesh = init_device_mesh(device, (N_RANKS,))
    mlp.up_proj.weight = nn.Parameter(distribute_tensor(mlp.up_proj.weight.detach(), mesh, [Shard(0)]))
    try:
        apply_sparsevlm(model)
    except NotImplementedError as error:
        return str(error)
    return "none"


def sharded_model(device: str) -> Any:
    """A model whose weights are sharded, where each process answers for itself."""
    model = tiny_model().to(device)
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    return model


def own_prompt(rank: int, device: str) -> dict[str, torch.Tensor]:
    """A prompt that no other process has."""
    row = [("text", 3), ("image", 4, 4 + rank), ("text", 7)]
    return {name: value.to(device) for name, value in make_inputs(row, seed=rank).items()}


def main(folder: Path, device: str, rank: int) -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=N_RANKS
    )
    models = {family: spread_model(folder, family) for family in FAMILIES}
    models["llava with a spread tower"] = spread_model(folder, "llava", SPREAD_TOWER)
    found, tensors = {}, {}
    for name, (family, prompt, options) in cases().items():
        found[name], own = answer(models.get(name, models[family]), options, inputs_of(family, prompt, device))
        tensors |= {f"{name}/{part}": value for part, value in own.items()}
    model, inputs = models["qwen2_5_vl"], inputs_of("qwen2_5_vl", "one image", device)
    found["draws"], own = answer(model, {**OPTIONS, "selector": Draws()}, inputs)
    tensors |= {f"draws/{part}": value for part, value in own.items()}
    found["engine"], _ = answer(model, {**OPTIONS, "engine": True}, inputs)
    found["fails"] = failure(model, {**OPTIONS, "selector": Fails()}, inputs)
    found["other options"] = failure(model, {**OPTIONS, "keep": 0.5 + 0.2 * rank}, inputs)
    found["by other means"] = refusal(device)
    found["fsdp"], own = answer(sharded_model(device), SELECTED["attention of the text"], own_prompt(rank, device))
    tensors |= {f"fsdp/{part}": value for part, value in own.items()}
    save_file(tensors, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    other = os.fork()  # importing takes most of the time
    main(Path(sys.argv[1]), sys.argv[2], rank=0 if other else 1)
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
