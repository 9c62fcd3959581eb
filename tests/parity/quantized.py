"""Tiny models in the formats of quantized checkpoints: written by hand, or by the package that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toys import family_of, tiny_model

GROUP = 32
# Sizes that all formats can divide.
SIZES = {"intermediate_size": 128}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Method:
    """A way of quantization.

    Attributes
    ----------
    packages : tuple of str
        Modules that it needs.
    load : callable
        ``load(model, folder, **where)`` gives the quantized copy of a model that lies in ``folder``.
    told : str
        How a report names it; empty where the engine may run what has been loaded.
    rounds : bool
        Whether activations are rounded as well, if only to half precision: a small change can become a step.
    """

    packages: tuple[str, ...]
    load: Callable[..., Any]
    told: str
    rounds: bool = False


def quantized_model(method: Method, family: str, folder: Path, **where: Any) -> Any:
    """A tiny model by some method; ``where`` may hold a ``device_map``."""
    model = tiny_model(family, text_options=SIZES)
    model.save_pretrained(folder)
    made = method.load(model, folder, **where).eval()
    made.generation_config = model.generation_config
    return made


def decoder_linear(model) -> dict[str, nn.Linear]:
    """Linear layers of the decoder by name; the tower and the head stay as they are."""
    decoder = family_of(model).decoder
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{decoder}.layers.")
    }


def others(model) -> list[str]:
    """Names of all other linear layers."""
    own = decoder_linear(model)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in own]


def by_bitsandbytes(**options: Any) -> Callable[..., Any]:
    def load(model, folder, **where):
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(**options, llm_int8_skip_modules=others(model))
        return type(model).from_pretrained(folder, quantization_config=config, **where)

    return load


def by_torchao(name: str) -> Callable[..., Any]:
    def load(model, folder, **where):
        import torchao.quantization
        from transformers import TorchAoConfig

        config = TorchAoConfig(getattr(torchao.quantization, name)())
        return type(model).from_pretrained(folder, quantization_config=config, **where)

    return load


def by_compressed_tensors(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None):
    def load(model, folder, **where):
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from compressed_tensors.quantization.utils import calculate_qparams

        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config = QuantizationConfig(
            config_groups={"group_0": group}, ignore=others(model), quantization_status="frozen", format=form
        )
        apply_quantization_config(model, config)
        for linear in decoder_linear(model).values():
            grouped = linear.weight.data.unflatten(-1, (-1, weights.get("group_size", linear.in_features)))
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), linear.quantization_scheme.weights)
            linear.weight_scale.data.copy_(scale)
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return type(model).from_pretrained(folder, dtype="auto", **where)

    return load


def _by_hand(pack: Callable[[Tensor], dict[str, Tensor]], config: Callable[[Any], dict[str, Any]]):
    """Rewrite a saved checkpoint: every linear layer of the decoder by what ``pack`` makes of its weight."""

    def load(model, folder, **where):
        weights = load_file(folder / "model.safetensors")
        keys = {name: module.weight for name, module in decoder_linear(model).items()}
        stored = {key for key in weights if "visi" not in key and any(key.endswith(own_key(name)) for name in keys)}
        assert len(stored) == len(keys)
        for key in stored:
            prefix = key.removesuffix("weight")
            weights |= {prefix + name: value.contiguous() for name, value in pack(weights.pop(key)).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        described = json.loads((folder / "config.json").read_text())
        described["quantization_config"] = config(model)
        (folder / "config.json").write_text(json.dumps(described))
        return type(model).from_pretrained(folder, dtype=torch.float32, **where)

    return load


def own_key(name: str) -> str:
    """The part of a weight's name that is the same in a checkpoint and in the model."""
    return name[name.index("layers.") :] + ".weight"


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from 0 to 15, (out, in), of which 8 is zero, and the scales of groups, (out, n_groups)."""
    grouped = weight.unflatten(-1, (-1, GROUP))
    scales = grouped.abs().amax(-1) / 7
    whole = (grouped / scales[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    return whole.flatten(-2), scales


def _packed(whole: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of four bits in one, along the last axis."""
    eights = whole.unflatten(-1, (-1, 8))
    packed = torch.zeros_like(eights[..., 0])
    for place, of in enumerate(order):
        packed |= eights[..., of] << (4 * place)
    return packed


def _gptq(weight: Tensor) -> dict[str, Tensor]:
    whole, scales = _rounded(weight)
    zeros = torch.full_like(scales, 7, dtype=torch.int32)  # the first version of the format stores one less
    return {
        "qweight": _packed(whole).T,
        "qzeros": _packed(zeros.T),
        "scales": scales.T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def _awq(weight: Tensor) -> dict[str, Tensor]:
    whole, scales = _rounded(weight)
    zeros = torch.full_like(scales, 8, dtype=torch.int32)
    return {
        "qweight": _packed(whole.T.contiguous(), _AWQ_ORDER),
        "qzeros": _packed(zeros.T.contiguous(), _AWQ_ORDER),
        "scales": scales.T.half(),
    }


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale.float().view(1, 1)}


def _gptq_config(model) -> dict[str, Any]:
    common = {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False, "quant_method": "gptq"}
    return {**common, "checkpoint_format": "gptq", "backend": "gptq_torch"}


def _awq_config(model) -> dict[str, Any]:
    common = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm", "quant_method": "awq"}
    return {**common, "backend": "torch_awq", "modules_to_not_convert": others(model)}


def _fp8_config(model) -> dict[str, Any]:
    common = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return {**common, "modules_to_not_convert": others(model)}


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_BY_TOKEN = {"strategy": "token", "dynamic": True}
_CHANNEL = {"strategy": "channel"}
_GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
METHODS = {
    "bitsandbytes, 8 bit": Method(
        ("bitsandbytes", "accelerate"), by_bitsandbytes(load_in_8bit=True), "bitsandbytes", True
    ),
    "bitsandbytes, 4 bit": Method(
        ("bitsandbytes", "accelerate"),
        by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes",
        True,
    ),
    "torchao, int8 weights": Method(("torchao",), by_torchao("Int8WeightOnlyConfig"), "torchao"),
    "torchao, float8 weights": Method(("torchao",), by_torchao("Float8WeightOnlyConfig"), "torchao"),
    "torchao, int8": Method(("torchao",), by_torchao("Int8DynamicActivationInt8WeightConfig"), "torchao", True),
    "compressed-tensors, 4 bit weights": Method(
        ("compressed_tensors",), by_compressed_tensors("pack-quantized", _GROUPS), "compressed-tensors"
    ),
    "compressed-tensors, int8": Method(
        ("compressed_tensors",),
        by_compressed_tensors("int-quantized", {**_INT8, **_CHANNEL}, {**_INT8, **_BY_TOKEN}),
        "compressed-tensors",
        True,
    ),
    "compressed-tensors, float8": Method(
        ("compressed_tensors",),
        by_compressed_tensors("float-quantized", {**_FLOAT8, **_CHANNEL}, {**_FLOAT8, **_BY_TOKEN}),
        "compressed-tensors",
        True,
    ),
    "GPTQ": Method(("gptqmodel", "optimum"), _by_hand(_gptq, _gptq_config), "gptq"),
    "AWQ": Method(("gptqmodel", "accelerate"), _by_hand(_awq, _awq_config), "awq", True),
    "fine-grained fp8": Method(("accelerate",), _by_hand(_fp8, _fp8_config), ""),
}
